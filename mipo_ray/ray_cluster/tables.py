"""Streams the Parquet files that a run wrote exactly as they were written, wherever the run directory lies.

As `mipo_ray.tables.parquet` does, here as Ray Data's rows: every pass of Ray Data over files of our own starts here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute
import pyarrow.fs
import ray
import ray.data
from ray.data.checkpoint.checkpoint_filter import IdColumnCheckpointManager

from mipo_ray.tables.checked_files import checked
from mipo_ray.tables.parquet import open_table

# How Ray Data calls the id of a row that is not complete yet; it removes these itself before they are read.
_PENDING = ".pending.parquet"


def read_rows(
    paths: str | Sequence[str], filesystem: pyarrow.fs.FileSystem, columns: Sequence[str] | None = None
) -> ray.data.Dataset:
    """The rows of Parquet files, or of a directory of them, as a Ray dataset; lazy. `columns`: these alone.

    Raises UserError as `open_table` does: Ray Data leaves out a column that is not there without a word.
    """
    open_table(paths, filesystem, columns or ())
    return ray.data.read_parquet(
        paths if isinstance(paths, str) else list(paths),
        filesystem=checked(filesystem),  # the workers open the files
        columns=None if columns is None else list(columns),
        partitioning=None,
    )


class WrittenIds(IdColumnCheckpointManager):
    """Reads the ids of written rows back as they were written, which Ray Data's own reader does not in every folder."""

    def load_checkpoint(
        self, data_file_dir: str | None = None, data_file_filesystem: pyarrow.fs.FileSystem | None = None
    ) -> tuple[Any, int]:
        """The ids, sorted, as a reference to a numpy array, and its size in bytes; (None, 0) where there are none.

        Rows whose write was cut short are swept first. Ids are read in a task: the driver holds no data.
        """
        if data_file_dir is not None:
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


@ray.remote(num_cpus=0, num_returns=2)
def _sorted_ids(files: list[str], filesystem: pyarrow.fs.FileSystem, id_column: str) -> tuple[np.ndarray, int]:
    table = open_table(files, filesystem, [id_column]).to_table(columns=[id_column])
    ids = np.sort(np.array(table[id_column].to_pylist(), dtype=object))
    return ids, int(pyarrow.compute.sum(pyarrow.compute.binary_length(table[id_column])).as_py() or 0) + 64 * len(ids)
