"""Writes Ray Data's rows, and streams them exactly as they were written, wherever the run directory lies.

As `mipo_ray.tables.parquet` does, here as Ray Data's rows: every pass of Ray Data over files of our own starts here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.fs
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.checkpoint.checkpoint_filter import IdColumnCheckpointManager
from ray.data.datasource import Datasource, ReadTask

from mipo_ray.tables.parquet import PAGE_CHECKSUMS, open_table

MOST_READ_TASKS = 128

# How Ray Data calls the id of a row that is not complete yet; it removes these itself before they are read.
_PENDING = ".pending.parquet"


def read_rows(
    paths: str | Sequence[str], filesystem: pyarrow.fs.FileSystem, columns: Sequence[str] | None = None
) -> ray.data.Dataset:
    """The rows of Parquet files, or of a directory of them, as a Ray dataset; lazy. `columns`: these alone.

    They come file by file, those of a directory by name. Raises UserError as `open_table` does.
    """
    source = WrittenRows(paths, filesystem, columns)
    # Left alone, Ray Data cuts whatever it reads into 200 blocks, here of a row or two.
    return ray.data.read_datasource(source, override_num_blocks=min(len(source.files), MOST_READ_TASKS))


def write_rows(
    rows: ray.data.Dataset, directory: str, filesystem: pyarrow.fs.FileSystem, fewest_in_file: int | None = None
) -> None:
    """Runs a Ray dataset and writes its rows as Parquet files in a directory, with checksums of their pages; a file for
    each block, or with at least `fewest_in_file` rows."""
    rows.write_parquet(directory, filesystem=filesystem, min_rows_per_file=fewest_in_file, **PAGE_CHECKSUMS)


class WrittenRows(Datasource):
    """Parquet files as a source of Ray Data, each read by one task as a stream.

    Ray Data's own reader first starts an actor that reads the files' footers, at every pass anew: a second of CPU, and
    of waiting, for files that are small and of one schema here.
    """

    def __init__(
        self, paths: str | Sequence[str], filesystem: pyarrow.fs.FileSystem, columns: Sequence[str] | None
    ) -> None:
        super().__init__()
        table = open_table(paths, filesystem, columns or ())
        self.files: list[str] = table.files
        self._filesystem = filesystem
        self._columns = table.schema.names if columns is None else list(columns)
        self._schema = pa.schema([table.schema.field(name) for name in self._columns], table.schema.metadata)

    def get_name(self) -> str:
        return "Written rows"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """At most `parallelism` tasks, each with a run of neighbouring files."""
        shares = np.array_split(np.arange(len(self.files)), max(1, min(parallelism, len(self.files))))
        return [self._read_task([self.files[i] for i in share], per_task_row_limit) for share in shares]

    def _read_task(self, files: list[str], row_limit: int | None) -> ReadTask:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=tuple(files), exec_stats=None)
        return ReadTask(_reader(files, self._filesystem, self._columns), metadata, self._schema, row_limit)


def _reader(
    files: list[str], filesystem: pyarrow.fs.FileSystem, columns: list[str]
) -> Callable[[], Iterator[pa.Table]]:
    """A function of its own, so that a read task carries its own files only."""

    def read() -> Iterator[pa.Table]:
        for file in files:
            table = open_table([file], filesystem)
            # A stage that an earlier version began, and this one went on with, has files without its newer columns.
            own = [name for name in columns if name in table.schema.names]
            for batch in table.to_batches(columns=own):
                yield pa.Table.from_batches([batch])

    return read


class WrittenIds(IdColumnCheckpointManager):
    """Reads the ids of written rows back as they were written, which Ray Data's own reader does not in every folder."""

    def load_checkpoint(
        self, data_file_dir: str | None = None, data_file_filesystem: pyarrow.fs.FileSystem | None = None
    ) -> tuple[Any, int]:
        """The ids, sorted, as a reference to a numpy array, and its size in bytes; (None, 0) where there are none.

        Rows whose write was cut short are swept first. Ids are read in a task: the driver holds no data.
        """
        if data_file_dir is not None:
            keep_complete_writes(self.filesystem, self.checkpoint_path_unwrapped)
            self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        selector = pyarrow.fs.FileSelector(self.checkpoint_path_unwrapped, allow_not_found=True)
        files = [file.path for file in self.filesystem.get_file_info(selector) if file.path.endswith(".parquet")]
        files = [file for file in files if not file.endswith(_PENDING)]
        if not files:
            return None, 0
        selected = self._data_context.execution_options.label_selector
        task: Any = _sorted_ids.options(label_selector=selected) if selected else _sorted_ids
        ids, size = task.remote(sorted(files), self.filesystem, self.id_column)
        return ids, ray.get(size)


def keep_complete_writes(filesystem: pyarrow.fs.FileSystem, notes: str) -> None:
    """Removes a pending note in the directory `notes` where the same one without the mark stands beside it.

    An object store cannot rename: a note becomes complete by a copy, after which the pending one is removed. A death
    between the two leaves both, of rows that are written, and Ray Data would sweep the rows but leave the note.
    """
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(notes, allow_not_found=True))
    paths = {file.path for file in found}
    for path in sorted(paths):
        if path.endswith(_PENDING) and path.removesuffix(_PENDING) + ".parquet" in paths:
            filesystem.delete_file(path)


@ray.remote(num_cpus=0, num_returns=2)
def _sorted_ids(files: list[str], filesystem: pyarrow.fs.FileSystem, id_column: str) -> tuple[np.ndarray, int]:
    table = open_table(files, filesystem, [id_column]).to_table(columns=[id_column])
    ids = np.sort(np.array(table[id_column].to_pylist(), dtype=object))
    return ids, int(pyarrow.compute.sum(pyarrow.compute.binary_length(table[id_column])).as_py() or 0) + 64 * len(ids)
