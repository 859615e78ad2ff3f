"""A disk that is full and a directory that may not be used: what is said, and that nothing half-written stays.

Small disks are tmpfs in a mount namespace; where a test may not mount one, a limit on the size of files stands in,
which is another error (EFBIG) at the same place. Permissions are tried as another user, since root has every one.

python -m pytest tests/unit/storage/test_local_faults.py
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mipo_ray.storage.faults import StorageFault, full_disk, named
from mipo_ray.storage.local_files import append_whole

SCRIPT = """
import os, resource, signal, sys
import pyarrow, pyarrow.parquet
from mipo_ray.config.recipe import load_config
from mipo_ray.errors import UserError
from mipo_ray.monitoring.events import Events
from mipo_ray.session import Session
from mipo_ray.storage.local_files import append_whole
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import open_run
from tests.helpers.stages import commit

class Unheard(Events):
    def at(self, *_): return self
    def emit(self, _): pass
    def flush(self): pass

place, CONFIG = sys.argv[1], load_config()
run = open_run(place + "/run")
stage = Session(CONFIG, run, None, Unheard(None)).stage(Round(0), "generate")
ROWS = pyarrow.table({"text": [os.urandom(50).hex() for _ in range(1000)]})

def attempt(name, work):
    try:
        print(name, "|", work())
    except UserError as error:
        print(name, "|", type(error).__name__, error)

def generate():
    with stage.reported():
        pyarrow.parquet.write_table(ROWS, stage.path("pairs.parquet"), filesystem=run.arrow_filesystem())
    commit(run, stage.directory, CONFIG)
"""
FULL = """
run.write_text("metrics.jsonl", "before\\n")
os.makedirs(stage.path())
with open(place + "/ballast", "wb", buffering=0) as ballast:
    try:
        while True:
            ballast.write(bytes(1024))
    except OSError:
        pass
attempt("text", lambda: run.write_text("results.json", "x" * 9000))
attempt("parquet", generate)
attempt("finished", lambda: run.is_finished(stage.directory))
try:
    append_whole(run.path("metrics.jsonl"), "x" * 9000)
except OSError as error:
    print("append |", error.strerror, repr(open(run.path("metrics.jsonl")).read()))
os.remove(place + "/ballast")
attempt("again", generate)
attempt("finished", lambda: run.is_finished(stage.directory))
print("files |", sorted(run.list_files("")))
"""
LIMITED = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
os.makedirs(stage.path())
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
attempt("text", lambda: run.write_text("results.json", "x" * 9000))
attempt("parquet", generate)
attempt("finished", lambda: run.is_finished(stage.directory))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
attempt("again", generate)
attempt("finished", lambda: run.is_finished(stage.directory))
print("files |", sorted(run.list_files("")))
"""
DENIED = """
os.makedirs(stage.path())
run.write_text("config.yaml", "a: 1")
generate()
os.chmod(stage.path(), 0)
os.chmod(run.root, 0o555)
attempt("read", lambda: run.read_text(stage.directory + "/manifest.json"))
attempt("manifest", lambda: run.is_finished(stage.directory))
attempt("list", lambda: run.list_files(""))
attempt("write", lambda: run.write_text("results.json", "{}"))
attempt("remove", lambda: run.remove(stage.directory))
attempt("start", run.check_writable)
os.chmod(run.root, 0o755)
os.chmod(stage.path(), 0o755)
attempt("finished", lambda: run.is_finished(stage.directory))
"""


def run_script(script: str, place: Path, *before: str) -> dict[str, str]:
    """What each attempt of the script came to; of two of one name the last."""
    command = [*before, sys.executable, "-c", SCRIPT + script, str(place)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ", 1) for line in done.stdout.splitlines() if " | " in line]
    return dict(lines)


def check_finished_later(found: dict[str, str], place: Path) -> None:
    run = place / "run"
    assert found["text"].startswith(f"StorageFault {run}/results.json: cannot be written: [Errno ")
    assert found["parquet"].startswith(f"StorageError {run}/rounds/000/generate: cannot be finished: ")
    assert found["again"] == "None"
    assert found["finished"] == "True"
    assert ".writing" not in found["files"]


def test_a_full_disk_is_named_and_the_stage_goes_on_once_there_is_space(tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=512k tmpfs "{tmp_path}"'
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*unshare, mount], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine does not let a test mount a small disk; the limit on files' sizes stands in")
    found = run_script(FULL, tmp_path, *unshare, f'{mount} && exec "$0" "$@"')
    check_finished_later(found, tmp_path)
    for name in ("text", "parquet"):
        assert "No space left on device" in found[name]
        assert "The disk is full: free some space on it" in found[name]
    assert found["append"] == "No space left on device 'before\\n'"  # nothing of it, not a part


def test_a_limit_on_the_size_of_files_is_named(tmp_path: Path) -> None:
    found = run_script(LIMITED, tmp_path)
    check_finished_later(found, tmp_path)
    for name in ("text", "parquet"):
        assert "File too large" in found[name]
        assert "raise the limit (ulimit -f)" in found[name]


def test_a_directory_that_may_not_be_used_is_named_and_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    as_nobody = []
    if os.geteuid() == 0:
        tmp_path.chmod(0o777)
        for directory in tmp_path.parents:  # of which pytest's own are for their owner alone
            if Path(tempfile.gettempdir()) in directory.parents:
                directory.chmod(0o711)
        as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    found = run_script(DENIED, tmp_path, *as_nobody)
    stage = f"{tmp_path}/run/rounds/000/generate"
    for name, place, done in (
        ("read", f"{stage}/manifest.json", "read"),
        ("manifest", f"{stage}/manifest.json", "read"),
        ("list", f"{tmp_path}/run", "listed"),
        ("write", f"{tmp_path}/run/results.json", "written"),
        ("remove", stage, "removed"),
    ):
        assert found[name].startswith(f"StorageFault {place}: cannot be {done}: [Errno 13] Permission denied. ")
        assert "must be allowed to list, read, write and delete there" in found[name]
        assert "Remove" not in found[name]
    assert found["start"].startswith(f"StorageError {tmp_path}/run: cannot write to the run directory: PermissionError")
    assert found["finished"] == "True"


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "The disk is full"),
        (errno.EDQUOT, "The disk is full"),
        (errno.EROFS, "The filesystem can only be read"),
        (errno.EIO, "The disk, or the machine that serves it, failed"),
        (errno.ESTALE, "The disk, or the machine that serves it, failed"),  # of NFS
        (errno.ENAMETOOLONG, "The storage refused it"),
    ],
)
def test_every_fault_of_a_disk_has_its_advice(number: int, advice: str) -> None:
    message = rf"^runs/a: cannot be written: \[Errno {number}\] .*\. {advice}"
    with pytest.raises(StorageFault, match=message), named("runs/a", "written"):
        raise OSError(number, os.strerror(number), "runs/a")


def test_what_is_no_fault_of_storage_stays_what_it_is() -> None:
    for error in (FileNotFoundError(errno.ENOENT, "gone"), IsADirectoryError(errno.EISDIR, "a"), RuntimeError("a")):
        with pytest.raises(type(error)) as caught, named("runs/a", "read"):
            raise error
        assert caught.value is error


def test_a_full_disk_is_found_below_what_was_made_of_it() -> None:
    class FailedTask(Exception):
        cause = OSError(errno.ENOSPC, "No space left on device")

    assert str(full_disk(FailedTask())).startswith("[Errno 28] No space left on device. The disk is full")
    assert full_disk(RuntimeError("diverged")) is None
    assert full_disk(PermissionError(errno.EACCES, "not this one")) is None  # of whatever a worker opened


def test_lines_are_appended(tmp_path: Path) -> None:
    for line in ("é\n", "second\n"):
        append_whole(str(tmp_path / "new/metrics.jsonl"), line)
    assert (tmp_path / "new/metrics.jsonl").read_text() == "é\nsecond\n"
