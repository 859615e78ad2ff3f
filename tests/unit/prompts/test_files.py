"""Finding and streaming prompt files: formats, globs, and content that cannot be decoded."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mipo_ray.errors import UserError
from mipo_ray.prompts.files import find_files, read_rows


def rows_of(path: str | Path) -> list[dict[str, Any]]:
    return [row.values for file in find_files(str(path)) for row in read_rows(file)]


def refused(path: str | Path) -> str:
    with pytest.raises(UserError) as error:
        rows_of(path)
    return str(error.value)


def test_a_glob_is_expanded_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.csv", "_SUCCESS", ".a.jsonl.crc"):
        (tmp_path / name).write_text('{"prompt": "x"}\n')
    assert [file.label for file in find_files(f"{tmp_path}/*")] == ["a.jsonl", "b.jsonl", "c.csv"]
    assert [file.format for file in find_files(f"{tmp_path}/*")] == ["JSONL", "JSONL", "CSV"]


def test_files_of_one_name_in_two_folders_keep_different_ids(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "part.jsonl").write_text('{"prompt": "x"}\n')
    ids = [row.numbered_id for file in find_files(f"{tmp_path}/**/*.jsonl") for row in read_rows(file)]
    assert ids == ["one/part.jsonl:1", "two/part.jsonl:1"]


def test_a_name_with_glob_characters_is_a_file_if_it_exists(tmp_path: Path) -> None:
    (tmp_path / "data[1].jsonl").write_text('{"prompt": "x"}\n')
    assert rows_of(tmp_path / "data[1].jsonl") == [{"prompt": "x"}]


def test_any_filesystem_that_fsspec_opens() -> None:
    with fsspec.open("memory://prompts/some.jsonl", "wb") as stream:
        stream.write(b'{"prompt": "x"}\n')
    (file,) = find_files("memory://prompts/*.jsonl")
    assert file.path == "memory:///prompts/some.jsonl"
    assert [row.where for row in read_rows(file)] == ["memory:///prompts/some.jsonl, line 1"]


class FakeHub(MemoryFileSystem):
    """Stands for a hub's filesystem, which another package registers with fsspec under a protocol of its own."""

    protocol = "fakehub"


def test_a_filesystem_of_another_package_is_found_by_its_protocol() -> None:
    fsspec.register_implementation("fakehub", FakeHub, clobber=True)
    for shard in (1, 0):
        with fsspec.open(f"fakehub://datasets/openai/gsm8k/main/train-{shard}.parquet", "wb") as stream:
            pq.write_table(pa.table({"question": [f"q{shard}"], "answer": ["#### 1"]}), stream)
    files = find_files("fakehub://datasets/openai/gsm8k/main/train-*.parquet")
    assert [(file.label, file.format) for file in files] == [
        ("train-0.parquet", "Parquet"),
        ("train-1.parquet", "Parquet"),
    ]
    assert all(file.path.startswith("fakehub://") for file in files)
    assert [row.values["question"] for file in files for row in read_rows(file)] == ["q0", "q1"]


def test_the_hub_of_models_and_data_sets_is_such_a_filesystem() -> None:
    assert fsspec.get_filesystem_class("hf").__name__ == "HfFileSystem"


def test_jsonl_may_have_blank_lines_a_byte_order_mark_and_compression(tmp_path: Path) -> None:
    content = '\ufeff{"prompt": "é"}\r\n\n{"prompt": "b", "n": [1]}'.encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    assert (
        rows_of(tmp_path / "a.jsonl")
        == rows_of(tmp_path / "a.jsonl.gz")
        == [{"prompt": "é"}, {"prompt": "b", "n": [1]}]
    )
    assert [row.where.rsplit(", ")[-1] for row in read_rows(find_files(str(tmp_path / "a.jsonl"))[0])] == [
        "line 1",
        "line 3",
    ]


def test_csv_fields_are_strings_and_may_hold_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,prompt_id\n"first, line\nsecond ""line""",007\n\nplain,8\n')
    assert rows_of(path) == [
        {"prompt": 'first, line\nsecond "line"', "prompt_id": "007"},
        {"prompt": "plain", "prompt_id": "8"},
    ]


def test_csv_fields_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\n" + "x" * 300_000 + "\n")
    assert len(rows_of(tmp_path / "a.csv")[0]["prompt"]) == 300_000


def test_parquet_rows_are_numbered_over_row_groups(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [f"p{i}" for i in range(700)]}), tmp_path / "a.parquet", row_group_size=100)
    (file,) = find_files(str(tmp_path / "a.parquet"))
    rows = list(read_rows(file))
    assert [row.values["prompt"] for row in rows] == [f"p{i}" for i in range(700)]
    assert rows[-1].where == f"{file.path}, row 700"


def test_no_file_matches(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.jsonl") == f"prompts.path: no file matches {tmp_path}/none.jsonl"
    assert refused(tmp_path / "*.jsonl") == f"prompts.path: no file matches {tmp_path}/*.jsonl"


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    assert refused(tmp_path).endswith(f"is a directory; expected a file or a glob such as {tmp_path}/*.jsonl")


@pytest.mark.parametrize("name", ["prompts.txt", "prompts", "prompts.parquet.gz"])
def test_unknown_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    message = refused(tmp_path / name)
    assert message.startswith(f"prompts.path: {tmp_path / name}: expected a name that ends in one of .jsonl, ")


def test_unknown_storage() -> None:
    message = refused("nowhere://bucket/a.jsonl")
    assert message.startswith("prompts.path: cannot open nowhere://bucket/a.jsonl: ")


def test_unknown_bundled_name() -> None:
    assert "expected one of instructions, " in refused("bundled:personalisation")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', "a.jsonl, line 2: broken JSON: "),
        (b'{"prompt": "a"}\n\n["b"]\n', "a.jsonl, line 3: expected one JSON object per line, found list"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "a.jsonl, line 2: expected UTF-8 text, found byte 0xff"),
        (b"[" * 100_000, "a.jsonl, line 1: broken JSON: "),
        (b'{"prompt": "a"}\n{"prompt": ' + b"1" * 5000 + b"}", "a.jsonl, line 2: broken JSON: "),
    ],
)
def test_broken_json_names_file_and_line(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert expected in refused(tmp_path / "a.jsonl")


def test_broken_json_in_the_second_file_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "b"}\n{')
    assert refused(tmp_path / "*.jsonl").startswith(f"{tmp_path / 'b.jsonl'}, line 2: broken JSON")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"prompt,context\na,b\nc\n", "a.csv, row 2: expected 2 fields as in the header, found 1"),
        (b"prompt,prompt\na,b\n", "a.csv, header: expected every column name once, found prompt, prompt"),
        (b'prompt\nfine\n"never closed\n', "a.csv, row 2: broken CSV: unexpected end of data"),
        (b"prompt\n\xff\n", "a.csv, near row 1: expected UTF-8 text"),
    ],
)
def test_broken_csv_names_file_and_row(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    assert expected in refused(tmp_path / "a.csv")


def test_files_that_are_not_what_their_name_says(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not a table")
    assert "a.parquet: not a readable Parquet file after row 0" in refused(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(b"not compressed")
    assert "a.jsonl.gz: cannot be read: BadGzipFile" in refused(tmp_path / "a.jsonl.gz")
    cut = gzip.compress(json.dumps({"prompt": "x" * 1000}).encode())[:-12]
    (tmp_path / "b.jsonl.gz").write_bytes(cut)
    assert "b.jsonl.gz: cannot be read: EOFError" in refused(tmp_path / "b.jsonl.gz")


def test_a_file_that_is_gone_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x"}\n')
    (file,) = find_files(str(path))
    path.unlink()
    with pytest.raises(UserError, match="no such file on this machine"):
        list(read_rows(file))
