"""A row that is too long is refused by file and number while it is read, in every format, and takes no memory.

python -m pytest tests/unit/prompts/test_row_limit.py
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mipo_ray.errors import UserError
from mipo_ray.prompts import bounded, reading
from mipo_ray.prompts.files import find_files
from mipo_ray.prompts.reading import read_rows
from mipo_ray.tables import parquet, row_limit
from mipo_ray.tables.row_limit import LONGEST_ROW, MOST_VALUES

MIB = 1024**2
LIMIT = 1000  # bytes, of most tests
FEW = 50_000  # values, in place of MOST_VALUES
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    (file,) = find_files(str(path))
    return [row.values for row in read_rows(file)]


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        rows_of(path)
    return str(error.value)


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LONGEST_ROW", LIMIT)


def _jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"prompt": text}) + "\n" for text in texts).encode()


def _json(texts: list[str]) -> bytes:
    return json.dumps([{"prompt": text} for text in texts], indent=2).encode()


def _csv(texts: list[str]) -> bytes:
    return "".join(f'"{text}"\n' for text in ["prompt", *texts]).encode()


FORMATS = {"jsonl": (_jsonl, "line"), "json": (_json, "row"), "csv": (_csv, "row")}


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("row", [1, 2, 40])
def test_the_row_is_named_and_those_before_it_are_read(tmp_path: Path, format: str, packer: str, row: int) -> None:
    write, unit = FORMATS[format]
    texts = ["x" * 100] * 40
    texts[row - 1] = "y" * LIMIT
    file = tmp_path / f"a.{format}{packer}"
    file.write_bytes(PACKERS[packer](write(texts)))
    (found,) = find_files(str(file))
    rows: Iterator[Any] = read_rows(found)
    assert [next(rows).values["prompt"] for _ in range(row - 1)] == texts[: row - 1]
    with pytest.raises(UserError) as error:
        next(rows)
    assert str(error.value).startswith(f"{file}, {unit} {row}: expected a row of at most 1,000 bytes (")


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_of_just_the_limit_is_read(tmp_path: Path, format: str) -> None:
    overhead = {"jsonl": len('{"prompt": ""}'), "json": len('\n  {\n    "prompt": ""\n  }'), "csv": len('""\n')}[format]
    texts = ["a", "é" * ((LIMIT - overhead) // 2), "b"]
    write = FORMATS[format][0]
    content = write(texts).decode("unicode_escape" if format != "csv" else "utf-8").encode()
    (tmp_path / f"a.{format}").write_bytes(content)
    assert [row["prompt"] for row in rows_of(tmp_path / f"a.{format}")] == texts


@pytest.mark.usefixtures("limited")
def test_a_row_of_csv_may_be_long_in_many_lines_and_fields(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("a,b\nfine,1\n\n" + '"' + "line\n" * 300 + '",2\n')
    assert f"{file}, row 2: expected a row of at most" in refused(file)
    file.write_text("a,b\nfine,1\n" + "," * 1001 + "\n")
    assert f"{file}, row 2: expected a row of at most" in refused(file)
    file.write_text("a" * 2000 + "\n")
    assert f"{file}, header: expected a row of at most" in refused(file)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(st.characters(codec="utf-8"))
    | st.sampled_from(['[{"\\', "]},"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    rows=st.lists(st.dictionaries(st.text(st.characters(codec="utf-8")), VALUES, max_size=3), min_size=1, max_size=9),
    chunk=st.integers(1, 50),
    is_ascii=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_an_array_that_is_read_in_pieces_is_the_array(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], chunk: int, is_ascii: bool, indent: int | None
) -> None:
    """As long as the limit is that of its longest row; or that row is too long."""

    def written(value: Any) -> bytes:
        return json.dumps(value, ensure_ascii=is_ascii, indent=indent).encode()

    file = tmp_path_factory.mktemp("rows") / "a.json"
    file.write_bytes(b" " + written(rows) + b"\n\n")
    longest = max(len(written([row])) for row in rows)  # with the blanks before it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounded, "_CHUNK", chunk)
        patch.setattr(reading, "LONGEST_ROW", longest)
        assert rows_of(file) == rows
        patch.setattr(reading, "LONGEST_ROW", max(len(written(row)) for row in rows) - 1)
        assert "expected a row of at most" in refused(file)


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1}' + b", {}" * 500, "row 501: broken JSON: the array does not end"),
        (b'[{"a": 1}' + b", {}" * 500 + b"] x", "behind row 501: broken JSON: expected the end of the file"),
        (b'[{"a": 1}' + b", {}" * 500 + b", ]", "row 502: broken JSON: "),
        (b'[{"a": 1}' + b", {}" * 500 + b", {]}]", "row 502: broken JSON: "),
        (b'[{"a": 1}' + b", {}" * 500 + b", 3]", "row 502: expected a JSON object, found int"),
        (b'[{"a": 1}' + b", {}" * 500 + b', {"b": "\xff"}]', "row 502: expected UTF-8 text, found byte 0xff"),
        (b" " * 2000, "line 1: expected a row of at most"),
        (b"[" * 2000, "row 1: expected a row of at most"),
        (b'{"a": "' + b"x" * 2000 + b'"}', "line 1: expected a row of at most"),
    ],
)
def test_a_long_json_file_that_is_broken_names_the_row(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert refused(tmp_path / "a.json").startswith(f"{tmp_path / 'a.json'}, {message}")


@pytest.mark.usefixtures("limited")
def test_a_long_file_of_lines_may_be_called_json(tmp_path: Path) -> None:
    texts = [f"{number}" for number in range(500)]
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + _jsonl(texts))
    assert [row["prompt"] for row in rows_of(tmp_path / "a.json")] == texts


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("row", [1, 3, 299])
def test_the_row_of_a_parquet_file_is_named(tmp_path: Path, row: int, nested: bool) -> None:
    values: list[Any] = [f"{number}" for number in range(300)]
    values[row - 1] = "y" * LIMIT
    values = [[{"role": "user", "content": value}] for value in values] if nested else values
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"prompt": values}), file)
    (found,) = find_files(str(file))
    rows = read_rows(found)
    assert [next(rows).values["prompt"] for _ in range(row - 1)] == values[: row - 1]
    with pytest.raises(UserError, match=rf"a\.parquet, row {row}: expected a row of at most 1,000 bytes .*, found 1,"):
        next(rows)


@pytest.mark.parametrize(
    ("texts", "rows"),
    [(["y" * (LIMIT - 100)] * 300, 4), (["y"] * 300, 256), ([f"{number}" * 50 for number in range(300)], 4)],
)
def test_few_rows_of_a_parquet_file_are_decoded_together_where_they_could_be_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], rows: int
) -> None:
    """A dictionary holds a value once: decoded for 256 rows at a time it would be 256 times as large."""
    file, sizes = tmp_path / "a.parquet", []
    read = pyarrow.parquet.ParquetFile.iter_batches

    def recorded(self: Any, batch_size: int, **options: Any) -> Any:
        sizes.append(batch_size)
        return read(self, batch_size, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", recorded)
    table = pa.table({"prompt": texts})
    pyarrow.parquet.write_table(table, file, use_dictionary=len(set(texts)) == 1)
    with open(file, "rb") as stream:
        assert pa.Table.from_batches(parquet.read_batches(stream, "a.parquet", LIMIT)).equals(table)
    assert sizes == [rows]


@pytest.mark.parametrize("options", [{"use_dictionary": False}, {"data_page_version": "2.0"}, {"row_group_size": 7}])
def test_parquet_files_of_any_form_are_read_whole(tmp_path: Path, options: dict[str, Any]) -> None:
    """Also where the header of a page holds long values, and a group of rows is empty."""
    file = tmp_path / "a.parquet"
    table = pa.table({"prompt": [f"{number}" * 5000 for number in range(30)], "none": [None] * 30})
    with pyarrow.parquet.ParquetWriter(
        file, table.schema, **{k: v for k, v in options.items() if k != "row_group_size"}
    ) as writer:
        writer.write_table(table.slice(0, 0))
        writer.write_table(table, row_group_size=options.get("row_group_size"))
    with open(file, "rb") as stream:
        assert pa.Table.from_batches(parquet.read_batches(stream, "a.parquet", LONGEST_ROW)).equals(table)
    assert len(rows_of(file)) == 30


@settings(max_examples=200)
@given(data=st.data())
def test_a_damaged_parquet_file_is_named(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    file = tmp_path_factory.mktemp("rows") / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"prompt": ["a", "b"], "number": [1, 2]}), file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        rows_of(file)
    except UserError as error:
        message = str(error)
        event(message.split(": ")[1][:40])


# Of a process of its own: how much larger than before its memory ever was.
PEAK = r"""
import re, sys
from mipo_ray.errors import UserError
from mipo_ray.prompts.files import find_files
from mipo_ray.prompts.reading import read_rows
import pyarrow.parquet
def peak():
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
try:
    for row in read_rows(find_files(sys.argv[1])[0]):
        pass
except UserError as error:
    print(error)
print(peak() - before)
"""
LONG = 400 * MIB


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.jsonl.xz", "a.jsonl.bz2", "a.parquet"])
def test_a_small_archive_of_one_endless_row_takes_no_memory(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name == "a.parquet":
        table = pa.table({"prompt": ["y" * LONG]})
        pyarrow.parquet.write_table(table, file, compression="zstd", use_dictionary=False, write_statistics=False)
    else:
        packer = {"gz": gzip, "xz": lzma, "bz2": bz2}[name.rsplit(".", 1)[1]]
        options: Any = {"preset": 0} if packer is lzma else {"compresslevel": 1}
        with packer.open(file, "wb", **options) as stream:
            stream.write({"a.json.gz": b'[{"prompt": "', "a.csv.gz": b'prompt\n"'}.get(name, b'{"prompt": "'))
            for _ in range(LONG // MIB):
                stream.write(b"y" * MIB)
    assert file.stat().st_size < 4 * MIB
    done = subprocess.run([sys.executable, "-c", PEAK, str(file)], capture_output=True, text=True, check=True)
    message, taken = done.stdout.splitlines()
    assert message.startswith(f"{file}, {'line' if 'jsonl' in name else 'row'} 1: expected a row of at most 67,108,864")
    assert "64 MiB" in message
    assert LONGEST_ROW == 64 * MIB
    assert int(taken) < 250 * MIB


@pytest.mark.parametrize("packer", [packer for packer in PACKERS if packer])
def test_packed_files_may_be_strung_together_and_damaged_ones_are_named(tmp_path: Path, packer: str) -> None:
    file = tmp_path / f"a.jsonl{packer}"
    parts = [PACKERS[packer](_jsonl([text * 50])) for text in "abc"]
    file.write_bytes(b"".join(parts))
    assert [row["prompt"][0] for row in rows_of(file)] == ["a", "b", "c"]
    for content in (parts[0][:-6], parts[0][:20] + b"\xff" * 30 + parts[0][50:], b"no archive at all"):
        file.write_bytes(content)
        assert refused(file).startswith(f"{file}: cannot be read: ")


def test_an_xz_file_that_asks_for_more_memory_than_any_preset_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.xz"
    for dictionary in (64 * MIB, 1024 * MIB):
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": dictionary}]
        file.write_bytes(lzma.compress(_jsonl(["a"]), filters=filters))
        if dictionary == 64 * MIB:
            assert rows_of(file) == [{"prompt": "a"}]
        else:
            assert refused(file) == f"{file}: cannot be read: LZMAError: Memory usage limit exceeded"


def _list_of(count: int) -> pa.Table:
    rows = pa.ListArray.from_arrays(pa.array([0, 1, count + 1], pa.int32()), pa.array([True] * (count + 1)))
    return pa.table({"prompt": ["a", "b"], "flags": rows})


@pytest.fixture
def _few_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that costs a test less than the real one."""
    assert FEW < MOST_VALUES
    for module in (row_limit, bounded, parquet):
        monkeypatch.setattr(module, "MOST_VALUES", FEW)


@pytest.mark.usefixtures("_few_values")
def test_a_row_of_too_many_values_is_refused_however_few_bytes_it_has(tmp_path: Path) -> None:
    many = 2 * FEW + 2  # more than both rows may have together, and then of the second one alone
    for name, count, unit, row in (
        ("first.jsonl.gz", many, "line", 2),
        ("first.json.gz", many, "row", 2),
        ("first.csv.gz", many, "row", 2),
        ("average.parquet", many, "row", 1),
        ("one.parquet", FEW, "row", 2),
    ):
        path = tmp_path / name
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(_list_of(count), path, compression="zstd")
        else:
            text = f'{{"flags": [{"{}," * count}1]}}'
            whole = {"jsonl": f'{{"flags": 1}}\n{text}\n', "json": f'[{{"flags": 1}}, {text}]'}
            whole["csv"] = f"flags\n1\n{',' * count}\n"
            path.write_bytes(gzip.compress(whole[name.split(".")[1]].encode(), 1))
        assert path.stat().st_size < 200_000
        message = refused(path)
        assert message.startswith(f"{path}, {unit} {row}: expected a row of at most {FEW:,} values"), name


@pytest.mark.usefixtures("_few_values")
def test_commas_in_texts_and_rows_of_a_large_file_count_for_themselves(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [{"prompt": ',{["' * (FEW // 3 + 1)}, *({"prompt": "x"} for _ in range(10))]
    path.write_text(json.dumps(rows))
    assert rows_of(path) == rows
    path.write_text(json.dumps([{"prompt": "x", "more": [0, 0]}] * (FEW // 5)))
    assert len(rows_of(path)) == FEW // 5
