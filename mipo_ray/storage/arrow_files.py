"""An object store as pyarrow and Ray take it, whose faults are named wherever in the cluster they are met."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.fs

from mipo_ray.storage.faults import named

# Protocols of stores whose first directory is a bucket, which their clients would make where it is gone.
IN_BUCKETS = frozenset({"s3", "s3a", "gs", "gcs"})


def is_in_bucket(filesystem: Any) -> bool:
    """Whether files of fsspec's filesystem lie in buckets, which have no directories to be made."""
    protocol = filesystem.protocol
    return not IN_BUCKETS.isdisjoint([protocol] if isinstance(protocol, str) else protocol)


class NamedFaults(pyarrow.fs.FSSpecHandler):
    """fsspec's filesystem for Arrow: a fault is a StorageError with the path, and is never taken for an absent file.

    Arrow's own handler asks the filesystem whether a path is a file or a directory, which answers no when it cannot
    tell: rows that are written would be generated again.
    """

    def get_file_info(self, paths: list[str]) -> Any:
        with named(_shown(paths), "looked at"):
            return super().get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        with named(selector.base_dir, "listed"):
            if selector.recursive:
                found = self.fs.find(selector.base_dir, withdirs=True, detail=True)
            else:  # `find` of one level leaves out what it cannot list
                try:
                    found = {info["name"]: info for info in self.fs.ls(selector.base_dir, detail=True)}
                except FileNotFoundError:
                    found = {}
            base = selector.base_dir.strip("/")
            infos = [self._create_file_info(path, info) for path, info in found.items() if path.strip("/") != base]
            if not infos and not selector.allow_not_found and not self.fs.exists(selector.base_dir):
                raise FileNotFoundError(selector.base_dir)
            return infos

    def create_dir(self, path: str, recursive: bool) -> None:
        if not is_in_bucket(self.fs):
            with named(path, "made"):
                super().create_dir(path, recursive)

    def delete_dir(self, path: str) -> None:
        with named(path, "removed"):
            super().delete_dir(path)

    def delete_file(self, path: str) -> None:
        with named(path, "removed"):
            super().delete_file(path)

    def move(self, src: str, dest: str) -> None:
        with named(dest, "written"):
            super().move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        with named(dest, "written"):
            super().copy_file(src, dest)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        with named(path, "read"):
            return pa.PythonFile(_NamedFile(self.fs.open(path, mode="rb"), path, "read"), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        with named(path, "written"):
            return pa.PythonFile(_NamedFile(self.fs.open(path, mode="wb"), path, "written"), mode="w")


class _NamedFile:
    """An open file of fsspec's with what Arrow asks of one."""

    def __init__(self, file: Any, path: str, done: str) -> None:
        self._file, self._path, self._done = file, path, done

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def read(self, size: int = -1) -> bytes:
        with named(self._path, self._done):
            content: bytes = self._file.read(size)
        return content

    def write(self, content: Any) -> int:
        with named(self._path, self._done):
            return int(self._file.write(content))

    def flush(self) -> None:
        with named(self._path, self._done):
            self._file.flush()

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readable(self) -> bool:
        return bool(self._file.readable())

    def writable(self) -> bool:
        return bool(self._file.writable())

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def close(self) -> None:
        with named(self._path, self._done):
            self._file.close()


def _shown(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
