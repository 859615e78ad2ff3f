"""What is fetched is what was listed, several files at a time, and no byte twice after a cut.

python -m pytest tests/unit/models/test_fetch.py
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.errors import UserError
from mipo_ray.models import fetch as fetching
from mipo_ray.models.cache import make_once
from mipo_ray.models.directory import ModelDirectory, open_directory
from mipo_ray.models.fetch import fetch, known_md5
from mipo_ray.models.source import local_model_directory
from tests.unit.models.test_models import write_model


@dataclass
class Store:
    """A filesystem of these files; `asked` gets name, start and end of each read, and may raise or change the bytes."""

    files: dict[str, bytes]
    answer: Callable[[str, int, bytes], bytes] = lambda name, start, block: block
    asked: list[tuple[str, int, int]] = field(default_factory=list)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        name = path.removeprefix("bucket/")
        assert start is not None and end is not None  # noqa: PT018
        self.asked.append((name, start, end))
        return self.answer(name, start, self.files[name][start:end])

    def listed(self, **details: dict[str, Any]) -> ModelDirectory:
        sizes = {name: {"size": len(content)} for name, content in self.files.items()}
        return ModelDirectory(
            "store://bucket", self, "bucket", {name: sizes[name] | details.get(name, {}) for name in sizes}
        )


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_BLOCK", 10)


def content_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@given(
    files=st.dictionaries(
        st.sampled_from("abcdefgh"), st.tuples(st.binary(max_size=60), st.integers(0, 70)), min_size=1
    )
)
def test_only_what_lacks_is_read(files: dict[str, tuple[bytes, int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of each file a part is there, from nothing to all of it; one that is longer than the file is no part of it."""
    local = tmp_path_factory.mktemp("local")
    store = Store({name: content for name, (content, _) in files.items()})
    (local / "of another model").write_text("")
    for name, (content, there) in files.items():
        (local / name).write_bytes((content + b"x" * 70)[:there])
    fetch(store.listed(), list(files), local)
    assert content_of(local) == store.files
    lacked = {
        name: range(there if there <= len(content) else 0, len(content)) for name, (content, there) in files.items()
    }
    read = sorted((name, byte) for name, start, end in store.asked for byte in range(start, end))
    assert read == sorted((name, byte) for name, places in lacked.items() for byte in places)
    assert all(end - start <= 10 for _, start, end in store.asked)


def test_files_are_read_at_the_same_time(tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def answer(name: str, start: int, block: bytes) -> bytes:
        together.wait(30)  # passed by four at once
        return block

    store = Store({name: name.encode() * 10 for name in "abcd"}, answer)
    fetch(store.listed(), list(store.files), tmp_path)
    assert content_of(tmp_path) == store.files


def test_an_error_stops_the_others_and_what_came_is_gone_on_with(tmp_path: Path) -> None:
    failed = threading.Event()

    def answer(name: str, start: int, block: bytes) -> bytes:
        if name == "b" and start == 30:
            failed.set()
            raise ConnectionError("cut")
        if name == "a":
            failed.wait(30)
            time.sleep(0.01)  # of a thousand blocks: the others are stopped long before the last
        return block

    store = Store({"a": bytes(range(256)) * 40, "b": b"b" * 100}, answer)
    with pytest.raises(UserError, match="store://bucket/b: cannot be read: ConnectionError: cut"):
        fetch(store.listed(), ["a", "b"], tmp_path)
    there = {name: len(content) for name, content in content_of(tmp_path).items()}
    assert there["b"] == 30
    assert there["a"] < len(store.files["a"])
    store.answer, store.asked = (lambda name, start, block: block), []
    fetch(store.listed(), ["a", "b"], tmp_path)
    assert content_of(tmp_path) == store.files
    assert min(start for name, start, _ in store.asked if name == "b") == 30
    assert min(start for name, start, _ in store.asked if name == "a") == there["a"]


def test_a_file_that_became_shorter_is_refused(tmp_path: Path) -> None:
    store = Store({"a": b"0123456789" * 3})
    listed = store.listed()
    store.files["a"] = b"01234567"
    with pytest.raises(UserError, match=r"store://bucket/a: expected 30 bytes as listed, downloaded 8: it changed"):
        fetch(listed, ["a"], tmp_path)
    assert not (tmp_path / "a").exists()


def sum_of(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def test_what_stores_say_of_sums() -> None:
    found = sum_of(b"content")
    assert known_md5({"ETag": f'"{found}"'}) == found
    assert known_md5({"md5Hash": base64.b64encode(bytes.fromhex(found)).decode(), "etag": "CKih16GjycICEAE="}) == found
    for unknown in ({}, {"ETag": f'"{found}-3"'}, {"ETag": None}, {"mtime": 1.5}, {"etag": "0x8D4BCC2E4835CD0"}):
        assert known_md5(unknown) is None


@pytest.mark.parametrize(
    ("came", "is_refused"),
    [
        ([b"right"], False),
        ([b"wrong", b"right"], False),
        ([b"wrong", b"other"], True),
        ([b"wrong", b"wrong"], False),  # no sum of the file, then: what a store with keys of its own calls it
    ],
)
def test_sums_are_compared(came: list[bytes], is_refused: bool, tmp_path: Path) -> None:
    left = list(came)
    store = Store({"a": b"right"}, lambda name, start, block: left.pop(0))
    listed = store.listed(a={"ETag": f'"{sum_of(b"right")}"'})
    if is_refused:
        with pytest.raises(UserError, match=rf"store://bucket/a: expected the MD5 sum {sum_of(b'right')} as listed"):
            fetch(listed, ["a"], tmp_path)
        assert not (tmp_path / "a").exists()
    else:
        fetch(listed, ["a"], tmp_path)
        assert (tmp_path / "a").read_bytes() == came[-1]
    assert not left


KILLED = """
import os, sys
from mipo_ray.models import directory, fetch, source
fetch._BLOCK, fetch._FILES_AT_ONCE = 10, 1
read, left = directory.ModelDirectory.read, [12]

def dies(self, name, start=None, end=None):
    if name == "model.safetensors" and start and start >= 50:
        os.kill(os.getpid(), 9)
    return read(self, name, start, end)

fetch.ModelDirectory.read = dies
source.check_model_directory = lambda path: ["model.safetensors"]
source.check_model = lambda path: None
source.local_model_directory(sys.argv[1])
"""


def test_the_next_process_goes_on_where_one_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIPO_RAY_CACHE", str(tmp_path / "cache"))
    url = f"local://{write_model(tmp_path / 'model')}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", KILLED, url], env=environment)
    assert killed.returncode == -9
    (left,) = (tmp_path / "cache" / "models").glob("*.partial")
    assert (left / "model.safetensors").stat().st_size == 50
    fetched: list[tuple[str, int]] = []
    read = ModelDirectory.read

    def counted(self: ModelDirectory, name: str, start: int | None = None, end: int | None = None) -> bytes:
        if end is not None and end - (start or 0) <= 10 and sys._getframe(1).f_code.co_name == "_fetch":
            fetched.append((name, start or 0))
        return read(self, name, start, end)

    monkeypatch.setattr(ModelDirectory, "read", counted)
    directory = Path(local_model_directory(url))
    assert min(start for name, start in fetched if name == "model.safetensors") == 50
    assert content_of(directory) == content_of(tmp_path / "model")
    assert not list(directory.parent.glob("*.partial"))


def test_what_a_living_process_works_on_is_not_taken_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where locks do nothing, and two are at work at once."""
    monkeypatch.setattr("mipo_ray.models.cache.fcntl.flock", lambda *_: None)
    wanted = tmp_path / "wanted"
    seen: list[list[str]] = []

    def make(partial: Path) -> None:
        seen.append(sorted(file.name for file in partial.iterdir()))
        (partial / f"file-{len(seen)}").touch()
        if len(seen) == 1:
            make_once(wanted, make, lambda _: True, goes_on=True)

    make_once(wanted, make, lambda _: True, goes_on=True)
    assert seen == [[], []]


def test_what_another_machine_left_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be at work there: a lock of a shared directory may be seen on its own machine alone."""
    left: list[list[str]] = []

    def make(partial: Path) -> None:
        left.append(sorted(file.name for file in partial.iterdir()))
        (partial / "half").touch()
        if len(left) < 3:
            raise ConnectionError("cut")

    for machine in ("0" * 8, "1" * 8, "0" * 8):
        monkeypatch.setattr("mipo_ray.models.cache._machine", lambda machine=machine: machine)
        with contextlib.suppress(ConnectionError):
            make_once(tmp_path / "wanted", make, lambda _: True, goes_on=True)
    assert left == [[], [], ["half"]]


def test_what_an_error_left_is_gone_on_with_and_a_full_disk_is_given_back(tmp_path: Path) -> None:
    errors: list[BaseException | None] = [ConnectionError("cut"), OSError(28, "No space left on device"), None]
    seen: list[list[str]] = []

    def make(partial: Path) -> None:
        seen.append(sorted(file.name for file in partial.iterdir()))
        (partial / f"file-{len(seen)}").touch()
        if (error := errors[len(seen) - 1]) is not None:
            raise error

    with pytest.raises(ConnectionError):
        make_once(tmp_path / "wanted", make, lambda _: True, goes_on=True)
    with pytest.raises(UserError, match="no space left for wanted"):
        make_once(tmp_path / "wanted", make, lambda _: True, goes_on=True)
    assert not list(tmp_path.glob("*.partial"))
    make_once(tmp_path / "wanted", make, lambda _: True, goes_on=True)
    assert seen == [[], ["file-1"], []]


def test_a_model_of_a_store_is_fetched_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed as fsspec lists it: no file is missed, and blocks are put together in order."""
    model = write_model(tmp_path / "model")
    (tmp_path / "local").mkdir()
    remote = open_directory(f"local://{model}")
    fetch(remote, list(remote.details), tmp_path / "local")
    assert content_of(tmp_path / "local") == content_of(model)
