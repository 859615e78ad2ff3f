"""The check of whole prompt files: what it counts and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mipo_ray.conditioning.needs import check_held_out, check_training_prompts
from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.prompts import check as prompt_check
from mipo_ray.prompts.check import PromptNeeds, PromptSummary, check_prompts
from mipo_ray.prompts.files import find_files
from mipo_ray.prompts.reading import read_rows
from mipo_ray.prompts.rows import normalize_row


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


MISMATCH = PromptNeeds(mismatch=True)


def check(path: str, needs: PromptNeeds = MISMATCH, **config: Any) -> PromptSummary:
    return check_prompts(PromptsConfig(path=path, **config), needs)


def trained(path: str, generation: dict[str, Any] | None = None, **conditioning: Any) -> PromptSummary:
    sections = {"prompts": {"path": path}, "conditioning": conditioning, "generation": generation or {}}
    return check_training_prompts(Config.model_validate(sections))


def not_trained(path: str, **arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        trained(path, **arguments)
    return str(error.value)


def refused(path: str, **arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        check(path, **arguments)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "rows", "with_context"),
    [
        ("personalization", 320, 320),
        ("personalization_dev", 48, 48),
        ("personalization_heldout", 60, 60),
        ("instructions", 240, 0),
    ],
)
def test_bundled_files_pass(name: str, rows: int, with_context: int) -> None:
    summary = check(f"bundled:{name}")
    assert summary.files == (f"bundled:{name}",)
    assert (summary.rows, summary.rows_with_context, summary.distinct_texts) == (rows, with_context, rows)
    assert summary.format == "JSONL"


def test_rows_are_counted_by_file_over_a_glob_of_formats(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": "one", "context": "c"}, {"prompt": "two"}])
    (tmp_path / "b.csv").write_text("prompt,context\ntwo,\nthree,d\n")
    pq.write_table(pa.table({"prompt": ["four"]}), tmp_path / "c.parquet")
    write(tmp_path / "d.jsonl", [])
    summary = check(f"{tmp_path}/*")
    assert [Path(file).name for file in summary.files] == ["a.jsonl", "b.csv", "c.parquet", "d.jsonl"]
    assert summary.file_rows == (2, 2, 1, 0)
    assert (summary.rows, summary.rows_with_context, summary.distinct_texts) == (5, 2, 4)
    assert summary.format == "CSV, JSONL, Parquet"


def test_limit_uses_the_first_rows_and_looks_at_no_other(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    write(tmp_path / "b.jsonl", [{"prompt": "three"}, {"prompt": 4}])
    summary = check(f"{tmp_path}/*.jsonl", limit=3)
    assert (summary.file_rows, summary.rows, summary.distinct_texts) == ((2, 1), 3, 3)
    assert check(f"{tmp_path}/*.jsonl", limit=2).file_rows == (2, 0)
    assert "b.jsonl, line 2, field 'prompt'" in refused(f"{tmp_path}/*.jsonl", limit=4)


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.csv", ""), ("a.csv", "prompt\n")]
)
def test_empty_file(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert refused(str(tmp_path / name)) == f"{tmp_path / name}: expected prompts, found no row"


def test_empty_parquet_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert refused(str(tmp_path / "a.parquet")).endswith("a.parquet: expected prompts, found no row")


def test_row_without_the_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "one"}, {"promt": "two"}])
    assert refused(path) == f"{path}, line 2: no column 'prompt'; the row has the columns: promt; did you mean 'promt'?"


def test_parquet_column_of_another_type(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [1, 2]}), tmp_path / "a.parquet")
    assert "a.parquet, row 1, field 'prompt': expected a string or a list" in refused(str(tmp_path / "a.parquet"))


def test_parquet_with_chat_messages(tmp_path: Path) -> None:
    chats = [
        [{"role": "user", "content": "one"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "two"}],
    ]
    pq.write_table(pa.table({"chat": chats}), tmp_path / "a.parquet")
    assert check(str(tmp_path / "a.parquet"), column="chat").distinct_texts == 2


def test_duplicate_id_names_both_rows(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"prompt": "one", "prompt_id": "x"}, {"prompt": "two", "prompt_id": "7"}])
    second = write(tmp_path / "b.jsonl", [{"prompt": "three", "prompt_id": 7}])
    assert refused(f"{tmp_path}/*.jsonl") == (
        f"{second}, line 1, field 'prompt_id': expected a unique id, found '7', which is also the id of {first}, line 2"
    )


def test_ids_of_equal_hash_are_no_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": name, "prompt_id": name} for name in ("a", "bb", "cc", "ddd")])
    fake_hash = len  # "bb" and "cc" collide
    monkeypatch.setattr(prompt_check, "_hash", fake_hash)
    assert check(path).rows == 4


def test_one_single_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "one", "context": "c"}])
    assert refused(path).startswith(f"{path}, line 1, field 'prompt': found one single prompt")
    assert check(path, PromptNeeds("every")).rows == 1
    two = write(tmp_path / "b.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    assert "one single prompt" in refused(two, limit=1)


def test_all_prompts_equal(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "one"}, {"prompt": " one\n"}, {"prompt": "one"}])
    assert refused(path) == (
        f"{path}, line 1, field 'prompt': expected at least two different prompts, found the same text in all 3 rows"
    )


def test_one_single_group(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "one", "group": "g"}, {"prompt": "two", "group": "g"}])
    assert f"{path}, line 1, field 'group': expected at least two groups" in refused(path)
    write(tmp_path / "a.jsonl", [{"prompt": "one", "group": "g"}, {"prompt": "two"}])
    assert check(path).rows == 2


def test_no_row_has_a_context(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", "kontext": "c"} for i in range(5)]
    path = write(tmp_path / "a.jsonl", rows)
    message = not_trained(path, strategy="missing_context")
    assert message.startswith(
        f"{path}, line 1; {path}, line 2; {path}, line 3 and 2 more, field 'context': expected a context"
    )
    assert message.endswith("columns: prompt, kontext; did you mean 'kontext'?")
    assert check(path).rows_with_context == 0
    write(tmp_path / "a.jsonl", [*rows, {"prompt": "last", "context": "c"}])
    assert trained(path, strategy="missing_context", fallback="drop").rows_with_context == 1


MIXTURE = {"strategy": "mixture", "mixture": {"random_prompt": 1, "missing_context": 3}}


@pytest.mark.parametrize("conditioning", [{"strategy": "missing_context"}, {"strategy": "random_context"}, MIXTURE])
def test_without_a_fallback_every_row_must_have_a_needed_context(tmp_path: Path, conditioning: dict[str, Any]) -> None:
    contexts = ["a", "", "b", "", " ", "", "c"]
    rows = [{"prompt": f"question {i}", "context": context} for i, context in enumerate(contexts)]
    path = write(tmp_path / "a.jsonl", rows)
    message = not_trained(path, **conditioning)
    assert message.startswith(
        f"{path}, line 2; {path}, line 4; {path}, line 5 and 1 more, field 'context': expected a context in every row "
        f"(strategy {'missing_context' if conditioning is MIXTURE else conditioning['strategy']}), found none in 4 of 7"
    )
    for fallback in ("drop", "random_prompt"):
        assert trained(path, fallback=fallback, **conditioning).rows_with_context == 3
    # Held-out rows without a context are compared with other prompts instead.
    sections = {"evaluate": {"prompts": {"path": path}, "other_prompts": 2}, "conditioning": conditioning}
    assert check_held_out(Config.model_validate(sections)).rows == 7


def test_a_fallback_that_needs_a_context_must_find_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    message = not_trained(path, strategy="partial_prompt", fallback="missing_context")
    assert "expected a context in at least one row (strategy missing_context)" in message


@pytest.mark.parametrize(
    ("people", "found"),
    [
        ([("ada", "I ski."), ("ben", "I  ski. "), ("", "")], "found the same context in all 2 rows with one"),
        ([("ada", "I ski."), ("ada", "I sail."), ("ben", "")], "found group 'ada' in all 2 rows with a context"),
        ([("ada", "I ski."), ("ada", "I sail."), ("ben", "I ski.")], ""),
        ([("", "I ski."), ("", "I sail.")], ""),
    ],
)
def test_random_context_needs_the_context_of_somebody_else(
    tmp_path: Path, people: list[tuple[str, str]], found: str
) -> None:
    rows = [{"prompt": f"question {i}", "group": who, "context": what} for i, (who, what) in enumerate(people)]
    path = write(tmp_path / "a.jsonl", rows)
    if found:
        message = not_trained(path, strategy="random_context", fallback="drop")
        assert message.startswith(f"{path}, line 1, field 'context': strategy random_context expects at least two")
        assert message.endswith(found)
    else:
        assert trained(path, strategy="random_context", fallback="drop").distinct_contexts == 2


BOTH = {"strategy": "mixture", "mixture": {"random_prompt": 1, "random_context": 1}}


@pytest.mark.parametrize(
    ("block_size", "conditioning", "most"),
    [
        (32, {"strategy": "random_prompt"}, 5),  # 6 texts in one block of 24 rows
        (4, {"strategy": "swapped_response"}, 3),  # blocks of 4
        (5, {"strategy": "random_prompt"}, 3),  # blocks of 5 rows and, at the end, one of 4
        (32, {"strategy": "random_context"}, 2),  # 3 contexts
        (32, BOTH, 2),
        (32, {"strategy": "partial_prompt", "fallback": "random_prompt"}, 5),
    ],
)
def test_negatives_are_bound_by_different_texts_contexts_and_the_smallest_block(
    tmp_path: Path, block_size: int, conditioning: dict[str, Any], most: int
) -> None:
    rows = [{"prompt": f"question {i % 6}", "context": f"context {i % 3}", "group": str(i % 3)} for i in range(24)]
    path = write(tmp_path / "a.jsonl", rows)
    assert trained(path, {"negatives_per_prompt": most}, block_size=block_size, **conditioning).rows == 24
    message = not_trained(path, generation={"negatives_per_prompt": most + 1}, block_size=block_size, **conditioning)
    assert message.startswith(f"generation.negatives_per_prompt: expected at most {most} for strategy ")
    assert message.endswith(f"found {most + 1}")
    # Sampled again under the same prompt, as often as one likes.
    assert trained(path, {"negatives_per_prompt": 30}, block_size=2, strategy="missing_context").rows == 24


def test_question_template_stands_for_the_column(tmp_path: Path) -> None:
    rows = [{"Body": f"Ann has {i} pears.", "Question": "How many?", "prompt": i} for i in range(3)]
    path = write(tmp_path / "a.jsonl", rows)
    assert check(path, question_template="{{ Body }} {{ Question }}").distinct_texts == 3
    assert check(path, question_template="{{ Body }}", context_column="Question").rows_with_context == 3
    message = refused(path, question_template="{% if false %}{{ Qestion }}{% endif %}{{ Body }}")
    assert message == (
        f"{path}, line 1: no column 'Qestion', which question_template uses; the row has the columns: Body, "
        "Question, prompt; did you mean 'Question'?"
    )
    assert "line 1, question_template: expected at least two different prompts" in refused(
        path, question_template="{{ Question }}"
    )


@pytest.mark.parametrize("key", ["context_column", "group_column", "id_column"])
def test_a_named_column_must_exist(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "one", "nickname": None}, {"prompt": "two"}])
    wrong: dict[str, Any] = {key: "nicknam"}
    right: dict[str, Any] = {key: "nickname"}
    columns = "columns: prompt, nickname; did you mean 'nickname'?"
    assert refused(path, **wrong) == f"prompts.{key}: no row has the column 'nicknam'; {columns}"
    assert check(path, **right).rows == 2


def test_one_column_cannot_serve_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "one"}])
    message = refused(path, context_column="prompt")
    assert message == "prompts.context_column: column 'prompt' is already used by prompts.column"


def test_template_errors_name_the_section(tmp_path: Path) -> None:
    config = PromptsConfig(path="bundled:personalization", context_template="{{ contxt }} {{ question }}")
    with pytest.raises(UserError, match=r"^evaluate\.prompts\.context_template: unknown variable 'contxt'"):
        check_prompts(config, PromptNeeds("some", mismatch=True), section="evaluate.prompts")


def test_the_check_imports_no_engine_and_no_cluster() -> None:
    program = (
        "import sys, mipo_ray.prompts.check;"
        "print([name for name in ('ray', 'torch', 'vllm', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def held_out(path: str, *, model: str | None = "org/judge", protocol: str = "pointwise", **prompts: Any) -> Config:
    judge = {"model": model, "protocols": [protocol]}
    evaluate = {"prompts": {"path": path, **prompts}, "judge": judge, "other_prompts": 1}
    return Config.model_validate({"evaluate": evaluate, "conditioning": {"strategy": "random_prompt"}})


def test_the_pointwise_judge_needs_a_reference_in_every_row(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{index}", "answer": "x", **({"reference": "r"} if index % 2 else {})} for index in range(10)]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError) as error:
        check_held_out(held_out(path))
    assert str(error.value).startswith(
        f"{path}, line 1; {path}, line 3; {path}, line 5 and 2 more, field 'reference': evaluate.judge.protocols "
        "pointwise expects a reference answer in every row, found none in 5 of 10 rows; name its column as "
        "evaluate.prompts.reference_column, or judge pairwise; columns: prompt, answer, reference"
    )
    assert check_held_out(held_out(path, protocol="pairwise")).rows == 10
    assert check_held_out(held_out(path, model=None)).rows == 10
    assert check_held_out(held_out(path, reference_column="answer")).rows == 10
    with pytest.raises(UserError, match=r"no row has the column 'answr'.*did you mean 'answer'"):
        check_held_out(held_out(path, reference_column="answr"))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_missing_value_is_missing_from_the_prompt_and_beside_it(tmp_path: Path, suffix: str) -> None:
    """Alpaca's optional input, contexts, groups, ids and references that pandas wrote as NaN."""
    nan = float("nan")
    rows = [
        {"prompt": "One?", "input": nan, "context": nan, "group": nan, "prompt_id": nan, "reference": nan},
        {"prompt": "Two?", "input": nan, "context": nan, "group": nan, "prompt_id": nan, "reference": nan},
    ]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write(path, rows)
    prompts = PromptsConfig(
        path=str(path), question_template="{{ prompt }}{% if input %} {{ input }}{% endif %}", id_column="prompt_id"
    )
    found = [normalize_row(source, prompts) for file in find_files(str(path)) for source in read_rows(file)]
    assert [row["messages"][-1]["content"] for row in found] == ["One?", "Two?"]
    assert {(row["context"], row["group"], row["reference"]) for row in found} == {("", "", "")}
    assert all("nan" not in json.dumps(row).lower() for row in found)
    assert check_prompts(prompts, PromptNeeds(mismatch=True)).rows_with_context == 0
    with pytest.raises(
        UserError, match=rf"rows\.{suffix}, .* 1, field 'input': expected a string or a list .* found null"
    ):
        check_prompts(PromptsConfig(path=str(path), column="input"), PromptNeeds())
