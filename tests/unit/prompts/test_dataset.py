"""What a read task does with a file that is not as it was when it was checked. No cluster: the tasks are called here.

python -m pytest tests/unit/prompts/test_dataset.py
"""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.errors import UserError
from mipo_ray.prompts.check import PromptNeeds, PromptSummary, check_prompts
from mipo_ray.prompts.dataset import PromptSource

ROWS = [{"prompt": f"question {i}", "context": f"I am {i}.", "group": f"g{i}", "reference": f"r{i}"} for i in range(9)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def checked(path: str, **config: Any) -> tuple[PromptsConfig, PromptSummary]:
    prompts = PromptsConfig(path=path, **config)
    return prompts, check_prompts(prompts, PromptNeeds(mismatch=True))


def read(prompts: PromptsConfig, summary: PromptSummary, tasks: int = 3) -> list[str]:
    """The ids of all rows, by as many read tasks."""
    source = PromptSource(prompts, summary)
    tables: Any = [table for task in source.get_read_tasks(tasks) for table in task()]
    return [prompt_id for table in tables for prompt_id in table["prompt_id"].to_pylist()]


def refused(prompts: PromptsConfig, summary: PromptSummary) -> str:
    with pytest.raises(UserError) as error:
        read(prompts, summary)
    return str(error.value)


def replaced(row: int, **values: Any) -> list[dict[str, Any]]:
    return [*ROWS[:row], {**ROWS[row], **values}, *ROWS[row + 1 :]]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was opened, by name."""
    counts: Counter[str] = Counter()
    real = LocalFileSystem.open

    def counting(filesystem: LocalFileSystem, path: str, *arguments: Any, **options: Any) -> Any:
        counts[Path(path).name] += 1
        return real(filesystem, path, *arguments, **options)

    monkeypatch.setattr(LocalFileSystem, "open", counting)
    return counts


def test_each_file_is_opened_once_by_the_check_and_once_by_the_read_tasks(tmp_path: Path, opened: Counter[str]) -> None:
    names = [f"part-{number}.jsonl" for number in range(3)]
    for number, name in enumerate(names):
        write(tmp_path / name, ROWS[number * 3 : number * 3 + 3])
    prompts, summary = checked(f"{tmp_path}/*.jsonl")
    assert opened == dict.fromkeys(names, 1)
    assert len(read(prompts, summary)) == 9
    assert opened == dict.fromkeys(names, 2)


@pytest.mark.parametrize(
    "values",
    [{"prompt": "question 9"}, {"prompt": "Question 4"}, {"context": "I am 9."}, {"group": "g9"}, {"reference": "r9"}],
)
def test_an_edit_of_equal_row_count_and_size_is_refused_by_name(tmp_path: Path, values: dict[str, str]) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    before = os.stat(path)
    prompts, summary = checked(path)
    assert len(read(prompts, summary)) == 9
    write(tmp_path / "a.jsonl", replaced(4, **values))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size == before.st_size
    message = refused(prompts, summary)
    assert message.startswith(f"{path}: the 9 rows had content hash {summary.file_hashes[0]} when they were checked, ")
    _, now = checked(path)
    assert f"found {now.file_hashes[0]} now: the file was edited while" in message
    assert now.file_hashes != summary.file_hashes


def test_rows_that_changed_places_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{**row, "prompt_id": str(i)} for i, row in enumerate(ROWS)])
    summary = checked(path)
    write(tmp_path / "a.jsonl", [{**ROWS[i], "prompt_id": str(i)} for i in (0, 1, 3, 2, 4, 5, 6, 7, 8)])
    assert refused(*summary).startswith(f"{path}: the 9 rows had content hash ")


def test_the_edited_file_of_several_is_named(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"part-{number}.jsonl", ROWS[number * 3 : number * 3 + 3])
    found = checked(f"{tmp_path}/*.jsonl")
    path = write(tmp_path / "part-1.jsonl", replaced(4, prompt="question 9")[3:6])
    assert refused(*found).startswith(f"{path}: the 3 rows had content hash ")


@pytest.mark.parametrize(("count", "now"), [(8, 8), (10, 10), (20, 10)])
def test_another_number_of_rows_is_refused(tmp_path: Path, count: int, now: int) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    found = checked(path)
    write(tmp_path / "a.jsonl", (ROWS * 3)[:count])
    # One row too many is enough to know.
    assert refused(*found) == f"{path}: had 9 rows when it was checked, found {now} now"


def test_an_empty_file_that_grew_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    path = write(tmp_path / "b.jsonl", [])
    found = checked(f"{tmp_path}/*.jsonl")
    assert len(read(*found)) == 9
    write(tmp_path / "b.jsonl", ROWS)
    assert refused(*found) == f"{path}: had 0 rows when it was checked, found 1 now"


def test_with_a_limit_only_what_is_read_counts(tmp_path: Path, opened: Counter[str]) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.jsonl", ROWS)
    found = checked(f"{tmp_path}/*.jsonl", limit=5)
    write(tmp_path / "a.jsonl", replaced(5, prompt="of no concern"))
    write(tmp_path / "b.jsonl", [])
    assert len(read(*found)) == 5
    assert opened == {"a.jsonl": 2}
    write(tmp_path / "a.jsonl", replaced(4, prompt="question 9"))
    assert refused(*found).startswith(f"{path}: the 5 rows had content hash ")


def test_parquet_and_compressed_files_too(tmp_path: Path) -> None:
    def write_both(rows: list[dict[str, Any]]) -> None:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))

    write_both(ROWS)
    both = [checked(str(tmp_path / name)) for name in ("a.parquet", "b.jsonl.gz")]
    for found in both:
        assert len(read(*found)) == 9
    write_both(replaced(8, prompt="question 9"))
    for found in both:
        assert refused(*found).startswith(f"{found[0].path}: the 9 rows had content hash ")


def test_a_file_on_another_storage_too() -> None:
    def write_remote(rows: list[dict[str, Any]]) -> None:
        with fsspec.open("memory://edited/a.jsonl", "wb") as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())

    write_remote(ROWS)
    found = checked("memory://edited/a.jsonl")
    assert len(read(*found)) == 9
    write_remote(replaced(0, prompt="question 9"))
    assert refused(*found).startswith("memory:///edited/a.jsonl: the 9 rows had content hash ")


def test_a_copy_with_other_times_or_bytes_but_equal_rows_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    found = checked(path)
    Path(path).write_text("".join(json.dumps(row, separators=(",", ":")) + "\r\n" for row in ROWS))
    os.utime(path, (0, 0))
    assert len(read(*found)) == 9


def test_edited_profiles_are_named_beside_the_conversations(tmp_path: Path) -> None:
    def write_survey(likes: str) -> str:
        people = [
            {"user_id": f"u{i}", "self_description": f"{likes} {i}.", "system_string": "", "stated_prefs": None}
            for i in range(2)
        ]
        return write(tmp_path / "survey.jsonl", people)

    profiles = write_survey("I like")
    asked = [{"conversation_id": f"c{i}", "user_id": f"u{i}", "opening_prompt": f"Why {i}?"} for i in range(2)]
    path = write(tmp_path / "conversations.jsonl", asked)
    found = checked(path, loader="prism", profiles_path=profiles)
    assert read(*found) == ["c0", "c1"]
    write_survey("I hate")
    message = refused(*found)
    assert message.startswith(f"{path}: the 2 rows had content hash ")
    assert f"the file (or its profiles, {profiles}) was edited" in message
