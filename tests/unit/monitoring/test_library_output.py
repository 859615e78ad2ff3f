"""What libraries print while a run is under way: none of it is seen, all of it is in a file. Real processes.

python -m pytest tests/unit/monitoring/test_library_output.py
"""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.monitoring import library_output
from mipo_ray.monitoring.display import shown
from mipo_ray.monitoring.library_output import LIBRARIES, LINES_SHOWN, MOST_KEPT
from mipo_ray.storage.configuration import check_config
from mipo_ray.storage.run_directory import RunDirectory, open_run
from mipo_ray.terminal import say

SECRET = f"hf_{'Ab1' * 11}"

# A run in which libraries print in every way that they have. Its argument says how it ends.
PROGRAM = f"""
import logging, os, signal, subprocess, sys, time, warnings
from types import SimpleNamespace

from mipo_ray.command import run_command
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.monitoring.display import shown
from mipo_ray.storage.run_directory import open_run
from mipo_ray.terminal import say

def fake_run(how):
    logging.basicConfig(level=logging.INFO)
    say("round 0  generate  started")
    print("[State Transition] RUNNING -> SHUTTING_DOWN.")
    print("(raylet) 8 PYTHON worker processes {SECRET}", file=sys.stderr)
    print("Loading weights:   0%\\rLoading weights: 100%", file=sys.stderr)
    os.write(2, b"core_worker.cc:2465: Actor with class name {SECRET}\\n")
    logging.getLogger("deepspeed").info("Setting ds_accelerator to cpu")
    warnings.warn("NUMA binding")
    subprocess.run(["sh", "-c", "echo child out; echo child err >&2"], check=True)
    if how == "watched":
        watch()
    if how == "error":
        raise RuntimeError("it broke")
    if how == "mistake":
        raise UserError("beta: expected a number")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "interrupted":
        os.kill(os.getpid(), signal.SIGINT)

def watch():
    import ray
    from mipo_ray.monitoring import watch
    from mipo_ray.monitoring.events import Events
    from mipo_ray.monitoring.run_state import Agenda

    stage = {{"round": 0, "stage": "generate", "time": time.time()}}
    phase = {{**stage, "event": "phase_start", "phase": "generate", "unit": "rows", "total": 96}}
    rows = {{**stage, "time": time.time() + 2, "event": "answered", "rows": 48, "answers": 96, "tokens": 3600}}
    batches = [[{{**stage, "event": "stage_start"}}, phase], [rows]]
    ray.get = lambda answer, timeout: answer
    watch.ASK_SECONDS = 0.0
    fake_writer = SimpleNamespace(news=SimpleNamespace(remote=lambda: batches.pop(0) if batches else []))
    with watch.watched(Events(fake_writer), Agenda()):
        while batches:
            time.sleep(0.05)
        time.sleep(0.6)
        say("round 0  generate  done in 3 s")

def work():
    with shown(open_run(sys.argv[1]), "auto"):
        fake_run(sys.argv[2])
    print("printed afterwards")
    os.write(1, b"written afterwards\\n")
    return 0

sys.exit(run_command(work, resumes=True))
"""
NOISE = ("State Transition", "worker processes", "Loading weights", "core_worker", "ds_accelerator", "NUMA", "child")


def on_terminal(directory: Path, how: str) -> tuple[int, str]:
    """Runs the program on a pseudo-terminal: its exit code and what one saw."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(directory), how], stdin=slave, stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)
    seen, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        ready, _, _ = select.select([master], [], [], 1.0)
        try:
            part = os.read(master, 65536) if ready else b""
        except OSError:  # its other end is closed
            break
        if ready and not part:
            break
        seen += part
    os.close(master)
    return process.wait(timeout=60), seen.decode().replace("\r\n", "\n")


def in_pipe(directory: Path, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(directory), how]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def kept(directory: Path) -> str:
    """The text of the only file of what libraries printed."""
    (file,) = (directory / LIBRARIES).iterdir()
    assert file.stat().st_mode & 0o077 == 0
    return file.read_text()


def test_a_terminal_shows_the_run_alone_and_the_file_has_the_rest(tmp_path: Path) -> None:
    code, seen = on_terminal(tmp_path, "watched")
    assert code == 0, seen
    assert not [noise for noise in NOISE if noise in seen]
    for text in ("round 0  generate  started\n", "waits for engines to start", "48 of 96 rows (50%)", "96 answers"):
        assert text in seen
    assert "━" in seen  # a bar, once there is something to show on it
    assert seen.index("waits for engines") < seen.index("━")
    assert seen.endswith("printed afterwards\nwritten afterwards\n")
    text = kept(tmp_path)
    assert not [noise for noise in NOISE if noise not in text]
    assert text.count("Loading weights") == 1  # as one would have seen it in the end
    assert "round 0" not in text
    assert "afterwards" not in text


def test_a_pipe_gets_plain_lines(tmp_path: Path) -> None:
    done = in_pipe(tmp_path, "watched")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "round 0  generate  started\nround 0  generate  done in 3 s\nprinted afterwards\nwritten afterwards\n"
    )
    assert done.stderr == ""
    assert not [noise for noise in NOISE if noise not in kept(tmp_path)]


def test_no_secret_is_kept(tmp_path: Path) -> None:
    """Neither one that went through Python nor one that C++ code wrote to the descriptor."""
    in_pipe(tmp_path, "well")
    assert "(raylet)" in kept(tmp_path)
    assert "Ab1Ab1" not in kept(tmp_path)


def test_an_error_shows_the_last_lines(tmp_path: Path) -> None:
    done = in_pipe(tmp_path, "error")
    assert done.returncode == 1
    first, *lines = done.stderr.splitlines()
    (file,) = (tmp_path / LIBRARIES).iterdir()
    assert first == f"the last lines that libraries printed (all of them: {file}):"
    assert [line for line in lines if line == "  child err"]
    assert lines[-1] == "RuntimeError: it broke"
    assert "Ab1Ab1" not in done.stderr
    assert "afterwards" not in done.stdout


@pytest.mark.parametrize(
    ("how", "code", "last"), [("mistake", 2, "error: beta"), ("interrupted", 130, "stopped by SIG")]
)
def test_a_mistake_and_a_stop_show_none(how: str, code: int, last: str, tmp_path: Path) -> None:
    done = in_pipe(tmp_path, how)
    assert done.returncode == code
    (line,) = done.stderr.splitlines()
    assert line.startswith(last)
    assert "child err" in kept(tmp_path)


def test_what_a_killed_run_left_is_searched_for_secrets_by_the_next(tmp_path: Path) -> None:
    assert in_pipe(tmp_path, "killed").returncode == -signal.SIGKILL
    assert "core_worker.cc" in kept(tmp_path)  # the last words of a process that dies are there
    with shown(open_run(str(tmp_path)), "auto"):
        pass
    assert "core_worker.cc" in kept(tmp_path)
    assert "Ab1Ab1" not in kept(tmp_path)


# In this process.


def run_that_prints(run: RunDirectory, text: str, error: BaseException | None = None) -> None:
    with shown(run, "auto"):
        print(text)
        if error is not None:
            raise error


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return open_run(str(tmp_path / "run"))


def test_streams_and_descriptors_are_as_before(run: RunDirectory, capfd: pytest.CaptureFixture[str]) -> None:
    """Also those of a notebook, which are not the process's own."""
    before = sys.stdout, sys.stderr
    run_that_prints(run, "noise")
    for error in (RuntimeError("it broke"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            run_that_prints(run, "noise", error)
    assert (sys.stdout, sys.stderr) == before
    os.write(1, b"seen\n")
    assert capfd.readouterr().out.splitlines() == ["seen"]


def test_streams_that_are_no_descriptors_show_what_is_said(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = io.StringIO()
    monkeypatch.setattr(sys, "stdout", notebook)
    with shown(run, "auto"):
        say("said")
        print("noise")
    assert notebook.getvalue() == "said\n"
    assert sys.stdout is notebook


def test_a_run_in_which_nothing_was_printed_leaves_no_file(run: RunDirectory) -> None:
    with shown(run, "auto"):
        pass
    assert not Path(run.path("logs")).exists()


def test_a_directory_with_such_a_file_alone_is_no_foreign_one(run: RunDirectory) -> None:
    """A run that a cluster's nodes were too small for has printed, and has no configuration yet."""
    with pytest.raises(UserError):
        run_that_prints(run, "noise", UserError("ray.num_cpus: expected more"))
    assert run.list_files(LIBRARIES)
    check_config(run, Config())
    run.write_text("thesis.txt", "")
    with pytest.raises(UserError, match="not a run directory"):
        check_config(run, Config())


def test_the_newest_are_kept(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    for second in range(MOST_KEPT + 2):
        monkeypatch.setattr(library_output.time, "strftime", lambda *_, now=second: f"2026-01-01T00000{now}Z")
        with shown(run, "auto"):
            print(f"run {second}")
    names = [name[:18] for name in run.list_files(LIBRARIES)]
    assert names == [f"2026-01-01T00000{second}Z" for second in range(2, MOST_KEPT + 2)]


def test_an_object_store_gets_the_file_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run("memory://a-run-of-libraries")
    try:
        with shown(run, "auto"):
            print(f"noise {SECRET}")
            assert run.list_files(LIBRARIES) == {}
        (name,) = run.list_files(LIBRARIES)
        text = str(run.read_text(f"{LIBRARIES}/{name}"))
        assert text.startswith("noise ")
        assert "Ab1Ab1" not in text
    finally:
        fsspec.filesystem("memory").rm("/a-run-of-libraries", recursive=True)


def test_only_the_last_lines_are_shown(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError):
        run_that_prints(run, "\n".join(f"line {number}" for number in range(1000)), RuntimeError("it broke"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + LINES_SHOWN
    assert lines[-1] == "  line 999"


@pytest.mark.parametrize("fail", [OSError("disk full"), UserError("disk full")])
def test_a_file_that_cannot_be_kept_hides_no_error(
    fail: Exception, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(*_: object) -> None:
        raise fail

    write: Callable[..., None] = no_room
    monkeypatch.setattr(RunDirectory, "write_text", write)
    with pytest.raises(RuntimeError, match="it broke"):
        run_that_prints(run, "noise", RuntimeError("it broke"))
    assert "  noise" in capsys.readouterr().err
