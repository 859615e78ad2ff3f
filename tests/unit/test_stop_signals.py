"""Ctrl-C and SIGTERM: one line, the lock given up, the exit code that shells expect. Real processes, without Ray.

python -m pytest tests/unit/test_stop_signals.py
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mipo_ray.stop_signals import stop_signals, thread_beside
from tests.helpers.tiny_model import make_tiny_model

STOPS = [signal.SIGINT, signal.SIGTERM]

# In place of the cluster that the command would join: it is asked to stop there, and once more while it tidies up.
COMMAND = """
import os, signal, sys, time
from mipo_ray import run
from mipo_ray.terminal import say

def fake_connect(config):
    say("connecting")
    try:
        time.sleep(600)
    finally:
        if int(sys.argv[1]) == signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)

run.connect = fake_connect
sys.exit(run.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("stopped")
    model = make_tiny_model(directory / "model")
    rows = [{"prompt": f"Question {index}?", "context": f"I am user {index}."} for index in range(8)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "recipe.yaml").write_text("{}")
    return [
        str(directory / "recipe.yaml"),
        f"model.path={model}",
        f"prompts.path={directory}/prompts.jsonl",
        "evaluate.enabled=false",
        "generation.sampling.max_tokens=8",
    ]


@contextlib.contextmanager
def started(*arguments: str, until: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has printed a line with these words."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert until in line, line + process.communicate()[1]
            yield process
        finally:
            process.kill()


def stop_and_check(process: subprocess.Popen[str], stop: signal.Signals) -> None:
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert errors == f"stopped by {stop.name}: the same command resumes this run\n"
    assert process.returncode == 128 + stop


@pytest.mark.parametrize("stop", STOPS)
def test_a_stopped_run_gives_its_directory_up(stop: signal.Signals, options: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started("-c", COMMAND, str(int(stop)), *options, f"run_dir={run}", until="connecting") as process:
        assert (run / "lock.json").exists()
        stop_and_check(process, stop)
    assert list(run.iterdir()) == []


@pytest.mark.parametrize("stop", STOPS)
def test_a_run_that_waits_for_the_directory_leaves_it_to_its_holder(
    stop: signal.Signals, options: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lock = json.dumps({"host": "elsewhere", "pid": 1, "process_start": 5, "heartbeat": time.time()})
    (run / "lock.json").write_text(lock)
    with started("-m", "mipo_ray.run", *options, f"run_dir={run}", until="to see whether it still does") as process:
        stop_and_check(process, stop)
    assert (run / "lock.json").read_text() == lock


DESTRUCTOR = """
import time
from mipo_ray.stop_signals import stop_signals

class Slow:
    def __del__(self):
        print("in a destructor", flush=True)
        time.sleep(60)

with stop_signals() as signals:
    try:
        Slow()
        time.sleep(60)
    except KeyboardInterrupt:
        print("stopped by", signals.received.name)
"""


@pytest.mark.parametrize("stop", STOPS)
def test_a_signal_in_a_destructor_is_not_lost(stop: signal.Signals) -> None:
    """What is raised there Python prints and forgets."""
    with started("-c", DESTRUCTOR, until="in a destructor") as process:
        process.send_signal(stop)
        output, errors = process.communicate(timeout=30)
    assert (output, errors) == (f"stopped by {stop.name}\n", "")


def test_a_signal_that_the_process_was_told_to_ignore_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_signals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert signals.received is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("fails", [False, True])
def test_a_thread_beside_a_block_ends_with_it(fails: bool) -> None:
    seen = []

    def work(stop: threading.Event) -> None:
        seen.append(threading.current_thread().name)
        stop.wait(60)
        seen.append("ended")

    with contextlib.suppress(ValueError), thread_beside(work, "watch"):
        if fails:
            raise ValueError
    assert seen == ["watch", "ended"]
    assert "watch" not in {thread.name for thread in threading.enumerate()}
