"""Reads the Parquet files that a run wrote exactly as they were written, wherever the run directory lies. No Ray.

Left alone, Ray Data and `pyarrow.parquet` take a folder named `key=value` for a column of the rows below it, so that a
run in `runs/context=none` would find another context than it wrote. Every read of a file of our own goes through here,
or through `mipo_ray.ray_cluster.tables`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow.dataset
import pyarrow.fs

from mipo_ray.errors import UserError


def open_table(
    paths: str | Sequence[str], filesystem: pyarrow.fs.FileSystem, columns: Sequence[str] = ()
) -> pyarrow.dataset.Dataset:
    """Parquet files of one schema, or a directory of them, to be read as an Arrow table.

    Raises UserError, which names the place, where they lack one of `columns`.
    """
    where = paths if isinstance(paths, str) else list(paths)
    table = pyarrow.dataset.dataset(where, filesystem=filesystem, format="parquet", partitioning=None)
    if missing := [name for name in columns if name not in table.schema.names]:
        place = where if isinstance(where, str) else where[0]
        raise UserError(
            f"{place}: expected the columns {', '.join(columns)}, found {', '.join(table.schema.names)} without "
            f"{', '.join(missing)}; was it written by another version? Remove it to write it anew"
        )
    return table
