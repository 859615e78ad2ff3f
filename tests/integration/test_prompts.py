"""Prompt files through Ray Data: the rows that were checked, in blocks that no parallelism changes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.exceptions import RayTaskError

from mipo_ray.conditioning.blocks import condition_block, rows_per_block
from mipo_ray.config.conditioning import ConditioningConfig
from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.prompts.check import PromptNeeds, PromptSummary, check_prompts
from mipo_ray.prompts.dataset import blocks_of, read_prompts
from mipo_ray.prompts.rows import PROMPT_SCHEMA

pytestmark = pytest.mark.usefixtures("ray_cluster")

ROWS = 150
BLOCK_SIZE = 32


def checked(path: str, **config: Any) -> tuple[PromptsConfig, PromptSummary]:
    prompts = PromptsConfig(path=path, **config)
    return prompts, check_prompts(prompts, PromptNeeds(mismatch=True))


def read(path: str, override_num_blocks: int | None = None, **config: Any) -> list[dict[str, Any]]:
    return read_prompts(*checked(path, **config), override_num_blocks=override_num_blocks).take_all()


def source_rows() -> list[dict[str, str]]:
    return [
        {"prompt_id": f"{i:04d}", "prompt": f'Say "{i}",\nthen stop.', "context": f"c{i % 3}", "group": f"g{i % 5}"}
        for i in range(ROWS)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_shards(folder: Path, rows: list[dict[str, str]], sizes: list[int]) -> str:
    for number, size in enumerate(sizes):
        start = sum(sizes[:number])
        write_jsonl(folder / f"part-{number:02d}.jsonl", rows[start : start + size])
    return f"{folder}/part-*.jsonl"


def test_all_formats_give_the_same_rows(tmp_path: Path) -> None:
    rows = source_rows()
    write_jsonl(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=40)
    with open(tmp_path / "a.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    jsonl, parquet, commas = (read(str(tmp_path / f"a.{suffix}")) for suffix in ("jsonl", "parquet", "csv"))
    assert [row["prompt_id"] for row in jsonl] == [row["prompt_id"] for row in rows]
    assert jsonl[1]["messages"] == [{"role": "user", "content": 'c1\n\nSay "1",\nthen stop.'}]
    assert jsonl == parquet == commas


def test_rows_of_different_shape_share_one_schema(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "one", "extra_number": 1},
        {"prompt": [{"role": "user", "content": "two"}], "context": "I ski.", "extra_number": "text"},
        {"prompt": "three", "prompt_id": 3, "group": 7},
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    dataset = read_prompts(*checked(str(tmp_path / "a.jsonl")))
    table: Any
    (table,) = dataset.iter_batches(batch_format="pyarrow", batch_size=None)
    assert table.schema.equals(PROMPT_SCHEMA)
    assert table["prompt_id"].to_pylist() == ["a.jsonl:1", "a.jsonl:2", "3"]
    assert [json.loads(extra) for extra in table["extra"].to_pylist()] == [
        {"extra_number": 1},
        {"extra_number": "text"},
        {},
    ]


def test_a_glob_is_read_in_order_whatever_the_number_of_tasks(tmp_path: Path) -> None:
    rows = source_rows()
    pattern = write_shards(tmp_path, rows, [1, 70, 0, 9, 50, 20])
    expected = [row["prompt_id"] for row in rows]
    for tasks in (None, 1, 3, 40):
        assert [row["prompt_id"] for row in read(pattern, override_num_blocks=tasks)] == expected
    assert [row["prompt_id"] for row in read(pattern, limit=75)] == expected[:75]


@pytest.mark.parametrize("strategy", ["missing_context", "random_context", "random_prompt", "swapped_response"])
def test_conditioning_does_not_depend_on_parallelism(tmp_path: Path, strategy: str) -> None:
    rows = source_rows()
    write_jsonl(tmp_path / "one.jsonl", rows)
    layouts = [(str(tmp_path / "one.jsonl"), 1), (write_shards(tmp_path, rows, [1, 70, 0, 9, 50, 20]), 5)]
    layouts.append((layouts[0][0], 40))
    results = []
    for path, tasks in layouts:
        prompts, summary = checked(path)
        blocks = blocks_of(
            read_prompts(prompts, summary, override_num_blocks=tasks), rows_per_block(summary.rows, BLOCK_SIZE)
        )
        conditioned = blocks.map_batches(
            cast(Any, condition_block),
            batch_format="pyarrow",
            batch_size=None,
            fn_kwargs={
                "conditioning": ConditioningConfig.model_validate({"strategy": strategy}),
                "prompts": prompts,
                "seed": 3,
                "round_index": 1,
                "negatives": 2,
            },
        )
        results.append(conditioned.take_all())
    assert results[0] == results[1] == results[2]
    assert [row["prompt_id"] for row in results[0]] == [row["prompt_id"] for row in rows]
    size = rows_per_block(ROWS, BLOCK_SIZE)
    block_ids = [row["block_id"] for row in results[0]]
    for start in range(0, ROWS, size):
        assert len(set(block_ids[start : start + size])) == 1
    assert len(set(block_ids)) == -(-ROWS // size)


def test_blocks_are_exact_when_tasks_end_out_of_order(tmp_path: Path) -> None:
    rows = source_rows()
    prompts, summary = checked(write_shards(tmp_path, rows, [25] * 6))

    def first_files_last(table: pa.Table) -> pa.Table:
        import time

        time.sleep(0.15 * (ROWS - int(table["prompt_id"][0].as_py())) / 25)
        return table

    dataset = read_prompts(prompts, summary).map_batches(first_files_last, batch_format="pyarrow", batch_size=None)
    blocks = blocks_of(dataset, rows_per_block(summary.rows, 20))
    found = blocks.map_batches(
        lambda table: pa.table({"ids": [table["prompt_id"].to_pylist()]}), batch_format="pyarrow", batch_size=None
    ).take_all()
    size = rows_per_block(ROWS, 20)
    expected = [[row["prompt_id"] for row in rows[start : start + size]] for start in range(0, ROWS, size)]
    assert [row["ids"] for row in found] == expected


@pytest.mark.parametrize(("change", "found"), [(-1, ROWS - 1), (1, ROWS + 1)])
def test_a_file_that_changed_after_the_check_is_refused(tmp_path: Path, change: int, found: int) -> None:
    rows = source_rows()
    path = tmp_path / "a.jsonl"
    write_jsonl(path, rows)
    prompts, summary = checked(str(path))
    write_jsonl(path, (rows + rows)[: ROWS + change])
    with pytest.raises(RayTaskError, match=f"had {ROWS} rows when it was checked, found {found} now"):
        read_prompts(prompts, summary).take_all()
    rows[7] = {**rows[7], "prompt": rows[7]["prompt"].replace("7", "8")}  # as many rows, as many bytes
    write_jsonl(path, rows)
    with pytest.raises(RayTaskError, match=f"a.jsonl: the {ROWS} rows had content hash"):
        read_prompts(prompts, summary).take_all()


def test_loader_and_template_are_applied_by_check_and_read_tasks_alike(tmp_path: Path) -> None:
    survey = [
        {"user_id": f"user{i}", "self_description": f"I like {i}.", "system_string": "", "stated_prefs": None}
        for i in range(4)
    ]
    write_jsonl(tmp_path / "survey.jsonl", survey)
    for shard in range(3):
        conversations = [
            {"conversation_id": f"c{shard}-{i}", "user_id": f"user{i}", "opening_prompt": "" if i == 2 else f"Why {i}?"}
            for i in range(4)
        ]
        write_jsonl(tmp_path / f"conversations-{shard}.jsonl", conversations)
    rows = read(
        f"{tmp_path}/conversations-*.jsonl",
        loader="prism",
        profiles_path=str(tmp_path / "survey.jsonl"),
        question_template="{{ prompt }} ({{ conversation_id }})",
        context_role="system",
    )
    assert [row["prompt_id"] for row in rows] == [f"c{shard}-{i}" for shard in range(3) for i in (0, 1, 3)]
    assert rows[-1]["messages"] == [
        {"role": "system", "content": "Self-description: I like 3."},
        {"role": "user", "content": "Why 3? (c2-3)"},
    ]


def test_bundled_prompts_are_read_by_name() -> None:
    rows = read("bundled:personalization_heldout")
    assert len(rows) == 60
    assert rows[0]["prompt_id"] == "test-01-01"
    assert rows[0]["messages"][0]["content"] == f"{rows[0]['context']}\n\n{rows[0]['question_messages'][0]['content']}"
