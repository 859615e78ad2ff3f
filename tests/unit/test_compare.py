"""The command `compare` without an engine: recipes, refusals, equal data, the control, the table, the page.

python -m pytest tests/unit/test_compare.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from safetensors.numpy import save_file

from mipo_ray.compare import main
from mipo_ray.comparison import arms
from mipo_ray.comparison.arms import common_pairs, kept_pairs
from mipo_ray.comparison.definition import BASE, Comparison, describe_arm, load_comparison
from mipo_ray.comparison.findings import control_sentences, findings, measures_of
from mipo_ray.comparison.outcome import gather, stage_seconds
from mipo_ray.comparison.records import EqualData
from mipo_ray.comparison.tables import dot_chart, markdown, render, write_comparison
from mipo_ray.config.recipe import ConfigError, load_config, to_yaml
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.evaluation.held_out.metrics import MeasuredRows, measure
from mipo_ray.evaluation.held_out.rows import measured_rows
from mipo_ray.evaluation.held_out.stage import RESPONSE_SCHEMA
from mipo_ray.monitoring.events import NO_EVENTS, Events
from mipo_ray.pairs.label_control import has_swapped_labels, shuffle_labels
from mipo_ray.pairs.schema import as_version_2
from mipo_ray.planning.plan import Plan, check_inputs, make_plan
from mipo_ray.ray_cluster.resources import Node
from mipo_ray.report import run_report
from mipo_ray.session import Session
from mipo_ray.storage import rounds
from mipo_ray.storage.entries import Entry, Evaluated
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import RunDirectory, StorageError
from mipo_ray.training.stage import pair_set_hash
from tests.helpers.stages import SUMMARY, commit

ARMS: dict[str, Any] = {
    "mipo": {},
    "control": {"train": {"shuffle_labels": True}},
    "sft": {"train": {"objective": "sft"}},
    "random_context": {"conditioning": {"strategy": "random_context"}},
}


def write_recipe(directory: Path, **values: Any) -> Path:
    recipe = {"run_dir": str(directory / "comparison"), "rounds": 1, "arms": ARMS} | values
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return directory / "recipe.yaml"


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    return load_comparison(write_recipe(tmp_path))


# The recipe


def test_arms_are_the_recipe_with_overrides(tmp_path):
    (tmp_path / "shared.yaml").write_text("train: {beta: 0.3, learning_rate: 1e-5}\nprompts: {limit: 7}\n")
    recipe = write_recipe(tmp_path, base="shared.yaml", seeds=[0, 3])
    comparison = load_comparison(recipe, ["prompts.limit=9", "arms.sft.train.learning_rate=2e-5"])
    assert list(comparison.arms) == list(ARMS)
    assert comparison.seeds == (0, 3)
    assert comparison.controls == ["control"]
    assert {config.train.beta for config in comparison.arms.values()} == {0.3}
    assert {config.prompts.limit for config in [comparison.shared, *comparison.arms.values()]} == {9}
    assert comparison.arms["sft"].train.learning_rate == 2e-5
    assert comparison.arms["mipo"].train.learning_rate == 1e-5
    config = comparison.config("sft", 3)
    assert (config.seed, config.run_dir) == (3, f"{tmp_path}/comparison/sft/seed-3")
    assert comparison.config(BASE, 0).run_dir == f"{tmp_path}/comparison/base/seed-0"
    assert comparison.runs()[:5] == [("mipo", 0), ("control", 0), ("sft", 0), ("random_context", 0), ("mipo", 3)]


def test_arms_that_sample_the_same_share_their_pairs(comparison):
    assert [comparison.same_pairs(arm) for arm in ARMS] == ["mipo", "mipo", "mipo", "random_context"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arms": {}}, "arms: expected a mapping of arms"),
        ({"arms": ["sft"]}, "arms: expected a mapping of arms"),
        ({"arms": {"base": {}}}, "other than base (which is always measured); found base"),
        ({"arms": {"A b": {}}}, "found A b"),
        ({"arms": {"a": 3}}, "arms.a: expected a mapping of configuration keys, found 3"),
        ({"arms": {"a": {"train": {"bata": 1}}}}, "arms.a.train.bata: unknown key; did you mean train.beta?"),
        ({"arms": {"a": {"train": {"beta": -1}}}}, "arms.a.train.beta"),
        ({"arms": {"a": {"prompts": {"limit": 5}}}}, "arms.a.prompts.limit: the arms of a comparison have equal data"),
        ({"arms": {"a": {"train": {"batch_size": 8}}}}, "arms.a.train.batch_size: the arms of a comparison have equal"),
        ({"arms": {"a": {"train": {"epochs": 2}}}}, "set train.epochs for all of them (1 there, 2 here)"),
        ({"arms": {"a": {"filters": {"truncated": True}}}}, "arms.a.filters.truncated: the arms of a comparison"),
        ({"arms": {"a": {"generation": {"sampling": {"max_tokens": 9}}}}}, "arms.a.generation.sampling.max_tokens"),
        ({"arms": {"a": {"evaluate": {"samples_per_prompt": 1}}}}, "arms.a.evaluate.samples_per_prompt"),
        ({"arms": {"a": {"rounds": 3}}}, "arms.a.rounds: expected those of all arms, 1; found 3"),
        ({"arms": {"a": {"run_dir": "elsewhere"}}}, "arms.a.run_dir: the arms of a comparison"),
        ({"arms": {"a": {"seed": 3}}}, "arms.a.seed: the arms of a comparison"),
        ({"arms": {"a": {"ray": {"num_cpus": 3}}}}, "arms.a.ray.num_cpus: the arms of a comparison"),
        ({"arms": {"a": {"prompts": {"reference_column": "x"}}}}, "arms.a.prompts.reference_column: the arms of"),
        ({"arms": {"a": {"evaluate": {"judge": {"model": "m"}}}}}, "arms.a.evaluate.judge.model: the arms of a"),
        ({"arms": {"a": {"evaluate": {"tasks": ["svamp"]}}}}, "arms.a.evaluate.tasks: the arms of a comparison"),
        ({"arms": {"a": {"evaluate": {"matrix": 0}}}}, "arms.a.evaluate.matrix: the arms of a comparison"),
        ({"arms": {1: {}}}, "arms: expected names that are text, found 1: put it in quotes"),
        ({"arms": {1e-5: {}, True: {}}}, "arms: expected names that are text, found 1e-05, True: put them in quotes"),
        ({"seeds": []}, "seeds: expected a list of different whole numbers"),
        ({"seeds": [1, 1]}, "seeds: expected a list of different whole numbers"),
        ({"seeds": [True]}, "seeds: expected a list of different whole numbers"),
        ({"seeds": [0], "seed": 1}, "seed: a comparison has seeds"),
        ({"evaluate": {"enabled": False}}, "evaluate.enabled: a comparison measures"),
        ({"guard": {"when_bad": "stop"}}, "guard.when_bad: every arm of a comparison does every round: expected null"),
        ({"trian": {}}, "trian: unknown key"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path, values, message):
    with pytest.raises(ConfigError) as caught:
        load_comparison(write_recipe(tmp_path, **values))
    assert message in str(caught.value)


def test_an_arm_may_run_in_another_place(tmp_path):
    own = {"train": {"micro_batch_tokens": 64}, "generation": {"pool": {"max_size": 3}}, "trackers": ["tensorboard"]}
    comparison = load_comparison(write_recipe(tmp_path, arms={"mipo": {}, "elsewhere": own}))
    assert comparison.arms["elsewhere"].generation.pool.max_size == 3
    assert comparison.same_pairs("elsewhere") == "mipo"


def test_every_wrong_arm_is_told_at_once(tmp_path):
    arms = {"a": {"train": {"beta": -1}}, "b": {"train": {"epochs": 0}}, "c": {}}
    with pytest.raises(ConfigError) as caught:
        load_comparison(write_recipe(tmp_path, arms=arms))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "arms.a.train.beta",
        "arms.b.train.epochs",
    ]


def test_the_recipe_of_the_project_is_one_comparison():
    comparison = load_comparison("jobs/compare/personalization.yaml")
    strategies = {config.conditioning.strategy for config in comparison.arms.values()}
    objectives = {config.train.objective for config in comparison.arms.values()}
    assert strategies == {
        "random_context",
        "missing_context",
        "random_prompt",
        "swapped_response",
        "partial_prompt",
        "similar_prompt",
    }
    assert objectives == {"dpo", "sft", "sami", "infonce"}
    assert comparison.controls == ["shuffled_labels"]
    assert comparison.arms["infonce"].generation.rejected_per_pair == 2
    assert {comparison.same_pairs(arm) for arm in ("sft", "shuffled_labels", "sami")} == {"random_context"}
    assert describe_arm(comparison.arms["sft"]) == "SFT on the chosen responses"
    assert "control" in describe_arm(comparison.arms["shuffled_labels"])


# The control


def pairs_table(ids: list[str]) -> pa.Table:
    rows = [
        {"pair_id": name, "chosen_token_ids": [index, 1], "rejected_token_ids": [[1000 + index]]}
        for index, name in enumerate(ids)
    ]
    ids_type = pa.list_(pa.int32())
    schema = pa.schema(
        [("pair_id", pa.string()), ("chosen_token_ids", ids_type), ("rejected_token_ids", pa.list_(ids_type))]
    )
    return pa.Table.from_pylist(rows, schema=schema)


def test_the_control_swaps_a_seeded_half_of_the_pairs():
    names = [f"{index:016x}" for index in range(2000)]
    table = pairs_table(names)
    shuffled = shuffle_labels(table, seed=5)
    assert shuffled.schema == table.schema
    swapped = []
    for index, row in enumerate(shuffled.to_pylist()):
        sides = (row["chosen_token_ids"], row["rejected_token_ids"])
        swapped.append(sides != ([index, 1], [[1000 + index]]))
        assert sides == (([1000 + index], [[index, 1]]) if swapped[-1] else ([index, 1], [[1000 + index]]))
    assert abs(sum(swapped) - 1000) < 4 * math.sqrt(500)
    # It depends on seed and pair alone: not on the block, not on the order.
    assert shuffle_labels(table.slice(700, 9), seed=5).equals(shuffled.slice(700, 9))
    assert shuffle_labels(table.take(list(range(1999, -1, -1))), seed=5).to_pylist() == shuffled.to_pylist()[::-1]
    assert swapped == [has_swapped_labels(5, name) for name in names]
    assert swapped != [has_swapped_labels(6, name) for name in names]
    assert shuffle_labels(table.slice(0, 0), seed=5).num_rows == 0


def test_the_control_takes_pairs_of_several_chunks_and_of_version_1():
    table = pairs_table(["a", "b", "c", "d"])
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1, 3)])
    assert shuffle_labels(chunked, seed=0).to_pylist() == shuffle_labels(table, seed=0).to_pylist()
    old = table.set_column(2, "rejected_token_ids", pa.array([[1000], [1001], [1002], [1003]], pa.list_(pa.int32())))
    assert shuffle_labels(as_version_2(old), seed=0).to_pylist() == shuffle_labels(table, seed=0).to_pylist()


def test_the_control_refuses_pairs_with_several_rejected_responses():
    table = pairs_table(["a"]).set_column(
        2, "rejected_token_ids", pa.array([[[1], [2]]], pa.list_(pa.list_(pa.int32())))
    )
    with pytest.raises(ValueError, match="one rejected response in each pair"):
        shuffle_labels(table, seed=0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.objective=sft"], "shuffle_labels is for objectives dpo and ipo, found sft"),
        (["train.objective=sami"], "found sami"),
        (["train.objective=infonce"], "found infonce"),
        (["train.nll_coefficient=0.1"], "expected nll_coefficient 0"),
        (["generation.negatives_per_prompt=2"], "expected one rejected response in each pair, found 2"),
    ],
)
def test_the_control_is_refused_where_it_makes_no_sense(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=["train.shuffle_labels=true", *overrides])


# Equal data


def write_stage(run: RunDirectory, stage: str, facts: dict[str, Any], comparison: Comparison) -> None:
    commit(run, stage, comparison.shared, **{"seconds": 10.0, **facts})


def write_pairs(comparison: Comparison, arm: str, dropped: dict[str, str], seed: int = 0) -> RunDirectory:
    run = comparison.run(arm, seed)
    stage = run.stage(Round(0), "generate")
    Path(run.path(stage)).mkdir(parents=True, exist_ok=True)
    table = pa.table({"pair_id": list(dropped), "dropped": list(dropped.values())})
    pyarrow.parquet.write_table(table, run.path(stage, "pairs.parquet"))
    write_stage(run, stage, {"pairs": ["pairs.parquet"]}, comparison)
    return run


def test_all_arms_train_on_the_pairs_that_every_arm_kept(comparison):
    kept = {"a": "", "b": "", "c": "", "d": ""}
    for arm, own in zip(ARMS, [{}, {"a": "identical"}, {}, {"c": "truncated", "e": ""}], strict=True):
        write_pairs(comparison, arm, kept | own)
    assert kept_pairs(comparison.run("random_context", 0), Round(0)) == {"a", "b", "d", "e"}
    common = common_pairs(comparison, 0, Round(0))
    assert common == {"b", "d"}
    # Fixed: an arm that keeps more changes nothing, one that keeps less is refused.
    write_pairs(comparison, "control", kept)
    assert common_pairs(comparison, 0, Round(0)) == common
    write_pairs(comparison, "sft", {"b": "", "d": "identical"})
    with pytest.raises(UserError, match="arm sft lacks 1 of the 2 pairs"):
        common_pairs(comparison, 0, Round(0))


@pytest.mark.parametrize("text", ["", "{}", '["a", 3]', '["a"', "[" * 9999])
def test_a_damaged_list_of_common_pairs_is_refused_by_name(comparison, text):
    for arm in ARMS:
        write_pairs(comparison, arm, {"a": ""})
    file = "common_pairs/seed-0/round-000.json"
    comparison.root().write_text(file, text)
    with pytest.raises(UserError, match=rf"^{comparison.root().path(file)}: .*expected .*, found"):
        common_pairs(comparison, 0, Round(0))


def test_arms_without_a_common_pair_are_refused(comparison):
    for index, arm in enumerate(ARMS):
        write_pairs(comparison, arm, {f"pair-{index}": ""})
    with pytest.raises(UserError, match=r"no pair in common \(kept: mipo 1, control 1, sft 1, random_context 1\)"):
        common_pairs(comparison, 0, Round(0))


def test_a_set_of_pairs_has_one_name():
    assert pair_set_hash(frozenset({"a", "b"})) == pair_set_hash(frozenset(["b", "a"]))
    assert pair_set_hash(frozenset({"a", "b"})) != pair_set_hash(frozenset({"ab"}))


def test_a_finished_stage_is_copied_whole_and_only_once(comparison):
    source = write_pairs(comparison, "mipo", {"a": ""})
    stage = source.stage(Round(0), "generate")
    source.write_text(f"{stage}/conditioned.json", "{}")
    target = comparison.run("sft", 0)
    target.write_text(f"{stage}/left-over.parquet", "of a kill")
    target.copy_stage(source, stage)
    assert target.list_files(stage) == source.list_files(stage)
    assert (
        Path(target.path(stage, "pairs.parquet")).read_bytes() == Path(source.path(stage, "pairs.parquet")).read_bytes()
    )
    assert target.read_text(f"{stage}/manifest.json") == source.read_text(f"{stage}/manifest.json")
    source.write_text(f"{stage}/later.txt", "")
    target.copy_stage(source, stage)
    assert "later.txt" not in target.list_files(stage)


# Results: small made-up scores, written as the evaluate stage writes them


def write_scores(
    comparison: Comparison, arm: str, seed: int, pmi: float, *, prompts: int = 12, finish_reason: str = "stop"
) -> None:
    """Scored answers of an arm: `pmi` nats above not knowing the context, give or take noise that all arms share."""
    round = rounds.BASE if arm == BASE else Round(0)
    run = comparison.run(arm, seed)
    noise = np.random.default_rng(0).normal(0, 0.5, prompts)
    rows = []
    for index in range(prompts):
        answer = {
            "prompt_id": f"p{index}",
            "context": "I am a baker.",
            "source": "I am a baker.\n\nWhat now?",
            "kind": "answer",
            "sample": 0,
            "response": f"Bake bread number {index} today with your oven.",
            "finish_reason": finish_reason,
            "tokens": 9,
            "logprobs_initial": [-20.0, -25.0, -20.0 - pmi - noise[index]],
            "logprobs_policy": None if arm == BASE else [-19.0, -25.0, -24.0],
        }
        rows.append(answer)
        pair = {**answer, "logprobs_policy": None}
        if arm == BASE:
            rows.append({**pair, "kind": "rejected", "logprobs_initial": [-30.0]})
        else:
            rows.append({**pair, "kind": "pair_chosen", "logprobs_initial": None, "logprobs_policy": [-19.0]})
            rows.append({**pair, "kind": "pair_rejected", "logprobs_initial": None, "logprobs_policy": [-31.0]})
    directory = Path(run.path(run.stage(round, "evaluate"), "scores"))
    directory.mkdir(parents=True, exist_ok=True)
    names = [*RESPONSE_SCHEMA.names[:8], "logprobs_initial", "logprobs_policy"]
    table = pa.Table.from_pylist([{name: row[name] for name in names} for row in rows])
    pyarrow.parquet.write_table(table, directory / "scores.parquet")


def write_base(comparison: Comparison, seed: int, users: int | None = None) -> tuple[RunDirectory, MeasuredRows]:
    """The measured base of one seed, with a PMI of 3 nats; users: how many its rows are of, in turns; None: unknown."""
    base = comparison.run(BASE, seed)
    write_scores(comparison, BASE, seed, 3.0)
    if users is not None:
        rows = [{"prompt_id": f"p{index}", "user": str(index % users), "question": f"q{index}"} for index in range(12)]
        directory = Path(base.path(base.stage(rounds.BASE, "evaluate"), "prompts"))
        directory.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), directory / "prompts.parquet")
    rows = measured_rows(base, rounds.BASE)
    results = measure(rows, None, beta=0.1, samples=200, seed=0)
    write_stage(base, base.stage(rounds.BASE, "evaluate"), {"results": results}, comparison)
    return base, rows


def write_evaluated(run: RunDirectory, stage: str, name: str, evaluation: Evaluated, one: Comparison) -> None:
    """The manifest of a finished task, or of a finished judgement."""
    write_stage(run, stage, {"name": name, "evaluation": evaluation}, one)


def write_results(
    comparison: Comparison,
    changes: dict[str, float],
    *,
    pairs: dict[str, int] | None = None,
    cut_seeds: Sequence[int] = (),
    users: int | None = None,
) -> None:
    """Finished runs of every arm in `changes`, whose PMI lies that much above the base's 3 nats.

    With a seed of `cut_seeds` an arm's every answer is cut at the length limit.
    """
    for seed in comparison.seeds:
        base, base_rows = write_base(comparison, seed, users)
        comparison.root().write_text(f"common_pairs/seed-{seed}/round-000.json", json.dumps(["a", "b", "c", "d"]))
        for arm, change in changes.items():
            run = comparison.run(arm, seed)
            run.copy_stage(base, "base/evaluate")
            reason = "length" if seed in cut_seeds else "stop"
            write_scores(comparison, arm, seed, 3.0 + change + 0.1 * seed, finish_reason=reason)
            summary = replace(SUMMARY, pairs=(pairs or {}).get(arm, 4), steps=1)
            write_stage(run, run.stage(Round(0), "generate"), {"pairs": []}, comparison)
            write_stage(run, run.stage(Round(0), "train"), {"summary": summary}, comparison)
            entry = measure(measured_rows(run, Round(0)), base_rows, beta=0.1, samples=200, seed=0)
            write_stage(run, run.stage(Round(0), "evaluate"), {"results": entry}, comparison)


def test_the_table_has_every_arm_with_intervals_and_verdicts(comparison):
    write_results(comparison, {"mipo": 4.0, "control": 0.0, "sft": -1.0, "random_context": 2.0})
    found = gather(comparison)
    assert list(found.arms) == [BASE, *ARMS]
    assert found.headline == "context_pmi_initial"
    assert found.equal == EqualData(pairs=4, steps=1, batch_size=4, epochs=1)
    words = {arm: found.arms[arm].measures["context_pmi_initial"].verdict for arm in ARMS}
    assert words == {
        "mipo": "better",
        "control": "not distinguishable",
        "sft": "worse",
        "random_context": "better",
    }
    base = found.arms[BASE].measures["context_pmi_initial"]
    mipo = found.arms["mipo"].measures["context_pmi_initial"]
    assert mipo.value - base.value == pytest.approx(4.0) == mipo.change
    # What has no better direction rises or falls.
    assert found.arms["mipo"].measures["kl_per_token"].verdict == "rose"
    difference = found.arms["mipo"].against_control["control"]
    assert (difference.change, difference.verdict) == (pytest.approx(4.0), "better")
    assert found.arms["sft"].seconds == {"generate": 0.0, "train": 10.0, "evaluate": 10.0}  # its pairs: a copy
    assert found.arms["mipo"].seconds["generate"] == 10.0
    swapped = sum(has_swapped_labels(0, name) for name in "abcd")
    assert found.arms["control"].swapped_pairs == swapped
    assert measures_of(found.arms)["context_pmi_initial"].title == "context PMI"


def test_a_named_primary_measure_is_what_the_comparison_is_about(comparison):
    named = replace(comparison, shared=with_primary_measure(comparison.shared, "infonce_initial"))
    named = replace(
        named, arms={arm: with_primary_measure(config, "infonce_initial") for arm, config in named.arms.items()}
    )
    write_results(named, {"mipo": 4.0, "control": 0.0})
    found = gather(named)
    assert found.headline == "infonce_initial"
    assert "infonce_initial" in found.arms["mipo"].measures
    assert found.findings[0].startswith("mipo: InfoNCE is ")
    assert "The comparison is about InfoNCE." in markdown(found)


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_an_effect_that_length_cannot_buy_may_be_what_the_comparison_is_about(comparison, seeds):
    name = "context_pmi_adjusted"
    named = replace(comparison, seeds=seeds, shared=with_primary_measure(comparison.shared, name))
    named = replace(named, arms={arm: with_primary_measure(config, name) for arm, config in named.arms.items()})
    write_results(named, {"mipo": 4.0, "control": 0.0})
    found = gather(named)
    assert found.headline == name
    entry = found.arms["mipo"].measures[name]
    # All answers are as long as the base's, whose PMI is 3 nats: each seed's change is the plain one.
    assert entry.change == pytest.approx(sum(4.0 + 0.1 * seed for seed in seeds) / len(seeds))
    assert entry.value == pytest.approx(found.arms[BASE].measures[name].value + entry.change)
    assert found.arms["mipo"].against_control["control"].change == pytest.approx(4.0)
    assert found.findings[0].startswith("mipo: context PMI at equal length is better than the base")


def with_primary_measure(config: Config, name: str) -> Config:
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"primary": name})})


def test_the_users_and_questions_of_the_held_out_prompts_are_resampled_in_every_arm(comparison):
    write_results(comparison, {"mipo": 4.0, "control": 0.0}, users=3)
    found = gather(comparison)
    entry = found.arms["mipo"].measures["context_pmi_initial"]
    assert (entry.n, entry.users, entry.questions) == (12, 3, 12)
    assert "resample what was drawn, 3 users and 12 questions; with fewer than 15" in markdown(found)
    several = replace(comparison, seeds=(0, 1))
    write_results(several, {"mipo": 4.0, "control": 0.0}, users=3)
    measures = gather(several).arms["mipo"].measures
    assert (measures["context_pmi_initial"].users, measures["context_pmi_initial"].primary) == (3, True)
    exploratory = [one for name, one in measures.items() if one.change is not None and name != "context_pmi_initial"]
    assert all(one.holm_p_value is not None for one in exploratory)


def test_arms_that_are_not_measured_yet_are_named(comparison):
    write_results(comparison, {"mipo": 1.0})
    found = gather(comparison)
    assert list(found.arms) == [BASE, "mipo"]
    assert found.unfinished == ["control", "sft", "random_context"]
    assert found.control == ["The control control has not been measured yet."]
    assert "Not measured yet: control, sft, random_context." in markdown(found)


def test_unequal_steps_or_pairs_are_an_error(comparison):
    write_results(comparison, {"mipo": 1.0, "sft": 1.0}, pairs={"sft": 3})
    with pytest.raises(RuntimeError, match=r"expected equal pairs in all arms, found \[3, 4\]"):
        gather(comparison)


def test_several_seeds_are_one_row_with_each_seeds_change(tmp_path):
    comparison = load_comparison(write_recipe(tmp_path, seeds=[0, 1, 2]))
    write_results(comparison, {"mipo": 1.0, "control": 0.0})
    entry = gather(comparison).arms["mipo"].measures["context_pmi_initial"]
    assert entry.seed_changes == pytest.approx([1.0, 1.1, 1.2])
    assert entry.change == pytest.approx(1.1)
    assert entry.change_low < 1.1 < entry.change_high
    assert entry.n == 12
    assert entry.verdict == "better"
    assert "kl_per_token" in gather(comparison).arms["mipo"].measures


def test_the_interval_of_a_share_stays_one_of_a_share(tmp_path):
    comparison = load_comparison(write_recipe(tmp_path, seeds=[0, 1]))
    write_results(comparison, {"mipo": 1.0, "control": 0.0}, cut_seeds=[1])
    entry = gather(comparison).arms["mipo"].measures["truncated"]
    assert (entry.value, entry.low, entry.high) == (0.5, 0.0, 1.0)


def test_several_seeds_say_where_the_judges_figures_are(tmp_path):
    judge = {"evaluate": {"judge": {"model": "org/judge"}}}
    several = load_comparison(write_recipe(tmp_path, seeds=[0, 1], **judge))
    write_results(several, {"mipo": 1.0, "control": 0.0})
    for seed in (0, 1):
        stage, run = "rounds/000/judge/pairwise", several.run("mipo", seed)
        write_evaluated(run, stage, "judge_pairwise", judged_in_pairs(0.5), several)
    found = gather(several)
    said = "The judge's figures are not in this table: they are shown for one seed only."
    assert "judge_pairwise.net_win" not in found.arms["mipo"].measures
    assert said in markdown(found)
    assert "are not in this table: they are shown for one seed only." in render(found, several)
    one = load_comparison(write_recipe(tmp_path, **judge))
    assert "judge_pairwise.net_win" in gather(one).arms["mipo"].measures
    assert said not in markdown(gather(one))
    assert said not in markdown(gather(load_comparison(write_recipe(tmp_path, seeds=[0, 1]))))


def test_only_the_first_rounds_pairs_cost_an_arm_nothing(tmp_path):
    comparison = load_comparison(write_recipe(tmp_path, rounds=2))
    for arm in ("mipo", "sft"):
        run = comparison.run(arm, 0)
        for index, seconds in ((0, 10.0), (1, 7.0)):
            write_stage(run, run.stage(Round(index), "generate"), {"pairs": [], "seconds": seconds}, comparison)
            write_stage(run, run.stage(Round(index), "train"), {"seconds": 3.0}, comparison)
    assert stage_seconds(comparison, "mipo", Round(1), [0]) == {"generate": 17.0, "train": 6.0, "evaluate": 0.0}
    assert stage_seconds(comparison, "sft", Round(1), [0]) == {"generate": 7.0, "train": 6.0, "evaluate": 0.0}


def test_several_seeds_are_reported_from_the_first_measured_base_on(tmp_path):
    comparison = load_comparison(write_recipe(tmp_path, seeds=[0, 1, 2]))
    write_base(comparison, 0)
    found = write_comparison(comparison, comparison.root())
    base = found.arms[BASE].measures["context_pmi_initial"]
    assert list(found.arms) == [BASE]
    assert base.value == pytest.approx(3.0, abs=0.5)
    assert "Not measured with every seed yet: base, mipo, control, sft, random_context." in markdown(found)
    # Another seed's base, of other answers, counts as soon as it is there.
    write_scores(comparison, BASE, 2, 5.0)
    write_stage(comparison.run(BASE, 2), "base/evaluate", {}, comparison)
    found = write_comparison(comparison, comparison.root())
    assert found.arms[BASE].measures["context_pmi_initial"].value == pytest.approx(base.value + 1.0)
    # An arm that only the first seed has is not shown yet.
    write_results(load_comparison(write_recipe(tmp_path)), {"mipo": 1.0})
    assert list(gather(comparison).arms) == [BASE]


def test_tasks_are_columns_of_the_table(comparison):
    write_results(comparison, {"mipo": 1.0, "control": 0.0})
    entry = Entry(value=0.4, low=0.3, high=0.5, n=100, unit="share", interval="wilson")
    task = Evaluated(kind="likelihood", version=1, metrics={"accuracy": entry, "no_answer": entry})
    name, stage = "arc_easy_likelihood", "tasks/arc_easy_likelihood"
    write_evaluated(comparison.run(BASE, 0), f"base/{stage}", name, task, comparison)
    # By McNemar, whatever the interval says.
    word = "not distinguishable"
    better = replace(entry, change=0.1, change_low=0.02, change_high=0.18, p_value=0.2, verdict=word)
    task = replace(task, metrics={"accuracy": better})
    write_evaluated(comparison.run("mipo", 0), f"rounds/000/{stage}", name, task, comparison)
    found = gather(comparison)
    columns = measures_of(found.arms)
    assert list(columns)[-1] == "arc_easy_likelihood.accuracy"
    assert columns["arc_easy_likelihood.accuracy"].title == "arc_easy_likelihood accuracy"
    assert found.arms["mipo"].measures["arc_easy_likelihood.accuracy"].verdict == "not distinguishable"
    assert "arc_easy_likelihood accuracy" in render(found, comparison)


def judged_in_pairs(net: float) -> Evaluated:
    """The pairwise judge's entry of a round in evaluation.json; the base has none."""
    low, high = net - 0.2, net + 0.2
    word = "better" if net > 0.2 else "worse" if net < -0.2 else "not distinguishable"
    shares = {"win": 0.5 + net / 2, "tie": 0.0, "loss": 0.5 - net / 2}
    metrics = {name: Entry(share, share, share, 12, "share", "bootstrap") for name, share in shares.items()}
    metrics["net_win"] = Entry(net, low, high, 12, "share", "bootstrap", net, low, high, verdict=word)
    return Evaluated(kind="judge", version=1, metrics=metrics)


def write_judged(comparison: Comparison, arm: str, net: float) -> None:
    evaluation = judged_in_pairs(net)
    write_evaluated(comparison.run(arm, 0), "rounds/000/judge/pairwise", "judge_pairwise", evaluation, comparison)


def test_the_pairwise_judge_of_a_control_is_said_without_a_value_of_the_base(comparison):
    write_results(comparison, {"mipo": 1.0, "control": 0.0})
    for arm, net in (("mipo", 0.5), ("control", 0.1)):
        write_judged(comparison, arm, net)
    found = gather(comparison)
    assert (
        "Judged in pairs, control is not distinguishable from the base: wins less losses +0.100 [-0.100, +0.300] "
        "(12 items)."
    ) in found.control
    assert found.arms["mipo"].measures["judge_pairwise.net_win"].verdict == "better"
    assert found.control[-1] in render(found, comparison)
    # What the control gains in the judge's eyes is a finding as any other.
    write_judged(comparison, "control", 0.5)
    found = gather(comparison)
    assert "shows a gain in reward accuracy, judge_pairwise net win." in found.control[0]
    assert found.control[-1].startswith("Judged in pairs, control is better than the base: wins less losses +0.500 ")


# Sentences and page


def test_a_control_that_shows_no_gain_is_said_to_show_none(comparison):
    write_results(comparison, {"mipo": 4.0, "control": 0.0})
    lines = control_sentences("control", gather(comparison).arms)
    assert lines[0].startswith("Finding: the control (control) shows a gain in reward accuracy.")  # made-up scores: 1.0
    arms = gather(comparison).arms
    gain = arms["control"].measures["reward_accuracy"]
    arms["control"].measures["reward_accuracy"] = replace(gain, verdict="not distinguishable")
    lines = control_sentences("control", arms)
    assert lines[0].startswith("The control (control) shows no gain in any of: context PMI,")
    assert "context PMI is not distinguishable from the base" in lines[1]


def test_a_control_that_gains_is_a_finding(comparison):
    write_results(comparison, {"control": 2.0, "mipo": 4.0})
    found = gather(comparison)
    assert "shows a gain in context PMI" in found.control[0]
    assert "says nothing about what an arm was trained to prefer" in found.control[0]
    assert found.control[0] in markdown(found)
    assert findings("context_pmi_initial", found.arms)[0].startswith("mipo: context PMI is better than the base:")


def test_a_gain_is_told_with_what_it_may_rest_on(comparison):
    write_results(comparison, {"mipo": 4.0, "control": 0.0})
    arms = gather(comparison).arms
    shorter = Entry(20.0, 18.0, 22.0, 12, "tokens", None, -11.8, -17.5, -6.1, verdict="fell")
    for arm in ("mipo", "control"):
        arms[arm].measures["response_tokens"] = shorter
    better, same = findings("context_pmi_initial", arms)
    assert better.endswith(". But length fell (-11.8 [-17.5, -6.1]).")
    assert same.endswith("12 items).")


def test_the_page_is_self_contained_and_says_what_the_table_says(comparison):
    write_results(comparison, {"mipo": 4.0, "control": 0.0, "sft": -1.0, "random_context": 2.0})
    found = gather(comparison)
    found.arms["mipo"] = replace(found.arms["mipo"], description="<script>alert(1)</script>")
    html, table = render(found, comparison), markdown(found)
    assert "<script" not in html
    assert "http://" not in html
    assert "https://" not in html
    assert "default-src 'none'" in html
    for arm in (BASE, *ARMS):
        assert f"<th>{arm}<span>" in html
        assert f"| `{arm}`<br>" in table
    assert html.count("<figure>") == len(measures_of(found.arms))
    assert "The comparison is about context PMI." in html
    assert "are corrected for their number in that arm (Holm)" in html
    assert "resample what was drawn, 12 prompts; with fewer than 15 of a kind they are a rough guide." in html
    assert html.index(found.control[0].split(".")[0]) < html.index("<table>")
    for line in found.findings:
        assert f"- {line}" in table


def test_dots_stand_at_their_values(comparison):
    write_results(comparison, {"mipo": 4.0, "control": 0.0, "sft": -1.0})
    arms = gather(comparison).arms
    chart = dot_chart(arms, "context_pmi_initial", measures_of(arms)["context_pmi_initial"])
    base, mipo, control, sft = chart.dots
    assert [dot.kind for dot in chart.dots] == ["base", "arm", "control", "arm"]
    assert sft.x < base.x == pytest.approx(control.x) == chart.level < mipo.x
    assert (mipo.x - base.x) / (base.x - sft.x) == pytest.approx(4.0)
    for dot in chart.dots:
        assert chart.left <= dot.low <= dot.x <= dot.high <= chart.right
    assert len({dot.y for dot in chart.dots}) == 4


def test_a_measure_that_the_base_lacks_has_no_line_of_the_base(comparison):
    write_results(comparison, {"mipo": 1.0, "control": 0.0})
    write_judged(comparison, "mipo", 0.5)
    write_judged(comparison, "control", 0.4)
    found = gather(comparison)
    columns = measures_of(found.arms)
    chart = dot_chart(found.arms, "judge_pairwise.net_win", columns["judge_pairwise.net_win"])
    mipo, control = chart.dots
    # Judged in pairs, the base has 0 against itself, which is drawn, though no interval reaches it.
    assert chart.left <= chart.level < control.low < mipo.low
    assert (mipo.x - chart.level) / (mipo.x - control.x) == pytest.approx(0.5 / 0.1)
    for arm in ("mipo", "control"):
        found.arms[arm].measures["x.accuracy"] = found.arms[arm].measures["reward_accuracy"]
    columns = measures_of(found.arms)
    assert dot_chart(found.arms, "x.accuracy", columns["x.accuracy"]).level is None
    html = render(found, comparison)
    assert html.count('<line class="level"') == len(columns) - 1


# The command


@pytest.fixture
def runnable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A comparison that passes every check."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"weight": numpy.arange(12, dtype=numpy.float32)}, model / "model.safetensors")
    (model / "tokenizer.json").write_text("{}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    for name, count in (("train", 21), ("held_out", 6)):
        rows = [{"prompt": f"{name} {index}", "context": f"I am {index}."} for index in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_recipe(
        tmp_path,
        model={"path": str(model)},
        prompts={"path": f"{tmp_path}/train.jsonl"},
        evaluate={"prompts": {"path": f"{tmp_path}/held_out.jsonl"}},
    )


def test_a_dry_run_names_every_arm_and_what_is_equal(runnable, capsys):
    assert main(["--dry-run", str(runnable)]) == 0
    output = capsys.readouterr().out
    assert "4 arms, seeds 0" in output
    assert "21 prompts x 1 samples, of which all arms train on those that every arm kept" in output
    assert (
        "sft (seed 0)                    SFT on the chosen responses; pairs of mipo; 0 of 3 stages finished" in output
    )
    assert "base (seed 0)                   the initial model; 0 of 1 stages finished" in output
    assert "dry run: nothing was started" in output


def test_long_names_of_arms_keep_their_distance(runnable, capsys):
    arm = "an_arm_of_which_the_name_is_rather_long"
    assert main(["--dry-run", str(runnable), f"arms.{arm}={{}}"]) == 0
    arms = capsys.readouterr().out.partition("\narms\n")[2].splitlines()[:-1]
    (line,) = [line for line in arms if line.startswith(f"  {arm} (seed 0)")]
    assert line.startswith(f"  {arm} (seed 0)  ")


def test_a_wrong_arm_is_named_before_anything_starts(runnable, capsys):
    assert main([str(runnable), "conditioning.strategy=random_context", "prompts.limit=1"]) == 2
    assert "error: base, seed 0: " in capsys.readouterr().err
    assert main([str(runnable), "arms.sft.train.objectiv=sft"]) == 2
    assert "arms.sft.train.objectiv: unknown key" in capsys.readouterr().err


def test_the_directory_of_a_run_is_no_comparison(runnable, tmp_path, capsys):
    (tmp_path / "comparison").mkdir()
    (tmp_path / "comparison/config.yaml").write_text("{}")
    assert main([str(runnable)]) == 2
    assert "is the directory of a single run" in capsys.readouterr().err
    assert issubclass(StorageError, UserError)


def test_a_finished_comparison_starts_nothing(runnable, capsys, monkeypatch):
    reported = []
    monkeypatch.setattr(run_report, "write_report", lambda config, run: reported.append((config.run_dir, run.url)))
    comparison = load_comparison(runnable)
    write_results(comparison, {"mipo": 4.0, "control": 0.0, "sft": -1.0, "random_context": 2.0})
    runs = [comparison.run(arm, seed) for arm, seed in [(BASE, 0), *comparison.runs()]]
    for arm, seed in [(BASE, 0), *comparison.runs()]:
        # Nobody but the stages wrote anything: as after a kill right behind the last commit.
        assert comparison.run(arm, seed).read_text("results.json") is None
        comparison.run(arm, seed).write_text("config.yaml", to_yaml(comparison.config(arm, seed)))
    assert main([str(runnable)]) == 0
    output = capsys.readouterr().out
    assert "finished before, nothing to train" in output
    assert "mipo: context PMI is better than the base" in output
    assert Path(comparison.root().path("comparison.html")).exists()
    assert sorted(reported) == sorted((one.url, one.url) for one in runs)
    assert [run_report.read_results(one).keys() for one in runs] == [{"base"}, *([{"base", "0"}] * 4)]
    # Files that are as new as the stages are left as they are.
    reported.clear()
    for one in runs:
        one.write_text("report.html", "")
    assert main([str(runnable)]) == 0
    assert reported == []
    assert main([str(runnable), "arms.sft.train.beta=0.2"]) == 2
    assert "sft, seed 0: " in capsys.readouterr().err


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The run directories of arms for which event writers and trackers start; stages are done by writing manifests."""
    opened: list[str] = []

    @contextmanager
    def session_of(plan: Plan, stages: Sequence[str]) -> Iterator[Session]:
        assert not all(plan.run.is_finished(stage) for stage in stages)
        opened.append(plan.run.url)
        yield Session(plan.config, plan.run, plan.resources, Events(object()))

    def do(session: Session, *names: str) -> None:
        for stage in (session.stage(Round(0), name) for name in names):
            if not stage.run.is_finished(stage.directory):
                assert session.events is not NO_EVENTS
                commit(stage.run, stage.directory, session.config, files=[])

    def measure_round(plan: Plan, session: Session, round: Round) -> None:
        if round.is_base and not plan.run.is_finished("base/evaluate"):
            assert session.events is not NO_EVENTS
            commit(plan.run, "base/evaluate", plan.config, files=[])
        if not round.is_base:
            do(session, "evaluate")

    def condition_prompts(session: Session, round: Round, prompts: Any) -> None:
        assert session.events is NO_EVENTS

    monkeypatch.setattr(arms, "session_of", session_of)
    monkeypatch.setattr(arms, "condition_prompts", condition_prompts)
    monkeypatch.setattr(arms, "generate", lambda session, round, prompts: do(session, "generate"))
    monkeypatch.setattr(arms, "train", lambda session, round, only: do(session, "train"))
    monkeypatch.setattr(arms, "measure_round", measure_round)
    monkeypatch.setattr(arms, "common_pairs", lambda comparison, seed, round: frozenset("a"))
    monkeypatch.setattr(arms, "check_model_is_trainable", lambda config: None)
    monkeypatch.setattr(arms, "_check_trained_on", lambda run, round, only: None)
    return opened


def run_all_arms(recipe: Path) -> Comparison:
    comparison = load_comparison(recipe)
    inputs = {
        (arm, seed): check_inputs(comparison.config(arm, seed), comparison.run(arm, seed))
        for arm, seed in [(BASE, 0), *comparison.runs()]
    }
    plans = {key: make_plan(found, [Node({"CPU": 8.0})]) for key, found in inputs.items()}
    arms.run_arms(comparison, plans, lambda: None)
    return comparison


def test_arms_that_only_condition_or_are_finished_open_no_event_writer(runnable: Path, opened: list[str]) -> None:
    comparison = run_all_arms(runnable)
    own_pairs = [arm for arm in ARMS if comparison.same_pairs(arm) == arm]
    assert 1 < len(own_pairs) < len(ARMS)
    expected = [BASE, *own_pairs, *ARMS]  # measured; generated; trained and measured
    assert opened == [comparison.run(arm, 0).url for arm in expected]

    opened.clear()
    run_all_arms(runnable)
    assert opened == []

    # What one arm lacks is done with a writer of its own.
    comparison.run("sft", 0).remove("rounds/000/evaluate")
    run_all_arms(runnable)
    assert opened == [comparison.run("sft", 0).url]


def test_an_arm_whose_pairs_are_missing_opens_a_writer_for_them_alone(runnable: Path, opened: list[str]) -> None:
    comparison = run_all_arms(runnable)
    opened.clear()
    comparison.run("random_context", 0).remove("rounds/000/generate")
    run_all_arms(runnable)
    assert opened == [comparison.run("random_context", 0).url]
