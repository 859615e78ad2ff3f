"""What a comparison found: every arm's figures, their change from the initial model, and sentences in plain words.

comparison.json is an `Outcome`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mipo_ray.comparison.definition import BASE, Comparison, common_pairs_file, describe_arm
from mipo_ray.comparison.findings import COMPARED, COMPARED_TASK_METRICS, control_sentences, findings
from mipo_ray.comparison.records import ArmOutcome, Difference, EqualData, Outcome
from mipo_ray.evaluation.held_out import mutual_information as mi
from mipo_ray.evaluation.held_out.metrics import item_values
from mipo_ray.evaluation.held_out.rows import held_out_clusters, measured_rows
from mipo_ray.evaluation.intervals import (
    BOOTSTRAP_SAMPLES,
    bootstrap_change,
    change_word,
    describe_change,
    group_means,
    with_change,
)
from mipo_ray.evaluation.significance import item_changes, over_seeds, with_primary
from mipo_ray.measures import HELD_OUT, PRIMARY, measure_of, primary_measure
from mipo_ray.pairs.label_control import has_swapped_labels
from mipo_ray.storage import rounds
from mipo_ray.storage.entries import Entries, Entry
from mipo_ray.storage.manifests import EvaluateFacts, GenerateFacts, TrainFacts, TrainSummary
from mipo_ray.storage.records import read_record
from mipo_ray.storage.results import gather_evaluation
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.tables.parquet import open_table

Items = tuple[Any, Any]  # values [responses], and the item of each


def gather(comparison: Comparison) -> Outcome:
    """The outcome, from what has been measured so far: the base with one seed at least, and the arms with all seeds;
    seed comes after seed, so that the first bases are there long before the last."""
    last = Round(comparison.shared.rounds - 1)
    measured = {
        arm: [seed for seed in comparison.seeds if _is_measured(comparison.run(arm, seed), round)]
        for arm, round in [(BASE, rounds.BASE), *((arm, last) for arm in comparison.arms)]
    }
    complete = [arm for arm in comparison.arms if measured[arm] == measured[BASE] == list(comparison.seeds)]
    arms = {BASE: _arm(comparison, BASE, rounds.BASE, measured[BASE])}
    arms |= {arm: _arm(comparison, arm, last, comparison.seeds) for arm in complete}
    named = comparison.shared.evaluate.primary
    headline = next(name for name in (named, *COMPARED) if name in arms[BASE].measures)
    for arm in complete:
        differences = {
            control: _difference(comparison, control, arm, last, headline)
            for control in comparison.controls
            if control in complete and control != arm and all(headline in arms[one].measures for one in (control, arm))
        }
        arms[arm] = replace(arms[arm], against_control=differences)
    return Outcome(
        headline=headline,
        seeds=list(comparison.seeds),
        judged=comparison.shared.evaluate.judge.is_on,
        rounds=comparison.shared.rounds,
        equal=_equal(comparison, complete),
        control=[line for control in comparison.controls for line in control_sentences(control, arms)],
        findings=findings(headline, arms),
        unfinished=[arm for arm, seeds in measured.items() if seeds != list(comparison.seeds)],
        arms=arms,
    )


def _arm(comparison: Comparison, arm: str, round: Round, seeds: Sequence[int]) -> ArmOutcome:
    return ArmOutcome(
        swapped_pairs=_swapped(comparison, round) if arm in comparison.controls else None,
        description="the initial model, prompted alone" if arm == BASE else describe_arm(comparison.arms[arm]),
        control=arm in comparison.controls,
        seconds=stage_seconds(comparison, arm, round, seeds),
        measures=_measures(comparison, arm, round, seeds),
    )


def stage_seconds(comparison: Comparison, arm: str, round: Round, seeds: Sequence[int]) -> dict[str, float]:
    """Seconds of each kind of stage, up to a round; pairs that were copied cost none."""
    stages: list[tuple[str, Any]] = [("evaluate", EvaluateFacts)]
    if arm != BASE:
        stages = [("generate", GenerateFacts), ("train", TrainFacts), *stages]
    shares_pairs = arm != BASE and comparison.same_pairs(arm) != arm  # those of the first round
    seconds = {stage: 0.0 for stage, _ in stages}
    for seed in seeds:
        for done in [round] if round.is_base else map(Round, range(round.number + 1)):
            run = comparison.run(arm, seed)
            for stage, kind in stages:
                manifest = run.read_manifest(run.stage(done, stage), kind)
                if manifest is not None and not (shares_pairs and stage == "generate" and done == Round(0)):
                    seconds[stage] += manifest.seconds
    return seconds


def _swapped(comparison: Comparison, last: Round) -> int:
    """In how many of its pairs a control has chosen and rejected swapped."""
    swapped, root = 0, comparison.root()
    for seed in comparison.seeds:
        for number in range(last.number + 1):
            name = common_pairs_file(seed, Round(number))
            pair_ids = read_record(list[str], root.read_text(name) or "[]", root.path(name))
            swapped += sum(has_swapped_labels(seed, pair_id) for pair_id in pair_ids)
    return swapped


def _measures(comparison: Comparison, arm: str, round: Round, seeds: Sequence[int]) -> Entries:
    """By measure. With one seed those of the run itself; with several the mean over seeds."""
    if len(comparison.seeds) == 1:
        run = comparison.run(arm, comparison.seeds[0])
        manifest = run.read_manifest(run.stage(round, "evaluate"), EvaluateFacts)
        assert manifest is not None
        entries = {name: entry for name, entry in manifest.facts.results.items() if name in _compared(comparison)}
        entries |= _task_entries(run, round.key)
    else:
        entries = _over_seeds(comparison, arm, round, seeds)
    return {name: _judged(name, entry) for name, entry in entries.items()}


def _compared(comparison: Comparison) -> list[str]:
    """The held-out measures of the table: COMPARED, and the primary one where that is another."""
    named = comparison.shared.evaluate.primary
    return list(dict.fromkeys([*COMPARED, *([] if named is None else [named])]))


def _judged(name: str, entry: Entry) -> Entry:
    return replace(entry, verdict=change_word(entry, measure_of(name).better) or None)


def _task_entries(run: RunDirectory, policy: str) -> Entries:
    """The figures of tasks and judgements that the table shows, by "task.metric"; from the manifests: evaluation.json
    is written after them, and a kill may come between."""
    tasks = gather_evaluation(run).get(policy, {})
    return {
        f"{task}.{metric}": entry
        for task, result in tasks.items()
        for metric, entry in result.metrics.items()
        if metric in COMPARED_TASK_METRICS
    }


def _over_seeds(comparison: Comparison, arm: str, round: Round, seeds: Sequence[int]) -> Entries:
    own = [_items(comparison, arm, seed, round) for seed in seeds]
    base = [_items(comparison, BASE, seed, rounds.BASE) for seed in seeds]
    entries: Entries = {}
    for name in own[0]:
        if not all(name in of_seed for of_seed in own):
            continue
        draw = _draw(comparison, name)
        value = over_seeds([_by_item(of_seed[name]) for of_seed in own], **draw)
        measure = measure_of(name)
        entry = value.within(measure.bounds).as_entry(measure.unit, "bootstrap")
        if not round.is_base and all(name in of_seed for of_seed in base):
            changes = [item_changes(before[name], after[name]) for before, after in zip(base, own, strict=True)]
            means = [float(np.mean(list(of_seed.values()))) for of_seed in changes]
            change = over_seeds(changes, **draw).within(measure.change_bounds)
            entry = with_change(replace(entry, seed_changes=means), change)
        entries[name] = entry
    held_out = {name: entry for name, entry in entries.items() if name in HELD_OUT}
    named = comparison.shared.evaluate.primary
    return entries | with_primary(held_out, primary_measure(named, with_context=PRIMARY[0] in held_out))


def _draw(comparison: Comparison, name: str) -> dict[str, Any]:
    """How a measure is resampled: a held-out one by the users and questions of its prompts, which all runs share."""
    clusters = held_out_clusters(comparison.run(BASE, comparison.seeds[0])) if name in HELD_OUT else None
    return {"samples": BOOTSTRAP_SAMPLES, "seed": comparison.seeds[0], "clusters": clusters}


def _held_out_items(comparison: Comparison, arm: str, seed: int, round: Round) -> dict[str, Items]:
    """Held-out measure -> (values, items) of one policy, from its scored answers."""
    run = comparison.run(arm, seed)
    rows = measured_rows(run, round)
    base = None if round.is_base else measured_rows(run, rounds.BASE)
    columns = item_values(rows, comparison.shared.train.beta, base)
    found: dict[str, Items] = {
        name: (columns[name][1], columns[name][0]) for name in _compared(comparison) if name in columns
    }
    kl = mi.kl_per_token(rows.policy_own, rows.initial_own, rows.token_counts)
    return found | {"kl_per_token": (kl, rows.prompt_ids)}


def _items(comparison: Comparison, arm: str, seed: int, round: Round) -> dict[str, Items]:
    """Every measure of the table -> (values, items) of one policy; of the tasks only accuracies."""
    run, found = comparison.run(arm, seed), _held_out_items(comparison, arm, seed, round)
    for name in _task_entries(run, round.key):
        task, _, metric = name.rpartition(".")
        if metric == "accuracy":
            found[name] = _task_items(run, round, task)
    return found


def _task_items(run: RunDirectory, round: Round, task: str) -> Items:
    path, columns = run.path(run.stage(round, "tasks"), task, "examples"), ["item_id", "verdict"]
    examples = open_table(path, run.arrow_filesystem(), columns).to_table(columns=columns)
    correct = [float(word == "correct") for word in examples["verdict"].to_pylist()]
    return correct, examples["item_id"].to_pylist()


def _by_item(items: Items) -> dict[str, float]:
    names, means = group_means(*items)
    return dict(zip(names.tolist(), means.tolist(), strict=True))


def _difference(comparison: Comparison, base: str, arm: str, round: Round, name: str) -> Difference:
    """The paired change of one measure from one arm to another, with its verdict."""
    draw = _draw(comparison, name)
    before, after = (
        [_held_out_items(comparison, one, seed, round)[name] for seed in comparison.seeds] for one in (base, arm)
    )
    pairs = list(zip(before, after, strict=True))
    if len(pairs) == 1:
        change = bootstrap_change(*pairs[0][0], *pairs[0][1], **draw)
    else:
        change = over_seeds([item_changes(*pair) for pair in pairs], **draw)
    measure = HELD_OUT[name]
    change = change.within(measure.change_bounds)
    return Difference(
        change=change.value,
        change_low=change.low,
        change_high=change.high,
        n=change.n,
        unit=measure.unit,
        verdict=describe_change(change, measure.better),
    )


def _equal(comparison: Comparison, complete: Sequence[str]) -> EqualData:
    """What is equal in all arms, looked up in each; raises RuntimeError where it is not."""
    found: dict[str, set[int]] = {"pairs": set(), "steps": set()}
    for arm in complete:
        summaries = [
            _train_summary(comparison.run(arm, seed), Round(number))
            for seed in comparison.seeds
            for number in range(comparison.shared.rounds)
        ]
        found["pairs"].add(sum(summary.pairs for summary in summaries))
        found["steps"].add(sum(summary.steps for summary in summaries))
    for name, values in found.items():
        if len(values) > 1:
            raise RuntimeError(f"{comparison.run_dir}: expected equal {name} in all arms, found {sorted(values)}")
    train = comparison.shared.train
    totals = {name: next(iter(values), 0) for name, values in found.items()}
    return EqualData(**totals, batch_size=train.batch_size, epochs=train.epochs)


def _train_summary(run: RunDirectory, round: Round) -> TrainSummary:
    manifest = run.read_manifest(run.stage(round, "train"), TrainFacts)
    assert manifest is not None
    return manifest.facts.summary


def _is_measured(run: RunDirectory, round: Round) -> bool:
    return run.is_finished(run.stage(round, "evaluate"))
