"""What there is to judge, from an evaluate stage that the tests write; and by which definition it was judged.

python -m pytest tests/unit/evaluation/judge/test_rows.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mipo_ray.config.recipe import load_config
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.evaluation.judge.prompts import judge_prompt
from mipo_ray.evaluation.judge.rows import (
    check_judge,
    definition,
    judged_protocols,
    judgement_rows,
    refuse_other_definition,
)
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory, StorageError

FIRST = Round(0)
PROMPTS = [
    {"prompt_id": f"p{index}", "prompt": f"Question {index}?", "context": f"I am {index}.", "reference": f"ref {index}"}
    for index in range(3)
]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run of one round whose base and policy have answered three prompts twice."""
    write_prompts(tmp_path, PROMPTS)
    config = configured(tmp_path)
    run = RunDirectory(config.run_dir)
    for round in (BASE, Round(0)):
        answer(run, round)
        run.commit(run.stage(round, "evaluate"), config, {})
    return config


def write_prompts(directory: Path, rows: list[dict[str, Any]]) -> None:
    (directory / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def configured(directory: Path, *overrides: str) -> Config:
    paths = [f"run_dir={directory}/run", f"evaluate.prompts.path={directory}/held_out.jsonl", "rounds=1"]
    judge = ["evaluate.judge.model=org/judge", "evaluate.judge.endpoint=http://localhost:1/v1"]
    both = "evaluate.judge.protocols=[pairwise, pointwise]"
    return load_config(None, [*paths, *judge, both, *overrides])


def answer(run: RunDirectory, round: Round) -> None:
    directory = Path(run.path(run.stage(round, "evaluate"), "responses"))
    directory.mkdir(parents=True)
    rows = [
        {
            "prompt_id": prompt["prompt_id"],
            "sample": sample,
            "kind": kind,
            "source": f"{prompt['context']}\n\n{prompt['prompt']}",
            "response": f"{kind} {sample} of {'base' if round.is_base else 'policy'} to {prompt['prompt_id']}",
        }
        for prompt in reversed(PROMPTS)
        for kind, sample in (("answer", 1), ("answer", 0), ("rejected", 0))
    ]
    pq.write_table(pa.Table.from_pylist(rows), directory / "part.parquet")


def rows_of(config: Config, protocol: Any, round: Round = FIRST) -> list[dict[str, Any]]:
    prompt = judge_prompt(config.evaluate.judge, protocol)
    return judgement_rows(config, RunDirectory(config.run_dir), round, prompt).to_pylist()


def test_each_pair_is_judged_in_both_orders(config: Config) -> None:
    rows = rows_of(config, "pairwise")
    expected = [(prompt, sample, order) for prompt in ("p0", "p1", "p2") for sample in (0, 1) for order in (0, 1)]
    orders = ("base_first", "policy_first")
    assert [(row["prompt_id"], row["sample"], orders.index(row["order"])) for row in rows] == expected
    assert len({row["judgement_id"] for row in rows}) == len(rows)
    for row in rows:
        pair = [f"answer {row['sample']} of {policy} to {row['prompt_id']}" for policy in ("base", "policy")]
        assert row["answers"] == (pair if row["order"] == "base_first" else pair[::-1])
        assert row["prompt"].index(row["answers"][0]) < row["prompt"].index(row["answers"][1])
        number = row["prompt_id"][1:]
        assert f"\nQuestion {number}?\n" in row["prompt"]
        assert f"\nI am {number}.\n" in row["prompt"]
        assert "rejected" not in row["prompt"]
        assert row["reference"] == ""


@pytest.mark.parametrize(("round", "policy"), [(BASE, "base"), (Round(0), "policy")])
def test_each_answer_is_rated_beside_its_reference(config: Config, round: Round, policy: str) -> None:
    rows = rows_of(config, "pointwise", round)
    assert [row["judgement_id"] for row in rows] == ["p0/0", "p0/1", "p1/0", "p1/1", "p2/0", "p2/1"]
    for row in rows:
        assert row["answers"] == [f"answer {row['sample']} of {policy} to {row['prompt_id']}"]
        assert row["reference"] == f"ref {row['prompt_id'][1:]}"
        assert f"\n{row['reference']}\n" in row["prompt"]
        assert row["order"] == ""


def test_a_judge_is_shown_answers_without_thoughts(config: Config) -> None:
    run = RunDirectory(config.run_dir)
    path = Path(run.path(run.stage(FIRST, "evaluate"), "responses")) / "part.parquet"
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        row["response"] = f"<think>secret {row['sample']}" + ("</think>\n\nSaid." if row["sample"] else "")
    pq.write_table(pa.Table.from_pylist(rows), path)
    for row in rows_of(config, "pointwise"):
        assert row["answers"] == ["Said." if row["sample"] else ""]
        assert "secret" not in row["prompt"]


def test_the_base_is_not_compared_with_itself(config: Config) -> None:
    judge = config.evaluate.judge
    assert judged_protocols(judge, BASE) == ("pointwise",)
    assert judged_protocols(judge, Round(0)) == ("pairwise", "pointwise")
    assert judged_protocols(Config().evaluate.judge, Round(0)) == ()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"prompt": "Another question?"}, "prompt 'p1': expected what the policies answered, found other text"),
        ({"context": "I am another."}, "prompt 'p1': expected what the policies answered, found other text"),
        ({"prompt_id": "q1"}, "prompt 'p1': expected what the policies answered, found no such prompt"),
    ],
)
def test_prompts_that_changed_are_refused(config: Config, tmp_path: Path, change: dict[str, str], found: str) -> None:
    write_prompts(tmp_path, [PROMPTS[0], {**PROMPTS[1], **change}, PROMPTS[2]])
    with pytest.raises(UserError, match=found):
        rows_of(config, "pairwise")


def test_a_row_without_a_reference_is_named(config: Config, tmp_path: Path) -> None:
    write_prompts(tmp_path, [PROMPTS[0], {**PROMPTS[1], "reference": None}, PROMPTS[2]])
    with pytest.raises(UserError, match="prompt 'p1', field 'reference': expected a reference answer, found none"):
        rows_of(config, "pointwise")
    assert len(rows_of(config, "pairwise")) == 12


def judged(config: Config, round: Round, protocol: Any) -> None:
    run = RunDirectory(config.run_dir)
    run.commit(run.stage(round, f"judge/{protocol}"), config, definition(config, run, round, protocol))


def refused(config: Config) -> str:
    with pytest.raises(StorageError) as error:
        check_judge(config, RunDirectory(config.run_dir))
    return str(error.value)


def test_finished_judgements_of_another_definition_are_refused(config: Config, tmp_path: Path) -> None:
    run = RunDirectory(config.run_dir)
    for round, protocol in ((BASE, "pointwise"), (Round(0), "pairwise"), (Round(0), "pointwise")):
        judged(config, round, protocol)
    check_judge(config, run)
    # Where the judge runs, and how patiently it is asked, changes no judgement.
    elsewhere = ["evaluate.judge.endpoint=http://other:2/v1", "evaluate.judge.max_retries=9"]
    check_judge(configured(tmp_path, *elsewhere, "evaluate.judge.max_unreadable_share=0.9"), run)

    assert "  temperature: 0.0 there, 0.5 now" in refused(configured(tmp_path, "evaluate.judge.temperature=0.5"))
    assert "  model: 'org/judge' there, 'org/x' now" in refused(configured(tmp_path, "evaluate.judge.model=org/x"))
    (tmp_path / "mine.j2").write_text("{{ question }} {{ answer_a }} {{ answer_b }}")
    message = refused(configured(tmp_path, f"evaluate.judge.pairwise_template={tmp_path}/mine.j2"))
    assert message.startswith(f"{run.path('rounds/000/judge/pairwise')}: was judged by another definition")
    assert "prompt_hash" in message
    assert "  prompt:" not in message


def test_answers_that_were_made_again_are_not_taken_for_judged(config: Config) -> None:
    run = RunDirectory(config.run_dir)
    judged(config, FIRST, "pairwise")
    path = Path(run.path("base/evaluate/manifest.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "finished": "2031-01-01T00:00:00Z"}))
    with pytest.raises(StorageError, match=r"answers: .*2031-01-01T00:00:00Z"):
        refuse_other_definition(config, run, FIRST, "pairwise")
