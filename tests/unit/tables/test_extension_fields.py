"""A Parquet file runs nothing, whatever its columns ask for, in a process where Ray Data has registered its types.

python -m pytest tests/unit/tables/test_extension_fields.py

Ray's workers are in tests/integration/test_written_tables.py.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
import pytest
import ray.data  # registers extension types
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.errors import UserError
from mipo_ray.prompts.files import find_files
from mipo_ray.prompts.reading import read_rows as read_prompt_rows
from mipo_ray.tables.extension_fields import refuse_extension_fields, refuse_extension_types
from mipo_ray.tables.footer import Footer, read_footer
from mipo_ray.tables.parquet import open_table
from mipo_ray.training.reference import read_logprobs
from mipo_ray.training.worker import _read_pairs
from tests.helpers.planted_tables import PICKLED, PLACES, TENSOR, extension, write_planted, write_planted_type

LOCAL = pyarrow.fs.LocalFileSystem()


def refuse_fields_of(file: io.BytesIO, shown: str) -> None:
    refuse_extension_fields(read_footer(file), shown)


def _read_prompts(file: Path) -> Any:
    return [list(read_prompt_rows(found)) for found in find_files(str(file))]


def _read_pairs_of_the_command(file: Path) -> Any:
    from mipo_ray.config.train import TrainConfig

    return _read_pairs(str(file), TrainConfig())


def _read_behind_a_good_file(file: Path) -> Any:
    """A table's schema is that of its first file."""
    good = file.parent / "a-good.parquet"
    pyarrow.parquet.write_table(pa.table({"prompt": ["a"]}), good)
    return open_table([str(good), str(file)], LOCAL).to_table(columns=["prompt"])


def _read_reference(file: Path) -> Any:
    return read_logprobs(str(file.parent), 1)


READERS = {
    "prompts": _read_prompts,
    "a run's table": lambda file: open_table(str(file), LOCAL).to_table(),
    "a run's directory": lambda file: open_table(str(file.parent), LOCAL).to_table(),
    "a run's second file": _read_behind_a_good_file,
    "the worker command's pairs": _read_pairs_of_the_command,
    "the reference's log-probs": _read_reference,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reader", READERS)
def test_a_column_that_is_to_be_unpickled_is_refused_and_nothing_runs(tmp_path: Path, reader: str, place: str) -> None:
    assert ray.data is not None
    file, mark = tmp_path / "worker-planted.parquet", tmp_path / "mark"
    write_planted(file, mark, place, prompt=["a"])
    with pytest.raises(UserError) as refused:
        READERS[reader](file)
    column = place.replace("key_value", "entries")  # as Arrow calls it
    assert str(refused.value).startswith(f"{file}, column {column!r}: expected plain data, found the extension type ")
    assert PICKLED in str(refused.value)
    assert not mark.exists()
    # What was planted does run where nobody looks.
    pyarrow.parquet.read_table(file).to_pylist()
    assert mark.exists()


READ_TYPE = """
import sys
import ray.data, ray.data._internal.tensor_extensions.arrow
import pyarrow.parquet
from mipo_ray.prompts.files import find_files
from mipo_ray.prompts.reading import read_rows
try:
    list(read_rows(find_files(sys.argv[1])[0])) if sys.argv[2] == "ours" else pyarrow.parquet.read_schema(sys.argv[1])
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_settings_of_a_type_are_not_unpickled_even_where_ray_may(tmp_path: Path) -> None:
    """A variable lets Ray unpickle them as soon as a schema is read: the file is refused before that."""
    file, mark = tmp_path / "planted.parquet", tmp_path / "mark"
    write_planted_type(file, mark)
    found = {}
    for who in ("ours", "arrow"):
        done = subprocess.run(
            [sys.executable, "-c", READ_TYPE, str(file), who],
            capture_output=True,
            text=True,
            env={**os.environ, "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA": "1"},
            check=True,
        )
        found[who] = done.stdout, mark.exists()
    assert found["ours"][0].startswith(f"UserError: {file}, column 'x': expected plain data, found the extension type")
    assert TENSOR in found["ours"][0]
    assert [found["ours"][1], found["arrow"][1]] == [False, True]


def test_types_that_are_nobodys_are_refused_too_and_arrows_own_plain_ones_are_read(tmp_path: Path) -> None:
    """Nobody is registered for it here; somebody may be in a worker."""
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pa.table([pa.array(["a"])], schema=pa.schema([pa.field("x", pa.string(), metadata=extension("some.type"))])),
        file,
    )
    with pytest.raises(UserError, match=r"column 'x': .*'some\.type'"):
        open_table(str(file), LOCAL)
    table = pa.table({"json": pa.array(['{"a": 1}'], pa.json_()), "id": pa.array([b"0" * 16], pa.uuid())})
    pyarrow.parquet.write_table(table, file)
    assert open_table(str(file), LOCAL).schema.names == ["json", "id"]
    assert len(_read_prompts(file)[0]) == 1


def test_types_that_parquet_itself_asks_for_are_looked_at(tmp_path: Path) -> None:
    for kind in (pa.bool8(), pa.list_(pa.field("y", pa.opaque(pa.int8(), "kind", "vendor")))):
        with pytest.raises(UserError, match=r"a\.parquet, column 'x(\.y)?': expected plain data"):
            refuse_extension_types(pa.schema([("x", kind)]), "a.parquet")
    refuse_extension_types(pa.schema([("x", pa.dictionary(pa.int8(), pa.string())), ("y", pa.uuid())]), "a.parquet")


PLAIN = pa.table(
    {
        "prompt": ["a", "b"],
        "context": pa.array([None, "c"]),
        "messages": [[{"role": "user", "content": "a"}], []],
        "kind": pa.array(["x", "y"]).dictionary_encode(),
        "number": [1.5, 2.5],
    }
)


def _stored(table: pa.Table, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, **options)
    return file


@pytest.mark.parametrize(
    "options", [{}, {"store_schema": False}, {"version": "1.0"}, {"write_page_index": True}, {"row_group_size": 1}]
)
def test_plain_files_pass(options: dict[str, Any]) -> None:
    refuse_fields_of(_stored(PLAIN, **options), "a.parquet")
    refuse_fields_of(_stored(PLAIN.slice(0, 0), **options), "a.parquet")
    wide = pa.table({f"column {number}": ["x"] for number in range(3000)})  # a footer of more than is read at first
    refuse_fields_of(_stored(wide, **options), "a.parquet")
    late = wide.append_column(pa.field("late", pa.string(), metadata=extension("some.type")), pa.array(["a"]))
    if options.get("store_schema", True):
        with pytest.raises(UserError, match="column 'late'"):
            refuse_fields_of(_stored(late, **options), "a.parquet")


@pytest.mark.parametrize("start", [0, 4])  # with the mark before the length, and as files of 2019 have it
@pytest.mark.parametrize("is_first", [True, False])
def test_any_of_several_schemas_counts(is_first: bool, start: int) -> None:
    planted = pa.schema([pa.field("x", pa.string(), metadata=extension("some.type"))])
    schemas = (planted, PLAIN.schema) if is_first else (PLAIN.schema, planted)
    file = io.BytesIO()
    with pyarrow.parquet.ParquetWriter(file, PLAIN.schema) as writer:
        writer.write_table(PLAIN)
        for key, schema in zip(("ARROW:schema", "ARROW:schemb"), schemas, strict=True):
            writer.add_key_value_metadata({key: base64.b64encode(schema.serialize().to_pybytes()[start:]).decode()})
    content = file.getvalue().replace(b"ARROW:schemb", b"ARROW:schema")
    assert content.count(b"ARROW:schema") == 2
    with pytest.raises(UserError, match=r"column 'x': .*'some\.type'"):
        refuse_fields_of(io.BytesIO(content), "a.parquet")


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_file_is_refused_as_arrow_refuses_it_or_read(data: st.DataObject) -> None:
    """It neither hangs nor ends in another error, whatever byte is another."""
    content = bytearray(_stored(PLAIN.slice(0, 1)).getvalue())
    footer = struct.unpack("<I", content[-8:-4])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(len(content) - footer - 8, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    with contextlib.suppress(pa.ArrowInvalid, UserError):
        refuse_fields_of(io.BytesIO(bytes(content[cut if cut < 20 else 0 :])), "a.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 100, json.dumps([1]).encode(), b"PAR1\xff\xff\xff\x7fPAR1"])
def test_what_is_no_parquet_file_is_invalid(content: bytes) -> None:
    with pytest.raises(pa.ArrowInvalid, match="not the footer of a Parquet file"):
        refuse_fields_of(io.BytesIO(content), "a.parquet")


def _flat_buffer_of_shared_fields(levels: int, times: int) -> bytes:
    """A message whose schema has one field, which names one child `times` times, which names one ..."""
    # Each table: the distance to its list of places, then the distance to its children. Written from the top down.
    parts = bytearray(struct.pack("<I", 8) + b"\0" * 4)

    def table(places: list[int], *distances: int) -> None:
        vtable = struct.pack(f"<{len(places) + 2}H", 4 + 2 * len(places), 4 + 4 * len(distances), *places)
        vtable += b"\0" * (-len(vtable) % 4)
        parts.extend(
            struct.pack("<i", -(4 + 4 * len(distances))) + struct.pack(f"<{len(distances)}I", *distances) + vtable
        )

    table([0, 0, 4], 4 + 12)  # Message.header is the third field
    table([0, 4], 4 + 8)  # Schema.fields is the second
    for _ in range(levels):
        behind = 4 * times
        parts.extend(struct.pack(f"<{times + 1}I", times, *(behind - 4 * number for number in range(times))))
        table([0, 0, 0, 0, 0, 4], 4 + 16)  # Field.children is the sixth
    parts.extend(struct.pack("<I", 0))
    return bytes(parts)


def test_a_schema_that_names_one_field_over_and_over_is_refused_at_once() -> None:
    """Fields may be shared: some thousand bytes make any number of them."""
    for levels, times, is_read in ((3, 2, True), (30, 50, False)):
        message = _flat_buffer_of_shared_fields(levels, times)
        encoded = base64.b64encode(struct.pack("<iI", -1, len(message)) + message)
        footer = Footer(groups=(), metadata=((b"ARROW:schema", encoded),))
        if is_read:
            refuse_extension_fields(footer, "a.parquet")
        else:
            with pytest.raises(pa.ArrowInvalid, match="its schema has too many fields"):
                refuse_extension_fields(footer, "a.parquet")
