"""The arms of a comparison, each through the stages of a run, with equal data.

    base measured -> in each round: all arms generate -> the pairs that all of them kept -> each arm trains, is measured

`pair_id` is made of seed, round, prompt and sample alone: in the first round the same pair of two arms has the same
prompt and a chosen response sampled with the same seed, and differs in its rejected ones. So all arms train on the
pairs that every arm kept, in one order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pyarrow.dataset

from mipo_ray.comparison.definition import BASE, Comparison, common_pairs_file
from mipo_ray.errors import UserError
from mipo_ray.evaluation.judge.stage import reach_judge
from mipo_ray.generation.requests import condition_prompts
from mipo_ray.generation.stage import generate
from mipo_ray.loop import measure_round, session_of
from mipo_ray.monitoring.events import NO_EVENTS
from mipo_ray.planning.lifetime import one_stage
from mipo_ray.planning.plan import Plan, measured_stages
from mipo_ray.session import Session
from mipo_ray.storage import rounds
from mipo_ray.storage.configuration import record_config
from mipo_ray.storage.manifests import GenerateFacts, TrainFacts
from mipo_ray.storage.records import read_record
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.tables.parquet import open_table
from mipo_ray.terminal import say
from mipo_ray.training.stage import pair_set_hash, train
from mipo_ray.training.trainer import check_model_is_trainable


def run_arms(comparison: Comparison, plans: Mapping[tuple[str, int], Plan], report: Callable[[], object]) -> None:
    """Runs every unfinished stage of every arm and seed; `report` is called whenever an arm has been measured.

    `plans` are the checked ones, by arm (and "base") and seed. Raises UserError when the arms have no pair in common,
    or when an arm that was added later lacks pairs that the others were trained on already.
    """
    reach_judge(comparison.shared.evaluate.judge)
    for config in {arm.train.model_dump_json(): arm for arm in comparison.arms.values()}.values():
        check_model_is_trainable(config)
    for seed in comparison.seeds:
        _run_seed(comparison, seed, plans, report)


def _run_seed(
    comparison: Comparison, seed: int, plans: Mapping[tuple[str, int], Plan], report: Callable[[], object]
) -> None:
    base = plans[BASE, seed]
    record_config(base.run, base.config)
    # Prompts that cannot be used are told before any engine samples.
    for arm in comparison.arms:
        plan = plans[arm, seed]
        record_config(plan.run, plan.config)
        if comparison.same_pairs(arm) == arm:
            with _session_for(plan, []) as session:  # conditioning sends no event
                condition_prompts(session, Round(0), plan.sampled)
    _say(BASE, seed)
    with _session_for(base, measured_stages(base.config, base.run, rounds.BASE, base.tasks)) as session:
        measure_round(base, session, rounds.BASE)
    report()
    for round in map(Round, range(comparison.shared.rounds)):
        for arm in comparison.arms:
            _generate(comparison, arm, plans[arm, seed], round)
        only = common_pairs(comparison, seed, round)
        for arm in comparison.arms:
            plan = plans[arm, seed]
            for stage in measured_stages(comparison.shared, base.run, rounds.BASE, base.tasks):
                plan.run.copy_stage(base.run, stage)
            _say(arm, seed)
            stages = [plan.run.stage(round, "train"), *measured_stages(plan.config, plan.run, round, plan.tasks)]
            with _session_for(plan, stages) as session:
                train(session, round, only)
                _check_trained_on(plan.run, round, only)
                measure_round(plan, session, round)
            report()


def _generate(comparison: Comparison, arm: str, plan: Plan, round: Round) -> None:
    """An arm's pairs: another arm's, copied, where they would be the same, which only first rounds are."""
    seed = plan.config.seed
    _say(arm, seed)
    source = comparison.same_pairs(arm)
    stage = plan.run.stage(round, "generate")
    if round == Round(0) and source != arm and not plan.run.is_finished(stage):
        plan.run.copy_stage(comparison.run(source, seed), stage)
        say(f"{round.label}  generate  the same pairs as those of {source}: copied")
        return
    with _session_for(plan, [stage]) as session:
        generate(session, round, plan.sampled)


@contextmanager
def _session_for(plan: Plan, stages: Sequence[str]) -> Iterator[Session]:
    """The session of an arm for these stages; its event writer and trackers start only where one is to be done.

    A tracker that starts makes, or opens again, a run on its server: an arm that has nothing to tell must not.
    """
    if all(plan.run.is_finished(stage) for stage in stages):
        yield Session(plan.config, plan.run, plan.resources, NO_EVENTS)
    else:
        with session_of(replace(plan, lifetime=one_stage(plan.lifetime)), stages) as session:
            yield session


def common_pairs(comparison: Comparison, seed: int, round: Round) -> frozenset[str]:
    """The pair_ids that every arm kept, fixed in a file when they are first asked for.

    Raises UserError where there are none, and where an arm lacks some of those that were fixed before it was added.
    """
    root, name = comparison.root(), common_pairs_file(seed, round)
    kept = {arm: kept_pairs(comparison.run(arm, seed), round) for arm in comparison.arms}
    counts = ", ".join(f"{arm} {len(pairs)}" for arm, pairs in kept.items())
    if (text := root.read_text(name)) is not None:
        fixed = frozenset(read_record(list[str], text, root.path(name)))
        for arm, pairs in kept.items():
            if missing := fixed - pairs:
                raise UserError(
                    f"{root.path(name)}: arm {arm} lacks {len(missing)} of the {len(fixed)} pairs that the other arms "
                    f"were trained on: data would not be equal. Compare it in another run_dir"
                )
        return fixed
    common = frozenset.intersection(*kept.values())
    if not common:
        raise UserError(
            f"{comparison.run_dir}: the arms kept no pair in common (kept: {counts}): give more prompts or "
            "fewer filters"
        )
    root.write_text(name, json.dumps(sorted(common)))
    say(f"{round.label}  {len(common)} pairs were kept by all arms ({counts})")
    return common


def kept_pairs(run: RunDirectory, round: Round) -> frozenset[str]:
    """The pair_ids of the round's pairs that no filter dropped."""
    stage = run.stage(round, "generate")
    manifest = run.read_manifest(stage, GenerateFacts)
    assert manifest is not None
    files = [run.path(stage, name) for name in manifest.facts.pairs]
    pairs = open_table(files, run.arrow_filesystem(), ["pair_id", "dropped"])
    kept = pairs.to_table(columns=["pair_id"], filter=pyarrow.dataset.field("dropped") == "")
    return frozenset(kept["pair_id"].to_pylist())


def _check_trained_on(run: RunDirectory, round: Round, only: frozenset[str]) -> None:
    stage = run.stage(round, "train")
    manifest = run.read_manifest(stage, TrainFacts)
    if manifest is None or manifest.facts.pair_set != pair_set_hash(only):
        raise UserError(
            f"{run.path(stage)}: was trained on other pairs than the ones of this comparison, perhaps by mipo_ray.run; "
            "remove it to train again"
        )


def _say(arm: str, seed: int) -> None:
    say(f"\n{arm}, seed {seed}")
