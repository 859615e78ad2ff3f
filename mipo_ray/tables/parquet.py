"""The one reader of Parquet files: nothing that a file asks for is run, and its columns are its own.

Left alone, Ray Data and `pyarrow.parquet` take a folder named `key=value` for a column of the rows below it, so that a
run in `runs/context=none` would find another context than it wrote; and they hand a column of an extension type to
whatever program is registered for it. Every read of Parquet goes through here, or for Ray Data through
`mipo_ray.ray_cluster.tables`.

What a run writes has a checksum for each page (`PAGE_CHECKSUMS`), which is compared whenever it is read: a file whose
bytes changed on a disk or on its way is refused, and not read as other rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

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
# What every writer of Parquet passes on to Arrow.
PAGE_CHECKSUMS: dict[str, Any] = {"write_page_checksum": True}
_CHECKED_PAGES = pyarrow.dataset.ParquetFileFormat(
    default_fragment_scan_options=pyarrow.dataset.ParquetFragmentScanOptions(page_checksum_verification=True)
)


class WrittenTable:
    """Parquet files of one schema that a run wrote. Nothing is read before it is asked for.

    What reads raises UserError, which names the file, where one is damaged: of another checksum, cut off, no Parquet at
    all, or with text that is none (UTF-8).
    """

    def __init__(self, dataset: pyarrow.dataset.Dataset, place: str) -> None:
        self._dataset = dataset
        self._place = place
        self.schema: pa.Schema = dataset.schema
        self.files: list[str] = dataset.files

    def to_batches(self, **options: Any) -> Iterator[pa.RecordBatch]:
        """The rows, some at a time; options: those of Arrow's `Dataset.to_batches`, such as columns and filter."""
        with _named_damage(self._damaged):
            batches = iter(self._dataset.to_batches(**options))
        while True:
            with _named_damage(self._damaged):
                batch = next(batches, None)
                if batch is not None:
                    batch.validate(full=True)
            if batch is None:
                return
            yield batch

    def to_table(self, **options: Any) -> pa.Table:
        """All rows; options as above."""
        with _named_damage(self._damaged):
            table = self._dataset.to_table(**options)
            table.validate(full=True)
        return table

    def first(self, rows: int, **options: Any) -> pa.Table:
        """The first rows; options as above."""
        with _named_damage(self._damaged):
            table = self._dataset.head(rows, **options)
            table.validate(full=True)
        return table

    def count_rows(self) -> int:
        """How many rows there are, by the files' footers."""
        with _named_damage(self._damaged):
            return int(self._dataset.count_rows())

    def each_file(self) -> Iterator[WrittenTable]:
        """The same, file by file: Arrow reads ahead as it has time, of as many files as it is given."""
        for fragment in self._dataset.get_fragments():
            alone = pyarrow.dataset.FileSystemDataset([fragment], self.schema, _CHECKED_PAGES, fragment.filesystem)
            yield WrittenTable(alone, fragment.path)

    def _damaged(self) -> str:
        """The first file that cannot be read whole; where each can, the place of all."""
        for fragment in self._dataset.get_fragments():
            try:
                fragment.to_table(schema=self.schema).validate(full=True)
            except (pa.ArrowException, OSError):
                return str(fragment.path)
        return self._place


@contextlib.contextmanager
def _named_damage(place: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{place()}: cannot be read: {error}") from error  # of the disk: the file may be whole
        raise UserError(
            f"{place()}: expected a Parquet file as it was written, found a damaged one: {cut(str(error))}. Remove the "
            "directory of its stage to run the stage again."
        ) from None


def open_table(
    paths: str | Sequence[str], filesystem: pyarrow.fs.FileSystem, columns: Sequence[str] = ()
) -> WrittenTable:
    """Parquet files of one schema, or a directory of them, as a run wrote them.

    Raises UserError, which names the place, where they are damaged or lack one of `columns`, and for a column of an
    extension type.
    """
    where = paths if isinstance(paths, str) else list(paths)
    place = where if isinstance(where, str) else where[0]
    with _named_damage(lambda: place):
        dataset = pyarrow.dataset.dataset(
            where, filesystem=checked(filesystem), format=_CHECKED_PAGES, partitioning=None
        )
    table = WrittenTable(dataset, place)
    refuse_extension_types(table.schema, place)
    if missing := [name for name in columns if name not in table.schema.names]:
        raise UserError(
            f"{place}: expected the columns {', '.join(columns)}, found {cut(', '.join(table.schema.names))} without "
            f"{', '.join(missing)}; was it written by another version? Remove it to write it anew"
        )
    return table


def read_table(file: IO[bytes], shown: str) -> pa.Table:
    """An open Parquet file, whole; raises as `read_batches` does, and pyarrow.ArrowInvalid where a page has another
    checksum, and limits no row."""
    table = _opened(file, shown)[0]
    try:
        return table.read()
    except OSError as error:
        if error.errno is not None:
            raise
        raise pa.ArrowInvalid(f"{shown}: {error}") from None


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
    table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
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
