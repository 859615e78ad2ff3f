"""What a run wrote and a disk or a network changed: refused by the file's name, never read as other rows.

python -m pytest tests/unit/tables/test_damaged_files.py
"""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mipo_ray.errors import UserError
from mipo_ray.tables.parquet import PAGE_CHECKSUMS, WrittenTable, open_table, read_table
from tests.helpers.fuzzed_inputs import damaged

LOCAL = pyarrow.fs.LocalFileSystem()
ROWS = pa.table(
    {
        "prompt_id": [f"prompt {number}" for number in range(40)],
        "chosen": ["moss is a plant " * number for number in range(40)],
        "ids": [list(range(number)) for number in range(40)],
        "pmi": [number / 3 for number in range(40)],
    }
)


def write(place: Path) -> Path:
    file = place / "pairs.parquet"
    pyarrow.parquet.write_table(ROWS, file, **PAGE_CHECKSUMS)
    return file


def opened(file: Path) -> WrittenTable:
    return open_table(str(file), LOCAL)


def rows_or_refusal(file: Path) -> pa.Table | str:
    try:
        table = opened(file)
        table.count_rows()
        list(table.to_batches())
        return table.to_table()
    except UserError as error:
        return str(error)


def test_whole_files_are_read_however_they_are_asked_for(tmp_path: Path) -> None:
    table = opened(write(tmp_path))
    assert table.to_table().equals(ROWS)
    assert pa.Table.from_batches(table.to_batches(columns=["pmi"])).equals(ROWS.select(["pmi"]))
    assert pa.Table.from_batches(next(table.each_file()).to_batches()).equals(ROWS)
    assert table.first(2).equals(ROWS.slice(0, 2))
    assert table.count_rows() == 40


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_changed_byte_of_the_values_is_noticed(tmp_path: Path, data: st.DataObject) -> None:
    """In the pages, that is between the two headers of a page's own and the footer: one byte, changed anywhere."""
    file = write(tmp_path)
    whole = file.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    at = data.draw(st.integers(4, footer - 1))
    file.write_bytes(whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
    found = rows_or_refusal(file)
    if isinstance(found, str):
        assert f"{file}: expected a Parquet file as it was written, found a damaged one: " in found
    else:
        assert found.equals(ROWS), "read as other rows"


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_accident_is_refused_by_name_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    file = write(tmp_path)
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    found = rows_or_refusal(file)
    assert not isinstance(found, str) or str(file) in found


def test_of_several_files_the_damaged_one_is_named(tmp_path: Path) -> None:
    for name in "abc":
        pyarrow.parquet.write_table(ROWS, tmp_path / f"{name}.parquet", **PAGE_CHECKSUMS)
    content = bytearray((tmp_path / "b.parquet").read_bytes())
    content[100] ^= 1
    (tmp_path / "b.parquet").write_bytes(bytes(content))
    with pytest.raises(UserError, match=rf"^{tmp_path}/b\.parquet: expected a Parquet file as it was written"):
        open_table(str(tmp_path), LOCAL).to_table()


def test_an_open_file_is_checked_as_well(tmp_path: Path) -> None:
    file = write(tmp_path)
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    with pytest.raises(pa.ArrowInvalid, match=r"pairs: .*CRC"):
        read_table(io.BytesIO(bytes(content)), "pairs")


def test_text_that_is_none_is_damage_too(tmp_path: Path) -> None:
    """In a file of an earlier version, whose pages have no checksums."""
    file = tmp_path / "pairs.parquet"
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\x80"))
    pyarrow.parquet.write_table(pa.table({"chosen": broken}), file)
    for read in (lambda table: table.to_table(), lambda table: list(table.to_batches()), lambda table: table.first(1)):
        with pytest.raises(UserError, match=r"pairs\.parquet: expected .* found a damaged one: .*UTF8"):
            read(opened(file))
