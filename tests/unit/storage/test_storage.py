"""The run directory: commits, damage, other configurations, locks, full and read-only storage.

python -m pytest tests/unit/storage/test_storage.py
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.config.recipe import config_hash, load_config
from mipo_ray.monitoring.events import NO_EVENTS, read_events
from mipo_ray.ray_cluster.resources import Resources
from mipo_ray.session import Session, StageReport
from mipo_ray.storage import lock as run_lock
from mipo_ray.storage.configuration import check_config, record_config
from mipo_ray.storage.lock import STALE_LOCK_SECONDS, hold_lock
from mipo_ray.storage.manifests import GenerateFacts
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory, StorageError, open_run
from tests.helpers.stages import FACTS, commit

CONFIG = load_config()
STAGE = "rounds/000/generate"
RESOURCES = Resources(on_gpu=False, dtype="float32", gpus_per_engine=0.0, gpus_per_worker=0.0)


class FakeFullFileSystem(MemoryFileSystem):
    """An object store whose space ends after some writes; a file that is being uploaded then stays cut off."""

    protocol = "full"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    writes_left: ClassVar[float] = float("inf")

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return MemoryFileSystem._strip_protocol(str(path).replace("full://", "memory://"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> Any:
        self._count()
        return super().pipe_file(path, value, mode=mode, **kwargs)

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        content = Path(lpath).read_bytes()
        try:
            self._count()
        except OSError:
            super().pipe_file(rpath, content[: len(content) // 2])
            raise
        super().pipe_file(rpath, content)

    def _count(self) -> None:
        cls = type(self)
        cls.writes_left -= 1
        if cls.writes_left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(autouse=True)
def empty_stores() -> None:
    fsspec.register_implementation("full", FakeFullFileSystem, clobber=True)
    for store in (MemoryFileSystem, FakeFullFileSystem):
        store.store.clear()
        store.pseudo_dirs[:] = [""]
    FakeFullFileSystem.writes_left = float("inf")


@pytest.fixture(params=["local", "file", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunDirectory:
    """A run directory on a local path, on a file:// URL, and on a filesystem that is not local."""
    urls = {"local": str(tmp_path / "run"), "file": f"file://{tmp_path}/run", "memory": "memory://bucket/some/run"}
    return open_run(urls[request.param])


@pytest.fixture
def local_run(tmp_path: Path) -> RunDirectory:
    return open_run(str(tmp_path / "run"))


def names(run: RunDirectory) -> set[str]:
    return set(run.list_files(""))


# Files and stages.


def test_text_is_read_as_written(run: RunDirectory) -> None:
    assert run.read_text("notes/one.txt") is None
    assert run.modified("notes/one.txt") is None
    run.write_text("notes/one.txt", "é\n")
    run.write_text("notes/one.txt", "ü\n")
    assert run.read_text("notes/one.txt") == "ü\n"
    assert run.modified("notes/one.txt") is not None
    assert run.list_files("notes") == {"one.txt": 3}
    assert names(run) == {"notes/one.txt"}


def test_a_stage_is_finished_once_it_is_committed(run: RunDirectory) -> None:
    run.write_text(f"{STAGE}/pairs.parquet", "four")
    run.write_text(f"{STAGE}/deep/er.txt", "sixsix")
    assert run.read_manifest(STAGE, GenerateFacts) is None
    committed = commit(run, STAGE, CONFIG, seconds=1.5, rows_per_block=7)
    manifest = run.read_manifest(STAGE, GenerateFacts)
    assert manifest == committed
    assert manifest.files == {"deep/er.txt": 6, "pairs.parquet": 4}
    assert (manifest.seed, manifest.config_hash, manifest.facts.rows_per_block) == (0, config_hash(CONFIG), 7)
    assert not run.is_finished("rounds/001/generate")


def test_a_commit_can_be_restricted_to_some_files(run: RunDirectory) -> None:
    run.write_text(f"{STAGE}/pairs.parquet", "four")
    run.write_text(f"{STAGE}/checkpoint/state", "x")
    commit(run, STAGE, CONFIG, files=["pairs.parquet"])
    run.write_text(f"{STAGE}/checkpoint/state", "another size")
    manifest = run.read_manifest(STAGE, GenerateFacts)
    assert manifest is not None
    assert manifest.files == {"pairs.parquet": 4}


@pytest.mark.parametrize("damage", ["missing", "short", "manifest"])
def test_a_damaged_stage_is_refused_by_name(run: RunDirectory, damage: str) -> None:
    run.write_text(f"{STAGE}/pairs.parquet", "content")
    commit(run, STAGE, CONFIG)
    if damage == "missing":
        run.filesystem.rm_file(run.path(STAGE, "pairs.parquet"))
        expected = "expected 7 bytes, found nothing"
    elif damage == "short":
        run.write_text(f"{STAGE}/pairs.parquet", "con")
        expected = "expected 7 bytes, found 3 bytes"
    else:
        run.write_text(f"{STAGE}/manifest.json", '{"stage": ')
        expected = "expected JSON"
    with pytest.raises(StorageError) as caught:
        run.read_manifest(STAGE, GenerateFacts)
    name = "manifest.json" if damage == "manifest" else "pairs.parquet"
    assert str(caught.value).startswith(f"{run.path(STAGE, name)}: ")
    assert expected in str(caught.value)
    assert f"Remove {run.path(STAGE)}" in str(caught.value)


def test_a_write_that_was_killed_is_no_part_of_the_stage(local_run: RunDirectory) -> None:
    local_run.write_text(f"{STAGE}/pairs.parquet", "content")
    # Between writing the temporary file and renaming it, the process was killed; the next one commits.
    Path(local_run.path(STAGE, "manifest.json.writing")).write_text('{"stage"')
    commit(local_run, STAGE, CONFIG)
    manifest = local_run.read_manifest(STAGE, GenerateFacts)
    assert manifest is not None
    assert manifest.files == {"pairs.parquet": 7}


def test_removing_what_is_not_there_is_no_error(run: RunDirectory) -> None:
    run.remove(STAGE)
    run.write_text(f"{STAGE}/a/b", "x")
    run.write_text("rounds/000/train/c", "x")
    run.remove(STAGE)
    assert names(run) == {"rounds/000/train/c"}


def test_local_output_arrives_in_the_run_directory(run: RunDirectory) -> None:
    with run.local_output("rounds/000/train/policy") as directory:
        os.makedirs(f"{directory}/sub", exist_ok=True)
        Path(directory, "config.json").write_text("{}")
        Path(directory, "sub", "weights").write_bytes(b"\0\1\2")
    assert run.list_files("rounds/000/train/policy") == {"config.json": 2, "sub/weights": 3}


def test_output_of_a_block_that_failed_is_not_uploaded() -> None:
    run = open_run("memory://bucket/run")

    def train() -> None:
        with run.local_output("policy") as directory:
            Path(directory, "weights").write_bytes(b"half")
            raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        train()
    assert names(run) == set()


def test_a_model_is_named_so_that_another_machine_finds_it(tmp_path: Path) -> None:
    assert open_run("memory://bucket/run/").model_path("rounds/000/train/policy") == (
        "memory://bucket/run/rounds/000/train/policy"
    )
    assert open_run(str(tmp_path / "run")).model_path("p") == str(tmp_path / "run" / "p")
    assert open_run(f"file://{tmp_path}/run").model_path("p") == str(tmp_path / "run" / "p")


def test_stages_are_named_by_round() -> None:
    run = open_run("memory://bucket/run")
    assert run.stage(BASE, "evaluate") == "base/evaluate"
    assert run.stage(Round(12), "train") == "rounds/012/train"


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.integers(1, 40), max_size=4),
    uploads=st.lists(st.integers(2, 40), max_size=4),
    writes=st.integers(0, 10),
)
def test_no_interruption_makes_an_incomplete_stage_look_finished(
    tmp_path_factory: pytest.TempPathFactory, texts: list[int], uploads: list[int], writes: int
) -> None:
    FakeFullFileSystem.store.clear()
    source = tmp_path_factory.mktemp("upload")
    for index, size in enumerate(uploads):
        (source / f"upload-{index}").write_bytes(b"u" * size)
    run = open_run("full://bucket/run")

    def work() -> None:
        run.remove(STAGE)
        for index, size in enumerate(texts):
            run.write_text(f"{STAGE}/text-{index}", "t" * size)
        run.upload(str(source), STAGE)
        commit(run, STAGE, CONFIG)

    expected = {f"text-{index}": size for index, size in enumerate(texts)}
    expected |= {f"upload-{index}": size for index, size in enumerate(uploads)}
    FakeFullFileSystem.writes_left = writes
    with contextlib.suppress(StorageError):
        work()
    manifest = run.read_manifest(STAGE, GenerateFacts)
    assert (manifest is not None) == (writes >= len(texts) + len(uploads) + 1)
    if manifest is None:
        FakeFullFileSystem.writes_left = float("inf")
        work()
        manifest = run.read_manifest(STAGE, GenerateFacts)
    assert manifest is not None
    present = run.list_files(STAGE)
    del present["manifest.json"]
    assert manifest.files == present == expected


# Which configuration a directory belongs to.


def test_a_new_directory_takes_any_configuration(run: RunDirectory) -> None:
    check_config(run, CONFIG)
    record_config(run, CONFIG)
    record_config(run, load_config(overrides=["train.beta=0.5"]))  # no work stands under the first one
    assert "beta: 0.5" in (run.read_text("config.yaml") or "")


def test_another_configuration_over_finished_work_is_refused_with_the_difference(run: RunDirectory) -> None:
    record_config(run, CONFIG)
    run.write_text(f"{STAGE}/pairs.parquet", "content")
    other = load_config(overrides=["train.beta=0.2", "prompts.limit=8", "generation.pool.max_size=3"])
    for check in (check_config, record_config):
        with pytest.raises(StorageError) as caught:
            check(run, other)
        message, *changes = str(caught.value).splitlines()
        assert message.startswith(f"{run.url}: this run directory holds work of another configuration")
        assert changes == ["  prompts.limit: None there, 8 now", "  train.beta: 0.1 there, 0.2 now"]
    assert "beta: 0.1" in (run.read_text("config.yaml") or "")


def test_a_field_that_an_earlier_version_did_not_have_counts_as_its_default(run: RunDirectory) -> None:
    record_config(run, CONFIG)
    run.write_text(f"{STAGE}/pairs.parquet", "content")
    earlier = yaml.safe_load(run.read_text("config.yaml") or "")
    del earlier["prompts"]["template_arguments"], earlier["filters"]["control_tokens"]
    run.write_text("config.yaml", yaml.safe_dump(earlier))
    check_config(run, CONFIG)
    with pytest.raises(StorageError, match=r"filters\.control_tokens: True there, False now"):
        check_config(run, load_config(overrides=["filters.control_tokens=false"]))


def test_the_primary_measure_stays_what_was_named_before_there_was_work(run: RunDirectory) -> None:
    record_config(run, load_config(overrides=["evaluate.primary=pmi_initial"]))
    record_config(run, load_config(overrides=["evaluate.primary=infonce_initial"]))
    run.write_text("base/evaluate/manifest.json", "content")
    with pytest.raises(StorageError, match=r"evaluate\.primary: 'infonce_initial' there, 'pmi_initial' now"):
        check_config(run, load_config(overrides=["evaluate.primary=pmi_initial"]))
    check_config(run, load_config(overrides=["evaluate.primary=infonce_initial"]))
    # A run that an earlier version began names none.
    earlier = yaml.safe_load(run.read_text("config.yaml") or "")
    del earlier["evaluate"]["primary"]
    run.write_text("config.yaml", yaml.safe_dump(earlier))
    check_config(run, load_config(overrides=["evaluate.primary=context_pmi_initial"]))


def test_rounds_may_grow_and_the_cluster_may_change(run: RunDirectory) -> None:
    record_config(run, CONFIG)
    run.write_text(f"{STAGE}/pairs.parquet", "content")
    record_config(run, load_config(overrides=["rounds=9", "generation.pool.max_size=3", "ray.address=auto"]))
    assert "rounds: 9" in (run.read_text("config.yaml") or "")


def test_a_directory_of_something_else_is_refused(run: RunDirectory) -> None:
    run.write_text("thesis.txt", "do not overwrite")
    with pytest.raises(StorageError, match=r"not empty and without a config\.yaml"):
        record_config(run, CONFIG)
    assert names(run) == {"thesis.txt"}


@pytest.mark.parametrize("name", [".probe-17", "config.yaml.writing", "lock.json", "lock.json.writing"])
def test_what_a_kill_at_the_start_leaves_behind_does_not_stop_the_next_run(local_run: RunDirectory, name: str) -> None:
    os.makedirs(local_run.root)
    Path(local_run.path(name)).write_text("")
    record_config(local_run, CONFIG)


@pytest.mark.parametrize("content", ["", "- a list\n", "train: [1\n", "just text"])
def test_a_config_file_that_is_none_is_named(run: RunDirectory, content: str) -> None:
    run.write_text("config.yaml", content)
    with pytest.raises(StorageError) as caught:
        check_config(run, CONFIG)
    assert str(caught.value).startswith(f"{run.path('config.yaml')}: expected the configuration of a run")


# Storage that cannot be written.


def test_storage_that_can_be_written_is_left_as_it_was(run: RunDirectory) -> None:
    run.check_writable()
    assert names(run) == set()


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = open_run(str(tmp_path / "file" / "run"))
    with pytest.raises(StorageError) as caught:
        run.check_writable()
    assert str(caught.value).startswith(f"{run.url}: cannot write to the run directory: ")
    assert "Not a directory" in str(caught.value)


def test_a_read_only_filesystem_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("run/a", "a")
    with pytest.raises(StorageError, match=r"cannot write to the run directory: \w+"):
        open_run(f"zip://run::{tmp_path}/archive.zip").check_writable()


@pytest.mark.parametrize("url", ["nosuchscheme://bucket/run", "zip://run::/no/such/archive.zip"])
def test_a_url_that_no_filesystem_serves_is_refused(url: str) -> None:
    with pytest.raises(StorageError) as caught:
        open_run(url)
    assert str(caught.value).startswith(f"{url}: no filesystem for this URL: ")


def test_a_full_object_store_is_refused_and_can_be_used_once_there_is_space() -> None:
    run = open_run("full://bucket/run")
    FakeFullFileSystem.writes_left = 0
    with pytest.raises(StorageError, match="No space left on device"):
        run.check_writable()
    FakeFullFileSystem.writes_left = float("inf")
    run.check_writable()
    record_config(run, CONFIG)
    assert names(run) == {"config.yaml"}


FULL_DISK = """
import os, sys
from mipo_ray.config.recipe import load_config
from mipo_ray.storage.configuration import record_config
from mipo_ray.storage.run_directory import StorageError, open_run
run = open_run(sys.argv[1] + "/run")
def attempt(work):
    try:
        work()
        print("no error")
    except StorageError as error:
        print(error)
    print(sorted(run.list_files("")))
attempt(run.check_writable)
try:
    with open(sys.argv[1] + "/ballast", "wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(1024))
except OSError:
    pass
attempt(run.check_writable)
attempt(lambda: run.write_text("config.yaml", "x" * 5000))
os.remove(sys.argv[1] + "/ballast")
attempt(lambda: record_config(run, load_config()))
"""


def test_a_full_disk_is_refused(tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=64k tmpfs "{tmp_path}"'
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*unshare, mount], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine does not let a test mount a small disk; FakeFullFileSystem covers the rest")
    command = f'{mount} && "{sys.executable}" -c "$0" "{tmp_path}"'
    done = subprocess.run([*unshare, command, FULL_DISK], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "the disk is full: expected at least 67,108,864 free bytes, found" in lines[0]
    assert lines[2].startswith(f"{tmp_path}/run: cannot write to the run directory: OSError: [Errno 28] No space left")
    assert lines[4].startswith(f"{tmp_path}/run/config.yaml: cannot be written: [Errno 28] No space left")
    assert lines[1] == lines[3] == lines[5] == "[]"
    assert lines[6:] == ["no error", "['config.yaml']"]


# One process at a time.

HOLD = """
import sys
from mipo_ray.storage.lock import hold_lock
from mipo_ray.storage.run_directory import open_run
run = open_run(sys.argv[1])
run.check_writable()
with hold_lock(run):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(local_run: RunDirectory) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `local_run` until its input ends."""
    command = [sys.executable, "-c", HOLD, local_run.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def write_lock(run: RunDirectory, **changes: Any) -> None:
    lock = {"host": "elsewhere", "pid": 1, "process_start": 5, "heartbeat": time.time(), **changes}
    run.write_text("lock.json", json.dumps(lock))


def test_a_lock_ends_with_its_block(run: RunDirectory) -> None:
    run.check_writable()
    for _ in range(2):
        with hold_lock(run):
            assert names(run) == {"lock.json"}
        assert names(run) == set()
    with pytest.raises(RuntimeError, match="failed"), hold_lock(run):
        raise RuntimeError("failed")
    assert names(run) == set()


def test_a_second_holder_is_refused(run: RunDirectory) -> None:
    run.check_writable()
    with hold_lock(run):
        with (
            pytest.raises(StorageError, match=f"in use by process {os.getpid()} on {socket.gethostname()}"),
            hold_lock(run),
        ):
            pass
        assert names(run) == {"lock.json"}


def test_a_second_process_is_refused(local_run: RunDirectory, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(StorageError, match=f"in use by process {holder.pid} on "), hold_lock(local_run):
        pass
    holder.communicate(timeout=30)
    with hold_lock(local_run):
        pass


def test_a_process_that_is_only_stopped_keeps_its_lock(local_run: RunDirectory, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGSTOP)
    lock = json.loads(local_run.read_text("lock.json") or "")
    local_run.write_text("lock.json", json.dumps({**lock, "heartbeat": time.time() - 10 * STALE_LOCK_SECONDS}))
    with pytest.raises(StorageError, match=f"in use by process {holder.pid} on "), hold_lock(local_run):
        pass


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_killed_process_is_taken_over_at_once(
    local_run: RunDirectory, holder: subprocess.Popen[str], reaped: bool
) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    if reaped:
        holder.wait()
    else:  # it stays as a zombie, as it does in a container without an init process
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    age = time.time() - json.loads(local_run.read_text("lock.json") or "")["heartbeat"]
    assert age < STALE_LOCK_SECONDS
    with hold_lock(local_run):
        assert json.loads(local_run.read_text("lock.json") or "")["pid"] == os.getpid()
    assert names(local_run) == set()


def test_a_reused_process_id_is_not_taken_for_the_holder(local_run: RunDirectory) -> None:
    local_run.check_writable()
    with hold_lock(local_run):
        own = json.loads(local_run.read_text("lock.json") or "")
    write_lock(local_run, **{**own, "process_start": own["process_start"] - 1})
    with hold_lock(local_run):
        pass


class FakeClock:
    """Time that passes only where it is slept through; `when` says what happens at a second."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        self.when: dict[int, Callable[[], None]] = {}
        patch.setattr(run_lock, "time", SimpleNamespace(time=self.time, monotonic=self.monotonic, sleep=self.sleep))

    def time(self) -> float:
        return 1e9 + self.seconds

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        for second in [second for second in self.when if second <= self.seconds]:
            self.when.pop(second)()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock(monkeypatch)


def test_a_lock_of_another_host_is_refused_when_its_heart_beats(
    run: RunDirectory, clock: FakeClock, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lock(run, heartbeat=clock.time() - 3)
    clock.when = {7: lambda: write_lock(run, heartbeat=clock.time())}
    with pytest.raises(StorageError, match=r"in use by process 1 on elsewhere \(heartbeat 0 s ago\)"), hold_lock(run):
        pass
    assert clock.seconds < 9
    assert json.loads(run.read_text("lock.json") or "")["host"] == "elsewhere"
    assert capsys.readouterr().out == (
        f"{run.url}: process 1 on elsewhere held this run directory 3 s ago; waiting up to 57 s to see whether it "
        "still does\n"
    )


# The clock of a host may be ahead of another's.
@pytest.mark.parametrize(("age", "waited"), [(20, 40), (-500, 60)])
def test_the_lock_of_a_host_that_has_just_died_is_taken_over_when_it_is_stale(
    age: int, waited: int, run: RunDirectory, clock: FakeClock
) -> None:
    write_lock(run, heartbeat=clock.time() - age)
    with hold_lock(run):
        assert json.loads(run.read_text("lock.json") or "")["pid"] == os.getpid()
        assert clock.seconds == pytest.approx(waited, abs=1)
    assert names(run) == set()


def test_a_lock_that_is_given_up_meanwhile_is_taken(run: RunDirectory, clock: FakeClock) -> None:
    write_lock(run, heartbeat=clock.time())
    clock.when = {4: lambda: run.filesystem.rm_file(run.path("lock.json"))}
    with hold_lock(run):
        assert json.loads(run.read_text("lock.json") or "")["pid"] == os.getpid()
        assert clock.seconds < 6


def test_of_two_that_wait_for_the_same_lock_one_gets_it(run: RunDirectory, clock: FakeClock) -> None:
    def another_takes_it() -> None:
        write_lock(run, pid=2, heartbeat=clock.time())

    write_lock(run, heartbeat=clock.time())
    clock.when = {4: another_takes_it}
    with pytest.raises(StorageError, match="in use by process 2 on elsewhere"), hold_lock(run):
        pass


def test_a_lock_that_is_being_written_is_not_taken_for_one_that_was_given_up(
    local_run: RunDirectory, clock: FakeClock
) -> None:
    write_lock(local_run, heartbeat=clock.time())
    clock.when = {
        4: lambda: local_run.write_text("lock.json", '{"host": "el'),
        6: lambda: write_lock(local_run, heartbeat=clock.time()),
    }
    with pytest.raises(StorageError, match="in use by process 1 on elsewhere"), hold_lock(local_run):
        pass


def test_a_stale_lock_of_another_host_is_taken_over(run: RunDirectory) -> None:
    write_lock(run, heartbeat=time.time() - STALE_LOCK_SECONDS - 1)
    with hold_lock(run):
        assert json.loads(run.read_text("lock.json") or "")["pid"] == os.getpid()
    assert names(run) == set()


def test_a_lock_that_another_process_took_over_is_left_to_it(run: RunDirectory) -> None:
    run.check_writable()
    with hold_lock(run):
        write_lock(run)
    assert json.loads(run.read_text("lock.json") or "")["host"] == "elsewhere"


def test_a_holder_that_stood_still_is_interrupted_once_another_has_its_lock(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_the_lock() -> None:
        with hold_lock(run):
            write_lock(run)
            time.sleep(60)
            pytest.fail("nobody interrupted")

    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.05)
    run.check_writable()
    with pytest.raises(StorageError, match="process 1 on elsewhere took this run directory over"):
        lose_the_lock()
    assert json.loads(run.read_text("lock.json") or "")["host"] == "elsewhere"


def test_ctrl_c_is_not_taken_for_a_lost_lock(run: RunDirectory) -> None:
    run.check_writable()
    with pytest.raises(KeyboardInterrupt), hold_lock(run):
        raise KeyboardInterrupt
    assert names(run) == set()


def test_nothing_is_committed_to_a_run_directory_that_another_process_has(local_run: RunDirectory) -> None:
    local_run.check_writable()
    stage = Session(CONFIG, local_run, RESOURCES, NO_EVENTS).stage(Round(0), "generate")
    local_run.write_text(f"{STAGE}/part.txt", "x")
    facts: Any = FACTS[GenerateFacts]
    with hold_lock(local_run):
        write_lock(local_run)
        with pytest.raises(StorageError, match="This process stops; the other one goes on with the run"):
            StageReport().commit(stage, facts)
        assert not local_run.is_finished(STAGE)
        local_run.filesystem.rm_file(local_run.path("lock.json"))
        StageReport().commit(stage, facts)  # by hand, so that nobody else has it
    assert local_run.is_finished(STAGE)


@pytest.mark.parametrize(
    "content",
    [
        *("", '{"host": "el', "[]", "3", '{"host": "elsewhere"}', "[" * 9999),
        '{"host": 1, "pid": "x", "process_start": 1, "heartbeat": null}',
    ],
)
def test_a_lock_that_its_killed_process_never_filled_is_taken_over(local_run: RunDirectory, content: str) -> None:
    local_run.write_text("lock.json", content)
    with hold_lock(local_run):
        assert json.loads(local_run.read_text("lock.json") or "")["pid"] == os.getpid()


# Metrics.


def test_an_event_that_a_kill_cut_off_is_left_out(run: RunDirectory) -> None:
    assert read_events(run) == []
    run.write_text("metrics.jsonl", '{"event": "stage", "step": 1}\n{"event": "sta')
    assert read_events(run) == [{"event": "stage", "step": 1}]


@pytest.mark.parametrize("name", ["what?", "a\tb", "a\nb", "a\x00b", "a\udce9b"])
def test_a_name_that_ray_data_would_not_read_back_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError, match="expected a name without question mark and control characters, found '"):
        open_run(str(tmp_path / name / "run"))


NAMES = st.text("ab=:%#[]*'\"~ü中é&+;$!@\\ .-_", min_size=1, max_size=30).filter(lambda name: name.strip("."))


@settings(max_examples=60)
@given(name=NAMES)
def test_a_run_lies_where_its_name_says(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """A commit is read back there, and nothing else comes into being beside it."""
    place = tmp_path_factory.mktemp("runs")
    run = open_run(f"{place}/{name}")
    run.check_writable()
    with hold_lock(run):
        record_config(run, CONFIG)
    run.write_text(f"{STAGE}/part.txt", "x")
    run.write_text("base/part.txt", "x")
    commit(run, STAGE, CONFIG)
    again = open_run(f"{place}/{name}")
    manifest = again.read_manifest(STAGE, GenerateFacts)
    assert manifest is not None
    assert manifest.files == {"part.txt": 1}
    check_config(again, CONFIG)
    again.remove("base")
    assert sorted(again.list_files("")) == ["config.yaml", f"{STAGE}/manifest.json", f"{STAGE}/part.txt"]
    assert os.listdir(place) == [name]


@pytest.mark.parametrize("name", ["exp [1]", "all*", "100% #1", "übung", "context=none"])
def test_a_stage_of_an_object_store_is_removed_alone(name: str) -> None:
    """Object stores' clients take a path to remove for a pattern."""
    run, other = open_run(f"memory://names/{name}"), open_run("memory://names/exp 1")
    for each in (run, other, open_run("memory://names/allies")):
        each.write_text("base/part.txt", "x")
        each.write_text("rounds/part.txt", "x")
    run.remove("base")
    assert list(run.list_files("")) == ["rounds/part.txt"]
    assert [len(open_run(f"memory://names/{one}").list_files("")) for one in ("exp 1", "allies")] == [2, 2]


def test_work_that_lies_behind_links_is_there(tmp_path: Path) -> None:
    """A run directory, a round and a file of it that were moved to another disk."""
    run = open_run(str(tmp_path / "run"))
    run.write_text(f"{STAGE}/part.txt", "abc")
    commit(run, STAGE, CONFIG)
    (tmp_path / "disk").mkdir()
    (tmp_path / "run/rounds").rename(tmp_path / "disk/rounds")
    (tmp_path / "run/rounds").symlink_to(tmp_path / "disk/rounds")
    part = tmp_path / "disk" / STAGE / "part.txt"
    part.rename(tmp_path / "disk/elsewhere.txt")
    part.symlink_to(tmp_path / "disk/elsewhere.txt")
    (tmp_path / "disk/rounds/up").symlink_to("..")  # a ring
    (tmp_path / "disk" / STAGE / "machine").symlink_to("/")  # all that there is
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for name in ("run", "link"):
        found = open_run(str(tmp_path / name))
        manifest = found.read_manifest(STAGE, GenerateFacts)
        assert manifest is not None
        assert manifest.files == {"part.txt": 3}
        assert found.list_files(STAGE).keys() == {"manifest.json", "part.txt"}
    (tmp_path / "disk/elsewhere.txt").unlink()
    with pytest.raises(StorageError, match="expected 3 bytes, found nothing"):
        run.read_manifest(STAGE, GenerateFacts)


# Files that are none.

MALFORMED = {
    "empty": b"",
    "cut": b'{"stage": "x',
    "a list": b"[]",
    "null": b"null",
    "no text": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "a long number": b"1" * 5000,
    "a long number in a field": b'{"host": "x", "process_start": null, "heartbeat": 1, "stage": "x", "seed": 0, "pid": '
    + b"9" * 5000
    + b"}",
    "another type": b'{"host": 1, "pid": "x", "process_start": [], "heartbeat": "soon", "stage": {}, "files": 3}',
    "infinite": b'{"host": "x", "pid": 1, "process_start": null, "heartbeat": -Infinity}',
    "none": b'{"host": "x", "pid": 1, "process_start": null, "heartbeat": NaN}',
    "half a pair": b'{"host": "\\ud800", "pid": 1, "process_start": null, "heartbeat": 1, "stage": "\\ud800"}',
    "a directory": None,
}


def _place(run: RunDirectory, name: str, content: bytes | None) -> None:
    path = Path(run.path(name))
    (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("stage", ["rounds/000/train", "rounds/000/generate", "base/evaluate", "base/tasks/mine"])
def test_a_malformed_manifest_is_named(local_run: RunDirectory, stage: str, kind: str) -> None:
    name = f"{stage}/manifest.json"
    _place(local_run, name, MALFORMED[kind])
    with pytest.raises(StorageError) as refused:
        local_run.is_finished(stage)
    assert str(refused.value).startswith(f"{local_run.path(name)}: ")
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_lock_is_taken_over_or_named(
    local_run: RunDirectory, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "UNREADABLE_LOCK_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "STALE_LOCK_SECONDS", 0.1)
    _place(local_run, "lock.json", MALFORMED[kind])
    if kind in ("a directory", "no text"):
        with pytest.raises(StorageError, match=r"lock\.json: expected"), hold_lock(local_run):
            pass
    else:
        with hold_lock(local_run):
            assert json.loads(str(local_run.read_text("lock.json")))["pid"] == os.getpid()
