"""Parquet files with a column that asks to be unpickled. What would run is harmless and leaves a mark."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

PICKLED = "ray.data.arrow_pickled_object"  # registered by `import ray.data`
TENSOR = "ray.data.arrow_tensor_v2"


class _Planted:
    """Unpickled, it makes a directory."""

    def __init__(self, mark: Path) -> None:
        self._mark = str(mark)

    def __reduce__(self) -> Any:
        return os.mkdir, (self._mark,)


def extension(name: str, settings: bytes = b"") -> dict[bytes, bytes]:
    """What a field's metadata says of an extension type."""
    return {b"ARROW:extension:name": name.encode(), b"ARROW:extension:metadata": settings}


def _pickled(name: str = "x") -> pa.Field:
    return pa.field(name, pa.large_binary(), metadata=extension(PICKLED))


# Where the column stands -> its field and, from what is planted, its value. The name that is told is the key.
PLACES: dict[str, tuple[pa.Field, Any]] = {
    "x": (_pickled(), lambda value: value),
    "x.y": (pa.field("x", pa.struct([_pickled("y")])), lambda value: {"y": value}),
    "x.element": (pa.field("x", pa.list_(_pickled("element"))), lambda value: [value]),
    "x.y.element.z": (
        pa.field("x", pa.struct([pa.field("y", pa.large_list(pa.field("element", pa.struct([_pickled("z")]))))])),
        lambda value: {"y": [{"z": value}]},
    ),
    "x.key_value.value": (pa.field("x", pa.map_(pa.string(), _pickled("value"))), lambda value: [("k", value)]),
}


def write_planted(file: Path, mark: Path, place: str = "x", **columns: list[Any]) -> None:
    """A file of `columns` and one more, which makes the directory `mark` when it is unpickled."""
    field, value_of = PLACES[place]
    rows = len(next(iter(columns.values()))) if columns else 1
    planted = [value_of(pickle.dumps(_Planted(mark)))] * rows
    table = pa.table(columns).append_column(field, pa.array(planted, field.type))
    pyarrow.parquet.write_table(table, file)


def write_planted_type(file: Path, mark: Path) -> None:
    """A file whose column has a type with pickled settings, which are read when the type is made."""
    settings = extension(TENSOR, pickle.dumps(_Planted(mark)))
    field = pa.field("x", pa.large_list(pa.int64()), metadata=settings)
    pyarrow.parquet.write_table(pa.table([pa.array([[1]], field.type)], schema=pa.schema([field])), file)
