"""What there is to judge, from an evaluate stage that the tests write; and by which definition it was judged.

python -m pytest tests/unit/evaluation/judge/test_rows.py
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mipo_ray import evaluate
from mipo_ray.conditioning.needs import check_held_out
from mipo_ray.config.recipe import load_config, to_yaml
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.evaluation.judge.requests import Judged, note_requests, stored_requests
from mipo_ray.evaluation.judge.rows import (
    JUDGEMENT_SCHEMA,
    check_judge,
    definition,
    judged_protocols,
    judgement_rows,
    refuse_other_definition,
    refuse_other_references,
)
from mipo_ray.judge.prompts import judge_prompt
from mipo_ray.monitoring.events import NO_EVENTS
from mipo_ray.planning import plan
from mipo_ray.ray_cluster.resources import Resources
from mipo_ray.session import Session
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory, StorageError
from tests.helpers.stages import commit, edit_manifest

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
        commit(run, run.stage(round, "evaluate"), config)
    return config


def write_prompts(directory: Path, rows: list[dict[str, Any]]) -> None:
    (directory / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def configured(directory: Path, *overrides: str) -> Config:
    paths = [f"run_dir={directory}/run", f"evaluate.prompts.path={directory}/held_out.jsonl", "rounds=1"]
    paths += ["evaluate.other_prompts=1"]
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
    run, held_out = RunDirectory(config.run_dir), check_held_out(config)
    return judgement_rows(config, run, round, prompt, held_out).to_pylist()


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


def test_a_row_without_a_reference_is_named_by_the_check(config: Config, tmp_path: Path) -> None:
    write_prompts(tmp_path, [PROMPTS[0], {**PROMPTS[1], "reference": None}, PROMPTS[2]])
    with pytest.raises(UserError, match=r"held_out\.jsonl, line 2, field 'reference': evaluate\.judge"):
        rows_of(config, "pointwise")
    assert len(rows_of(configured(tmp_path, "evaluate.judge.protocols=[pairwise]"), "pairwise")) == 12


@pytest.mark.parametrize("protocol", ["pairwise", "pointwise"])
@pytest.mark.parametrize(
    ("edited", "found"),
    [
        ([{**PROMPTS[0], "reference": "ref 9"}, *PROMPTS[1:]], "the 3 rows had content hash"),
        ([{**PROMPTS[0], "context": "I am 9."}, *PROMPTS[1:]], "the 3 rows had content hash"),
        ([PROMPTS[1], PROMPTS[0], PROMPTS[2]], "the 3 rows had content hash"),
        (PROMPTS[:2], "had 3 rows when it was checked, found 2 now"),
        ([*PROMPTS, {**PROMPTS[0], "prompt_id": "p9"}], "had 3 rows when it was checked, found 4 now"),
    ],
    ids=["reference", "context", "order", "fewer", "more"],
)
def test_a_file_that_is_edited_after_the_check_is_refused(
    config: Config, tmp_path: Path, protocol: Any, edited: list[dict[str, Any]], found: str
) -> None:
    held_out, path = check_held_out(config), tmp_path / "held_out.jsonl"
    before = path.stat()
    write_prompts(tmp_path, edited)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    prompt = judge_prompt(config.evaluate.judge, protocol)
    with pytest.raises(UserError, match=f"{path}: {found}"):
        judgement_rows(config, RunDirectory(config.run_dir), FIRST, prompt, held_out)


def rated(config: Config, round: Round) -> None:
    """The answers of a policy as a pointwise judge rated them."""
    run = RunDirectory(config.run_dir)
    rows = [{**row, "judgement": "4", "parsed": "4"} for row in rows_of(config, "pointwise", round)]
    stage = run.stage(round, "judge/pointwise")
    os.makedirs(run.path(stage))
    pq.write_table(pa.Table.from_pylist(rows, JUDGEMENT_SCHEMA), run.path(stage, "part.parquet"))
    commit(run, stage, config, files=["part.parquet"], **vars(definition(config, run, round, "pointwise")))


@pytest.mark.parametrize("round", [BASE, FIRST])
def test_references_that_changed_since_answers_were_rated_are_refused(
    config: Config, tmp_path: Path, round: Round
) -> None:
    run = RunDirectory(config.run_dir)
    rated(config, round)
    refuse_other_references(config, run, check_held_out(config))

    write_prompts(tmp_path, [*PROMPTS[:2], {**PROMPTS[2], "reference": "another"}])
    with pytest.raises(UserError) as error:
        refuse_other_references(config, run, check_held_out(config))
    assert f"{tmp_path}/held_out.jsonl, prompt 'p2', field 'reference'" in str(error.value)
    assert "rated beside ('ref 2'), found 'another'" in str(error.value)
    assert run.path(round.directory, "judge/pointwise") in str(error.value)
    # Who compares answers with each other reads no reference.
    pairwise = configured(tmp_path, "evaluate.judge.protocols=[pairwise]")
    refuse_other_references(pairwise, run, check_held_out(pairwise))

    # What no judge reads may change.
    write_prompts(tmp_path, [{**prompt, "note": "new"} for prompt in PROMPTS])
    refuse_other_references(config, run, check_held_out(config))


def test_both_commands_refuse_them_before_ray_starts(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (evaluate, plan):
        monkeypatch.setattr(command, "check_model", lambda path: None)
    run = RunDirectory(config.run_dir)
    run.write_text("config.yaml", to_yaml(config))
    rated(config, BASE)
    checks = (plan.check_inputs, lambda config, run: evaluate.check_evaluation_inputs(config, run, [0]))
    for check in checks:
        check(config, run)
    write_prompts(tmp_path, [{**PROMPTS[0], "reference": "another"}, *PROMPTS[1:]])
    for check in checks:
        with pytest.raises(UserError, match=r"held_out\.jsonl, prompt 'p0', field 'reference'"):
            check(config, run)


def test_requests_with_references_of_an_edited_file_are_not_gone_on_with(config: Config, tmp_path: Path) -> None:
    resources = Resources(on_gpu=False, dtype="float32", gpus_per_engine=0.0, gpus_per_worker=0.0)
    session = Session(config, RunDirectory(config.run_dir), resources, NO_EVENTS)

    def stored(protocol: Any, *, note: bool = False) -> int | None:
        stage = session.stage(FIRST, f"judge/{protocol}")
        asked_by = Judged(stage, protocol, check_held_out(config)).asked_by
        if note:
            note_requests(stage.run, stage.directory, replace(asked_by, judgements=12))
        return stored_requests(stage.run, stage.directory, asked_by)

    assert stored("pointwise", note=True) == stored("pairwise", note=True) == 12
    write_prompts(tmp_path, [{**PROMPTS[0], "reference": "another"}, *PROMPTS[1:]])
    assert (stored("pointwise"), stored("pairwise")) == (None, 12)


def judged(config: Config, round: Round, protocol: Any) -> None:
    run = RunDirectory(config.run_dir)
    commit(run, run.stage(round, f"judge/{protocol}"), config, **vars(definition(config, run, round, protocol)))


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
    check_judge(configured(tmp_path, *elsewhere, "evaluate.judge.timeout_seconds=9"), run)

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
    edit_manifest(
        Path(run.path("base/evaluate/manifest.json")), lambda values: values.update(finished="2031-01-01T00:00:00Z")
    )
    with pytest.raises(StorageError, match=r"answers: .*2031-01-01T00:00:00Z"):
        refuse_other_definition(config, run, FIRST, "pairwise")
