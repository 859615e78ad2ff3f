"""A run directory on a real S3 server that fails: what is tried again, and what is said in the end.

The server is moto's, behind a fault injector (tests/helpers/faulty_proxy.py). Waits between tries are the clients' own.

python -m pytest tests/unit/storage/test_object_store.py
"""

from __future__ import annotations

import contextlib
import pickle
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
import pytest

from mipo_ray import paths
from mipo_ray.config.recipe import load_config
from mipo_ray.storage.configuration import record_config
from mipo_ray.storage.faults import StorageFault
from mipo_ray.storage.lock import hold_lock
from mipo_ray.storage.manifests import GenerateFacts
from mipo_ray.storage.run_directory import RunDirectory, StorageError, open_run
from mipo_ray.tables.parquet import open_table
from tests.helpers.faulty_proxy import Fault, always, first, no_faults, seeded
from tests.helpers.s3_server import Bucket
from tests.helpers.stages import commit

CONFIG = load_config()
STAGE = "rounds/000/generate"
ROWS = pa.table({"prompt_id": [f"p{number}" for number in range(2000)], "text": ["some words"] * 2000})
METHODS = ["DELETE", "GET", "HEAD", "POST", "PUT"]
# What goes away by itself, and is therefore tried again.
PASSING: list[Fault] = ["unavailable", "slow_down", "internal", "cut_answer", "cut_request", "lost_answer"]


@pytest.fixture
def run(bucket: Bucket) -> RunDirectory:
    return open_run(f"{bucket.url}/some/run")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as ever, but without the waits between tries."""
    from botocore.retries.standard import ExponentialBackoff

    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that give up at once: what is said then does not depend on how long they tried."""
    config = {"connect_timeout": 1, "read_timeout": 1, "retries": {"mode": "standard", "total_max_attempts": 1}}
    monkeypatch.setattr(paths, "S3_CLIENT", paths.S3_CLIENT | {"config_kwargs": config})


def write_stage(run: RunDirectory, directory: Path) -> None:
    """A stage as the real ones write theirs: text, Parquet by Arrow, an upload, the manifest last."""
    (directory / "weights").write_bytes(bytes(range(256)) * 400)
    run.check_writable()
    record_config(run, CONFIG)
    run.remove(STAGE)
    run.write_text(f"{STAGE}/quarantine.jsonl", '{"prompt_id": "p"}\n')
    pyarrow.parquet.write_table(ROWS, run.path(STAGE, "pairs.parquet"), filesystem=run.arrow_filesystem())
    run.upload(str(directory), STAGE)
    commit(run, STAGE, CONFIG)


def check_stage(run: RunDirectory) -> None:
    """It is finished, and every file of it is as it was written."""
    manifest = run.read_manifest(STAGE, GenerateFacts)
    assert manifest is not None
    assert sorted(manifest.files) == ["pairs.parquet", "quarantine.jsonl", "weights"]
    assert open_table([run.path(STAGE, "pairs.parquet")], run.arrow_filesystem()).to_table().equals(ROWS)
    assert run.filesystem.cat_file(run.path(STAGE, "weights")) == bytes(range(256)) * 400


# Faults that pass.


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_not_noticed(
    fault: Fault, bucket: Bucket, run: RunDirectory, tmp_path: Path, quick: None
) -> None:
    """The first request of every method meets it."""
    write_stage(run, tmp_path)  # so that there is something to remove
    plans = [first(1, fault, method) for method in METHODS]
    bucket.proxy.plan = lambda request: next(filter(None, (plan(request) for plan in plans)), None)
    write_stage(run, tmp_path)
    check_stage(run)
    assert sorted((kind, method) for kind, method, _ in bucket.proxy.injected) == [(fault, name) for name in METHODS]


@pytest.mark.parametrize("seed", range(2))
def test_a_store_that_fails_in_one_of_five_requests_holds_what_was_written(
    seed: int, run: RunDirectory, bucket: Bucket, tmp_path: Path, quick: None
) -> None:
    bucket.proxy.plan = seeded(seed, 1 / 5, PASSING)
    for _ in range(3):
        write_stage(run, tmp_path)
        check_stage(run)
    assert len(bucket.proxy.injected) >= 5


def test_a_stall_ends_with_the_wait_for_an_answer_and_is_tried_again(
    bucket: Bucket, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one second in place of 15: the waits are botocore's, from the same settings."""
    config = paths.S3_CLIENT["config_kwargs"] | {"read_timeout": 1}
    monkeypatch.setattr(paths, "S3_CLIENT", paths.S3_CLIENT | {"config_kwargs": config})
    for method, act in (
        ("PUT", lambda: run.write_text("a.txt", "text")),
        ("GET", lambda: run.read_text("a.txt")),
        ("GET", lambda: run.list_files("")),
    ):
        bucket.proxy.plan = first(1, "stall", method)
        started = time.monotonic()
        act()
        assert 1 <= time.monotonic() - started < 15
    assert len(bucket.proxy.injected) == 3
    assert run.read_text("a.txt") == "text"


def test_the_settings_of_retries_are_those_that_botocore_gets(run: RunDirectory) -> None:
    run.check_writable()
    config = run.filesystem.s3.meta.config
    assert (config.connect_timeout, config.read_timeout) == (5, 15)
    assert config.retries == {"mode": "standard", "total_max_attempts": 8}
    # Also where Ray hands the filesystem to another process.
    arrow = pickle.loads(pickle.dumps(run.arrow_filesystem()))
    arrow.get_file_info(run.path("a.txt"))
    assert arrow.handler.fs.s3.meta.config.retries == config.retries


def test_a_chain_of_filesystems_has_the_settings_too(bucket: Bucket) -> None:
    bucket.ask("PUT", "a.txt", b"text")
    filesystem, path = paths.open_path(f"simplecache::{bucket.url}/a.txt")  # a copy, kept on this machine
    assert filesystem.cat_file(path) == b"text"
    assert filesystem.fs.config_kwargs == paths.S3_CLIENT["config_kwargs"]


# Faults that stay.

OPERATIONS: list[tuple[str, Callable[[RunDirectory], object]]] = [
    ("a.txt: cannot be read", lambda run: run.read_text("a.txt")),
    ("b.txt: cannot be written", lambda run: run.write_text("b.txt", "text")),
    (": cannot be listed", lambda run: run.list_files("")),
    ("a.txt: cannot be looked at", lambda run: run.modified("a.txt")),
    (": cannot be removed", lambda run: run.remove("")),
    (f"{STAGE}/manifest.json: cannot be read", lambda run: run.is_finished(STAGE)),
    # As Ray Data and Ray Train do.
    ("a.txt: cannot be read", lambda run: run.arrow_filesystem().open_input_file(run.path("a.txt"))),
    ("a.txt: cannot be looked at", lambda run: run.arrow_filesystem().get_file_info(run.path("a.txt"))),
    (
        "notes: cannot be listed",
        lambda run: run.arrow_filesystem().get_file_info(
            pyarrow.fs.FileSelector(run.path("notes"), allow_not_found=True)
        ),
    ),
    (
        "c.parquet: cannot be written",
        lambda run: pyarrow.parquet.write_table(ROWS, run.path("c.parquet"), filesystem=run.arrow_filesystem()),
    ),
]
STAYING: dict[Fault, tuple[str, str]] = {
    "denied": (
        r"AccessDenied: injected|403: Forbidden",
        "Permission was refused: .* allowed to list, read, write and d",
    ),
    # An answer to a look at a file has no body that would say more than 403.
    "skewed": (r"RequestTimeTooSkewed|403", r"clock of this machine is wrong by minutes|whose clock is wrong by min"),
    "unavailable": ("ServiceUnavailable|503", "did not answer as it should, although it was asked again"),
}


@pytest.mark.parametrize("fault", STAYING)
def test_a_fault_that_stays_is_named_with_path_operation_and_what_to_do(
    fault: Fault, bucket: Bucket, run: RunDirectory, tmp_path: Path, impatient: None
) -> None:
    run.write_text("a.txt", "text")
    (tmp_path / "weights").write_bytes(b"weights")
    bucket.proxy.plan = always(fault)
    found, advice = STAYING[fault]
    uploaded = ("up/weights: cannot be written", lambda run: run.upload(str(tmp_path), "up"))
    for message, act in (*OPERATIONS, uploaded):
        with pytest.raises(StorageFault, match=advice) as caught:
            act(run)
        text = str(caught.value)
        assert text.startswith(f"{run.root}/{message}".replace("/:", ":")), text
        assert re.search(found, text), text
        assert "the same command then goes on" in text
        assert "Remove" not in text  # what lies there is not damaged


def test_a_fault_of_the_store_is_told_as_such_when_a_run_starts(bucket: Bucket, impatient: None) -> None:
    bucket.proxy.plan = always("denied", "PUT")
    with pytest.raises(StorageError, match=r"cannot write to the run directory: PermissionError: .*Permission was ref"):
        open_run(f"{bucket.url}/run").check_writable()


def test_a_stall_without_end_is_given_up(bucket: Bucket, run: RunDirectory, impatient: None) -> None:
    """Five times by s3fs, each as often as botocore is told to (here once), for the seconds that it waits (here 1)."""
    bucket.proxy.plan = always("stall")
    started = time.monotonic()
    with pytest.raises(StorageFault, match=r"a\.txt: cannot be written: ReadTimeoutError: .*although it was asked"):
        run.write_text("a.txt", "text")
    assert time.monotonic() - started < 30
    assert len(bucket.proxy.injected) == 5


def test_a_server_that_is_not_there_is_given_up(
    bucket: Bucket, run: RunDirectory, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(StorageFault, match=r"a\.txt: cannot be written: EndpointConnectionError: "):
        run.write_text("a.txt", "text")


def test_without_credentials_it_says_so(
    bucket: Bucket, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(StorageError, match=r"NoCredentialsError: .*every node needs valid ones in its environment"):
        run.check_writable()


# A bucket that is gone.


@pytest.mark.parametrize(
    ("message", "act"),
    [
        ("a.txt: cannot be read", lambda run: run.read_text("a.txt")),
        ("a.txt: cannot be looked at", lambda run: run.modified("a.txt")),
        (f"{STAGE}/manifest.json: cannot be read", lambda run: run.is_finished(STAGE)),
        (": cannot be listed", lambda run: run.list_files("")),
        ("b.txt: cannot be written", lambda run: run.write_text("b.txt", "text")),
        (
            "c.parquet: cannot be written",
            lambda run: pyarrow.parquet.write_table(ROWS, run.path("c.parquet"), filesystem=run.arrow_filesystem()),
        ),
    ],
)
def test_a_bucket_that_is_gone_is_no_empty_run(
    message: str, act: Callable[[RunDirectory], object], bucket: Bucket
) -> None:
    run = open_run(f"{bucket.url}/run")
    bucket.ask("DELETE")
    with pytest.raises(StorageFault, match=r"bucket does not exist\. Make the bucket again or name the one") as caught:
        act(run)
    assert str(caught.value).startswith(f"{run.root}/{message}".replace("/:", ":"))


def test_a_bucket_that_is_gone_is_not_made_again(bucket: Bucket, run: RunDirectory, tmp_path: Path) -> None:
    """An empty one would look like a new run, which would begin from its first round."""
    (tmp_path / "weights").write_bytes(b"weights")
    bucket.ask("DELETE")
    with pytest.raises(StorageError, match=r"cannot write to the run directory: .*bucket does not exist"):
        run.check_writable()
    with pytest.raises(StorageFault, match=r"weights: cannot be written: NoSuchBucket: "):
        run.upload(str(tmp_path), STAGE)
    run.arrow_filesystem().create_dir(run.path(STAGE))
    with pytest.raises(StorageFault, match="NoSuchBucket"):
        run.list_files("")
    assert "PUT" not in {request.method for request in bucket.proxy.requests if request.path == f"/{bucket.name}"}


def test_a_file_that_is_not_there_is_none_where_one_may_not_ask_for_the_bucket(bucket: Bucket) -> None:
    """Credentials may be good for the run directory alone."""
    bucket.proxy.plan = lambda request: "denied" if request.path == f"/{bucket.name}" else None
    run = open_run(f"{bucket.url}/run")
    assert run.read_text("a.txt") is None
    assert run.modified("a.txt") is None
    assert bucket.proxy.injected


# Writes that are cut short.


def test_nothing_that_is_half_written_looks_finished(bucket: Bucket, tmp_path: Path, impatient: None) -> None:
    """The store stops to take anything after each number of writes: the stage is finished after the last alone."""
    finished = []
    for writes in range(12):
        run = open_run(f"{bucket.url}/run-{writes}")
        left = [writes]

        def plan(request: Any, left: list[int] = left) -> Fault | None:
            left[0] -= request.method in ("PUT", "POST")
            return "unavailable" if left[0] < 0 else None

        bucket.proxy.plan = plan
        with contextlib.suppress(StorageError):
            write_stage(run, tmp_path)
        bucket.proxy.plan = no_faults
        finished.append(run.is_finished(STAGE))
        if finished[-1]:
            check_stage(run)
        write_stage(run, tmp_path)
        check_stage(run)
    assert finished == sorted(finished)
    assert set(finished) == {False, True}


def test_a_write_of_arrow_that_fails_leaves_no_file(bucket: Bucket, run: RunDirectory, impatient: None) -> None:
    bucket.proxy.plan = always("unavailable", "PUT")
    with pytest.raises(StorageFault, match=r"pairs\.parquet: cannot be written"):
        pyarrow.parquet.write_table(ROWS, run.path("pairs.parquet"), filesystem=run.arrow_filesystem())
    bucket.proxy.plan = no_faults
    assert run.list_files("") == {}


# The lock.


def test_a_lock_whose_first_answer_got_lost_is_held(bucket: Bucket, run: RunDirectory) -> None:
    """The client writes again where it got no answer, and finds the lock there: its own."""
    bucket.proxy.plan = first(1, "lost_answer", "PUT", "lock.json")
    with hold_lock(run):
        assert list(run.list_files("")) == ["lock.json"]
        with pytest.raises(StorageError, match="in use by process"), hold_lock(run):
            pass
    assert run.list_files("") == {}
    assert len(bucket.proxy.injected) == 1


def test_a_lock_that_cannot_be_read_is_not_taken_over(bucket: Bucket, run: RunDirectory, impatient: None) -> None:
    with hold_lock(run):
        before = run.read_text("lock.json")
        bucket.proxy.plan = always("denied", "GET", "lock.json")
        with pytest.raises(StorageFault, match=r"lock\.json: cannot be read: AccessDenied"), hold_lock(run):
            pass
        bucket.proxy.plan = no_faults
        assert run.read_text("lock.json") == before


def test_a_store_that_is_away_at_the_end_does_not_hide_why_the_run_ended(
    bucket: Bucket, run: RunDirectory, impatient: None
) -> None:
    def work() -> None:
        with hold_lock(run):
            bucket.proxy.plan = always("unavailable")
            raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        work()


# Damage.


def test_a_manifest_that_changed_is_found_by_its_checksum(run: RunDirectory, tmp_path: Path) -> None:
    write_stage(run, tmp_path)
    text = str(run.read_text(f"{STAGE}/manifest.json"))
    run.write_text(f"{STAGE}/manifest.json", text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(StorageError, match=r"manifest\.json: expected what was written, with the checksum .*Remove"):
        run.read_manifest(STAGE, GenerateFacts)
