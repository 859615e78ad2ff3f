"""The one reader of Parquet files: nothing that a file asks for is run, and its columns are its own.

Left alone, Ray Data and `pyarrow.parquet` take a folder named `key=value` for a column of the rows below it, so that a
run in `runs/context=none` would find another context than it wrote; and they hand a column of an extension type to
whatever program is registered for it. Every read of Parquet goes through here, or for Ray Data through
`mipo_ray.ray_cluster.tables`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO

import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet

from mipo_ray.errors import UserError, cut
from mipo_ray.tables.checked_files import checked
from mipo_ray.tables.extension_fields import refuse_extension_fields, refuse_extension_types
from mipo_ray.tables.footer import Footer, RowGroup, dictionary_size, read_footer
from mipo_ray.tables.row_limit import MOST_VALUES, too_long, too_many

_MOST_ROWS = 256  # of a batch


def open_table(
    paths: str | Sequence[str], filesystem: pyarrow.fs.FileSystem, columns: Sequence[str] = ()
) -> pyarrow.dataset.Dataset:
    """Parquet files of one schema, or a directory of them, to be read as an Arrow table.

    Raises UserError, which names the place, where they lack one of `columns`, and for a column of an extension type.
    """
    where = paths if isinstance(paths, str) else list(paths)
    table = pyarrow.dataset.dataset(where, filesystem=checked(filesystem), format="parquet", partitioning=None)
    place = where if isinstance(where, str) else where[0]
    refuse_extension_types(table.schema, place)
    if missing := [name for name in columns if name not in table.schema.names]:
        raise UserError(
            f"{place}: expected the columns {', '.join(columns)}, found {cut(', '.join(table.schema.names))} without "
            f"{', '.join(missing)}; was it written by another version? Remove it to write it anew"
        )
    return table


def read_table(file: IO[bytes], shown: str) -> pa.Table:
    """An open Parquet file, whole; raises as `read_batches` does, and limits no row."""
    return _opened(file, shown)[0].read()


def read_batches(file: IO[bytes], shown: str, longest_row: int) -> Iterator[pa.RecordBatch]:
    """The rows of an open Parquet file, some at a time, in order.

    longest_row: bytes of a row. Raises UserError, which names the file as `shown` and the column or the row, for a
    column of an extension type before anything is read, and for a row that is longer or has more than MOST_VALUES
    values; pyarrow.ArrowException for a file that is damaged or no Parquet.
    """
    table, footer = _opened(file, shown)
    number = 0
    for index, group in enumerate(footer.groups):
        rows = _rows_at_a_time(file, group, f"{shown}, row {number + 1}", longest_row)
        for batch in table.iter_batches(batch_size=rows, row_groups=[index]):
            # What is larger is handed out row by row: as Python's values it would take as much again.
            is_short = batch.nbytes <= longest_row and _values(batch) <= MOST_VALUES
            parts = [batch] if is_short else [batch.slice(row, 1) for row in range(batch.num_rows)]
            for part in parts:
                if (size := part.nbytes) > longest_row:
                    raise too_long(f"{shown}, row {number + 1}", longest_row, f"{size:,}")
                if not is_short and (values := _values(part)) > MOST_VALUES:
                    raise too_many(f"{shown}, row {number + 1}", f"{values:,}")
                number += part.num_rows
                yield part


def _opened(file: IO[bytes], shown: str) -> tuple[pyarrow.parquet.ParquetFile, Footer]:
    footer = read_footer(file)
    refuse_extension_fields(footer, shown)
    file.seek(0)
    table = pyarrow.parquet.ParquetFile(file)
    refuse_extension_types(table.schema_arrow, shown)
    return table, footer


def _rows_at_a_time(file: IO[bytes], group: RowGroup, first_row: str, longest_row: int) -> int:
    """How many rows of a row group are decoded together, so that they take a few times `longest_row` bytes at most.

    A value of a dictionary stands in the file once and may be that of every row. Raises UserError, which names
    `first_row`, for a group whose rows are too long on average, before they are decompressed.
    """
    if not group.rows:
        return _MOST_ROWS
    if group.size > longest_row * group.rows:
        raise too_long(first_row, longest_row, f"{group.size // group.rows:,} on average from there on")
    if group.values > MOST_VALUES * group.rows:
        raise too_many(first_row, f"{group.values // group.rows:,} on average from there on")
    repeated = sum(dictionary_size(file, start) for start in group.columns)
    together = _MOST_ROWS if group.size <= 4 * longest_row else 4
    fitting = 4 * longest_row // max(1, repeated), 4 * MOST_VALUES * group.rows // max(1, group.values)
    return max(1, min(together, *fitting))


def _values(rows: pa.RecordBatch) -> int:
    """The values of rows, those in lists and structures among them. A list of nulls has many, and no bytes."""
    waiting, found = list(rows.columns), 0
    while waiting:
        column = waiting.pop()
        found += len(column)
        if isinstance(column, pa.ExtensionArray):
            waiting.append(column.storage)
        elif pa.types.is_struct(column.type):
            waiting += column.flatten()
        elif pa.types.is_nested(column.type):
            waiting.append(column.flatten())
    return found
