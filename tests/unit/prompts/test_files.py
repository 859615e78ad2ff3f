"""Finding and streaming prompt files: formats, globs, and content that cannot be decoded."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.errors import UserError
from mipo_ray.prompts.files import find_files
from mipo_ray.prompts.reading import read_rows


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


def config_map(place: Path) -> None:
    """A folder as Kubernetes mounts a ConfigMap: links through a link, so that all files change at once."""
    (place / "..2026_01_31").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl"):
        (place / "..2026_01_31" / name).write_text(json.dumps({"prompt": name}) + "\n")
        (place / name).symlink_to(f"..data/{name}")
    (place / "..data").symlink_to("..2026_01_31")


@pytest.mark.parametrize("pattern", ["*.jsonl", "**/*.jsonl", "[ab].jsonl", "?.jsonl", "../*/*.jsonl"])
def test_a_mounted_config_map_is_read_once(tmp_path: Path, pattern: str) -> None:
    config_map(tmp_path / "mount")
    assert rows_of(f"{tmp_path}/mount/{pattern}") == [{"prompt": "a.jsonl"}, {"prompt": "b.jsonl"}]


@pytest.mark.parametrize(
    "pattern", ["snapshots/*/*.jsonl", "snapshots/*/data/*.jsonl", "**/train*.jsonl", "snap*/**/*.jsonl"]
)
def test_a_cache_of_the_hub_is_read_through_its_links(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/0a1b").write_text('{"prompt": "x"}\n')
    snapshot = tmp_path / "snapshots/main"
    (snapshot / "data").mkdir(parents=True)
    place = snapshot / "data/train.jsonl" if "data" in pattern or "**" in pattern else snapshot / "train.jsonl"
    place.symlink_to(tmp_path / "blobs/0a1b")
    assert rows_of(f"{tmp_path}/{pattern}") == [{"prompt": "x"}]


def test_links_to_directories_are_followed_and_a_ring_of_them_ends(tmp_path: Path) -> None:
    (tmp_path / "disk/deep").mkdir(parents=True)
    (tmp_path / "disk/deep/x.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "disk/deep/up").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/deep/self").symlink_to(".")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/part").symlink_to(tmp_path / "disk")
    for pattern in ("data/*/deep/*.jsonl", "data/**/*.jsonl", "d*/**/*.jsonl", "**/*.jsonl", "**/**/x.jsonl"):
        assert rows_of(f"{tmp_path}/{pattern}") == [{"prompt": "x"}], pattern
    (file,) = find_files(f"{tmp_path}/data/*/*/*.jsonl")
    assert file.path == f"{tmp_path}/data/part/deep/x.jsonl"


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("gone/a.jsonl")
    message = refused(f"{tmp_path}/*.jsonl")
    assert message.endswith(
        f"no file matches {tmp_path}/*.jsonl; {tmp_path}/a.jsonl is a link to a file that is not there"
    )


@pytest.mark.parametrize("folder", ["exp [1]", "what?", "[ab]"])
def test_a_folder_with_the_characters_of_a_pattern_is_found_by_its_name(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "x.jsonl").write_text('{"prompt": "x"}\n')
    assert rows_of(f"{tmp_path}/{folder}/*.jsonl") == [{"prompt": "x"}]


def test_files_of_one_name_in_two_folders_keep_different_ids(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "part.jsonl").write_text('{"prompt": "x"}\n')
    ids = [row.numbered_id for file in find_files(f"{tmp_path}/**/*.jsonl") for row in read_rows(file)]
    assert ids == ["one/part.jsonl:1", "two/part.jsonl:1"]


def test_a_name_with_glob_characters_is_a_file_if_it_exists(tmp_path: Path) -> None:
    (tmp_path / "data[1].jsonl").write_text('{"prompt": "x"}\n')
    assert rows_of(tmp_path / "data[1].jsonl") == [{"prompt": "x"}]


@pytest.mark.parametrize("folder", ["context=none", "prompt=9/group=2", "a::b", "übung 100% #1", 'it\'s "so"'])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv", ".json"])
def test_columns_are_what_the_file_holds_whatever_its_folder_is_called(
    tmp_path: Path, folder: str, suffix: str
) -> None:
    path = tmp_path / folder / f"part{suffix}"
    path.parent.mkdir(parents=True)
    if suffix == ".parquet":
        pq.write_table(pa.table({"prompt": ["x"], "context": ["Bo"]}), path)
    else:
        path.write_text("prompt,context\nx,Bo\n" if suffix == ".csv" else '{"prompt": "x", "context": "Bo"}\n')
    for pattern in (path, f"{path.parent}/*{suffix}"):
        assert rows_of(pattern) == [{"prompt": "x", "context": "Bo"}]


NAN = float("nan")
MISSING = {
    "float": pa.array([NAN, 1.5]),
    "half": pa.array([np.float16("nan"), np.float16(1.5)], pa.float16()),
    "null": pa.array([None, 1.5], pa.float64()),
    "list": pa.array([[NAN, 2.0], [1.0]]),
    "messages": pa.array([[{"role": "user", "content": NAN}], [{"role": "user", "content": 1.0}]]),
    "time": pa.array([None, 0], pa.timestamp("ns")),
    "text": pa.array(["nan", "NaN"]),
}


def test_what_is_missing_in_a_parquet_file_is_none(tmp_path: Path) -> None:
    """Text that spells a word is that word."""
    pq.write_table(pa.table(MISSING), tmp_path / "rows.parquet")
    first, second = rows_of(tmp_path / "rows.parquet")
    assert {name: first[name] for name in ("float", "half", "null", "time")} == dict.fromkeys(
        ("float", "half", "null", "time")
    )
    assert first["list"] == [None, 2.0]
    assert first["messages"] == [{"role": "user", "content": None}]
    assert (first["text"], second["text"]) == ("nan", "NaN")
    assert (second["float"], second["null"], second["list"]) == (1.5, 1.5, [1.0])


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@given(
    value=st.recursive(
        st.none() | st.just(NAN) | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_what_is_missing_in_json_is_none_at_any_depth(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, value: Any
) -> None:
    path = tmp_path_factory.mktemp("rows") / f"rows.{suffix}"
    text = json.dumps({"value": value})
    path.write_text(f"[{text}]" if suffix == "json" else text)
    expected = json.loads(text, parse_constant=lambda name: None if name == "NaN" else float(name))
    assert rows_of(path) == [expected]


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


@pytest.mark.parametrize("depth", [600, 900, 100_000])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_values_that_are_nested_too_deep_are_named(tmp_path: Path, suffix: str, depth: int) -> None:
    file = tmp_path / f"deep.{suffix}"
    file.write_text('{"prompt": "x", "more": ' + "[" * depth + "]" * depth + "}\n")
    assert refused(file).startswith(f"{file}, ")


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


PRETTY = json.dumps({"version": 1, "data": [{"prompt": "a"}, {"prompt": "b"}]}, indent=2).encode()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.csv",
            b"prompt;context\na;b\n",
            "header: expected commas between the columns, found semicolons: prompt;context;",
        ),
        ("a.csv", b"prompt\tcontext\na, too\tb\n", "header: expected commas between the columns, found tabs"),
        ("a.csv", b"prompt|context\n", "found bars"),
        (
            "a.csv",
            "prompt,context\n".encode("utf-16"),
            "expected UTF-8 text: .*; the file looks like UTF-16 text; write",
        ),
        ("a.json", PRETTY, r"found one object whose key 'data' holds 2 rows: write that list alone \(jq '\.data'\)"),
        ("a.json", b'{"data": [{"prompt": "a"}]}', "found one object whose key 'data' holds 1 rows"),
        ("a.json", b'{"rows": [{"input": "a", "role": "x"}]}', "whose key 'rows' holds 1 rows"),
        ("a.json", b'{"prompt": {"0": "a", "1": "b"}}', "found one object of columns, as pandas writes it"),
        ("a.json", b'{"prompt": ["a", "b"], "context": ["c", "d"]}', "found one object with a list for each column"),
        (
            "a.json",
            b'{\n"prompt": "a"\n}\n{\n"prompt": "b"\n}\n',
            "line 1: broken JSON: .*; a row must stand whole on one",
        ),
        ("a.jsonl", PRETTY, "line 1: broken JSON: .*; a row must stand whole on one line"),
        (
            "a.jsonl",
            b'[\n{"prompt": "a"}\n]',
            "line 1: broken JSON: .*; the file looks like a JSON array: call it .json",
        ),
        ("a.jsonl", b'[{"prompt": "a"}]', "line 1: expected one JSON object per line, found list; .*call it .json"),
        (
            "a.jsonl",
            gzip.compress(b'{"prompt": "a"}', mtime=0),
            "found byte 0x.*; the file looks like a gzip archive; call it .gz",
        ),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x\n", "broken JSON: .*; .*git lfs pull"),
        ("a.jsonl", b"<!DOCTYPE html>\n<html>", "broken JSON: .*; the file looks like a page of HTML"),
        ("a.parquet", b'{"prompt": "a"}\n', "not a readable Parquet file after row 0: .*"),
        (
            "a.parquet",
            b"PAR1" + b"x" * 99,
            "not a readable Parquet file after row 0: .*; the file looks like a Parquet file that was cut short",
        ),
        ("a.parquet", b"version https://git-lfs" + b"x" * 99, "after row 0: .*; .*git lfs pull"),
    ],
)
def test_what_a_file_probably_is_stands_in_the_message(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.search(expected, refused(tmp_path / name), re.DOTALL)


@pytest.mark.parametrize(
    ("name", "content", "row"),
    [
        ("a.csv", b"prompt\na;b\n", {"prompt": "a;b"}),
        ("a.json", b'{"prompt": [{"role": "user", "content": "a"}]}', {"prompt": [{"role": "user", "content": "a"}]}),
        ("a.json", b'{\n"prompt": "a",\n"tags": ["x"]\n}\n', {"prompt": "a", "tags": ["x"]}),
        ("a.json", b'{"prompt": "a", "data": {"0": "b"}}', {"prompt": "a", "data": {"0": "b"}}),
        ("a.jsonl", b'{"data": [{"x": 1}]}\n', {"data": [{"x": 1}]}),
    ],
)
def test_a_row_that_looks_like_a_box_of_rows_is_a_row(
    tmp_path: Path, name: str, content: bytes, row: dict[str, Any]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert rows_of(tmp_path / name) == [row]
