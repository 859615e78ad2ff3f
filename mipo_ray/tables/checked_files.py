"""A filesystem of Arrow's whose Parquet files are checked as they are opened, in whichever process that is."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.fs

from mipo_ray.tables.extension_fields import refuse_extension_fields
from mipo_ray.tables.footer import read_footer


def checked(filesystem: pyarrow.fs.FileSystem) -> pyarrow.fs.FileSystem:
    """The filesystem for reading Parquet files alone: `refuse_extension_fields` looks at each before anyone reads it.

    Arrow and the workers of Ray Data open files when they need them, long after whoever named them could have looked.
    """
    return pyarrow.fs.PyFileSystem(_CheckedFiles(filesystem))


class _CheckedFiles(pyarrow.fs.FileSystemHandler):
    """What Arrow asks of a filesystem that is read; it comes here for every file, and reads the file itself."""

    def __init__(self, filesystem: pyarrow.fs.FileSystem) -> None:
        self._filesystem = filesystem

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _CheckedFiles) and self._filesystem == other._filesystem

    def __hash__(self) -> int:
        return hash(type(self))

    def get_type_name(self) -> str:
        return f"checked+{self._filesystem.type_name}"

    def normalize_path(self, path: str) -> str:
        return self._filesystem.normalize_path(path)

    def get_file_info(self, paths: list[str]) -> Any:
        return self._filesystem.get_file_info(paths)

    def get_file_info_selector(self, selector: pyarrow.fs.FileSelector) -> Any:
        return self._filesystem.get_file_info(selector)

    def open_input_file(self, path: str) -> pa.NativeFile:
        file = self._filesystem.open_input_file(path)
        try:
            refuse_extension_fields(read_footer(file), path)
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def _is_for_reading(self, *arguments: Any) -> Any:
        raise NotImplementedError("this filesystem is for reading")

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = delete_file = _is_for_reading
    move = copy_file = open_output_stream = open_append_stream = _is_for_reading
