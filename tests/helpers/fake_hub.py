"""The `hf://` filesystem over files in memory, for tests that read what recipes name on the Hub."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem
from huggingface_hub import HfFileSystem


class FakeHub(AbstractFileSystem):
    """The `hf://` filesystem over files in memory: lists, globs and reads; everything else is an error."""

    protocol = "hf"
    cachable = False
    files: ClassVar[dict[str, bytes]] = {}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        path = self._strip_protocol(path)
        entries: dict[str, dict[str, Any]] = {}
        for name, content in self.files.items():
            if name == path:
                entries[name] = {"name": name, "type": "file", "size": len(content)}
            elif name.startswith(f"{path}/"):
                child = "/".join(name.split("/")[: path.count("/") + 2])
                is_file = child == name
                size = len(content) if is_file else 0
                entries[child] = {"name": child, "type": "file" if is_file else "directory", "size": size}
        if not entries:
            raise FileNotFoundError(path)
        return list(entries.values()) if detail else list(entries)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> io.BytesIO:
        assert mode == "rb"
        return io.BytesIO(self.files[path])


@contextlib.contextmanager
def serve_hub(files: Mapping[str, bytes]) -> Iterator[None]:
    """While the block runs, `hf://` serves these files: path without scheme, with its revision, -> content."""
    fsspec.register_implementation("hf", FakeHub, clobber=True)
    FakeHub.files.update(files)
    try:
        yield
    finally:
        FakeHub.files.clear()
        fsspec.register_implementation("hf", HfFileSystem, clobber=True)
