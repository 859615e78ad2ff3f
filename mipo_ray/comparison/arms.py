"""The arms of a comparison, each through the stages of a run, with equal data.

    base measured -> in each round: all arms generate -> the pairs that all of them kept -> each arm trains, is measured

`pair_id` is made of seed, round, prompt and sample alone: in the first round the same pair of two arms has the same
prompt and a chosen response sampled with the same seed, and differs in its rejected ones. So all arms train on the
pairs that every arm kept, in one order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import pyarrow.dataset

from mipo_ray.comparison.definition import BASE, Comparison, common_pairs_file
from mipo_ray.errors import UserError
from mipo_ray.evaluation.judge.stage import reach_judge
from mipo_ray.evaluation.stage import evaluate_all
from mipo_ray.evaluation.tasks.task_check import CheckedTask, check_tasks
from mipo_ray.evaluation.tasks.task_requests import prepare_tasks
from mipo_ray.generation.requests import condition_prompts
from mipo_ray.generation.stage import generate
from mipo_ray.monitoring import events as monitoring
from mipo_ray.planning.plan import measured_stages
from mipo_ray.ray_cluster.resources import Resources
from mipo_ray.report.run_report import write_report
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.training.stage import pair_set_hash, train
from mipo_ray.training.trainer import check_training


def run_arms(comparison: Comparison, resources: Mapping[str, Resources], report: Callable[[], object]) -> None:
    """Runs every unfinished stage of every arm and seed; `report` is called whenever an arm has been measured.

    `resources` are those of each arm and of "base". Raises UserError when the arms have no pair in common, or when an
    arm that was added later lacks pairs that the others were trained on already.
    """
    tasks = check_tasks(comparison.shared)
    reach_judge(comparison.shared.evaluate.judge)
    for config in {arm.train.model_dump_json(): arm for arm in comparison.arms.values()}.values():
        check_training(config)
    for seed in comparison.seeds:
        _run_seed(comparison, seed, tasks, resources, report)


def _run_seed(
    comparison: Comparison,
    seed: int,
    tasks: Sequence[CheckedTask],
    resources: Mapping[str, Resources],
    report: Callable[[], object],
) -> None:
    initial = comparison.shared.model.path
    base, base_config = comparison.run(BASE, seed), comparison.config(BASE, seed)
    base.record_config(base_config)
    # Prompts that cannot be used are told before any engine samples.
    for arm in comparison.arms:
        run, config = comparison.run(arm, seed), comparison.config(arm, seed)
        run.record_config(config)
        if comparison.same_pairs(arm) == arm:
            condition_prompts(config, run, 0, policy=initial, resources=resources[arm])
    _say(BASE, seed)
    with monitoring.recording(base, base_config.trackers) as events:
        prepare_tasks(tasks, base_config, base, policy=initial)
        evaluate_all(base_config, base, None, initial, initial, tasks, resources[BASE], events)
    write_report(base_config, base)  # tasks and judgements are not in the one that the evaluate stage wrote
    report()
    policies = dict.fromkeys(comparison.arms, initial)
    for round_index in range(comparison.shared.rounds):
        for arm in comparison.arms:
            _generate(comparison, arm, seed, round_index, policies[arm], resources[arm])
        only = common_pairs(comparison, seed, round_index)
        for arm in comparison.arms:
            run, config = comparison.run(arm, seed), comparison.config(arm, seed)
            for stage in measured_stages(comparison.shared, base, None, tasks):
                run.copy_stage(base, stage)
            pairs = run.read_manifest(run.stage(round_index, "generate"))
            assert pairs is not None
            _say(arm, seed)
            with monitoring.recording(run, config.trackers) as events:
                policy = train(config, run, round_index, policies[arm], pairs, resources[arm], events, only)
                _check_trained_on(run, round_index, only)
                prepare_tasks(tasks, config, run, policy=initial)
                evaluate_all(config, run, round_index, policy, initial, tasks, resources[arm], events)
            write_report(config, run)
            policies[arm] = policy
            report()


def _generate(comparison: Comparison, arm: str, seed: int, round_index: int, policy: str, resources: Resources) -> None:
    """An arm's pairs: another arm's, copied, where they would be the same, which only first rounds are."""
    run, config = comparison.run(arm, seed), comparison.config(arm, seed)
    _say(arm, seed)
    source = comparison.same_pairs(arm)
    stage = run.stage(round_index, "generate")
    if round_index == 0 and source != arm and run.read_manifest(stage) is None:
        run.copy_stage(comparison.run(source, seed), stage)
        print(f"round 0  generate  the same pairs as those of {source}: copied", flush=True)
        return
    with monitoring.recording(run, config.trackers) as events:
        generate(config, run, round_index, policy, resources, events)


def common_pairs(comparison: Comparison, seed: int, round_index: int) -> frozenset[str]:
    """The pair_ids that every arm kept, fixed in a file when they are first asked for.

    Raises UserError where there are none, and where an arm lacks some of those that were fixed before it was added.
    """
    root, name = comparison.root(), common_pairs_file(seed, round_index)
    kept = {arm: kept_pairs(comparison.run(arm, seed), round_index) for arm in comparison.arms}
    counts = ", ".join(f"{arm} {len(pairs)}" for arm, pairs in kept.items())
    if (text := root.read_text(name)) is not None:
        fixed = frozenset(json.loads(text))
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
    print(f"round {round_index}  {len(common)} pairs were kept by all arms ({counts})", flush=True)
    return common


def kept_pairs(run: RunDirectory, round_index: int) -> frozenset[str]:
    """The pair_ids of the round's pairs that no filter dropped."""
    stage = run.stage(round_index, "generate")
    manifest = run.read_manifest(stage)
    assert manifest is not None
    files = [run.path(stage, name) for name in manifest["pairs"]]
    pairs = pyarrow.dataset.dataset(files, filesystem=run.arrow_filesystem(), format="parquet")
    kept = pairs.to_table(columns=["pair_id"], filter=pyarrow.dataset.field("dropped") == "")
    return frozenset(kept["pair_id"].to_pylist())


def _check_trained_on(run: RunDirectory, round_index: int, only: frozenset[str]) -> None:
    stage = run.stage(round_index, "train")
    manifest = run.read_manifest(stage)
    if manifest is None or manifest.get("pair_set") != pair_set_hash(only):
        raise UserError(
            f"{run.path(stage)}: was trained on other pairs than the ones of this comparison, perhaps by mipo_ray.run; "
            "remove it to train again"
        )


def _say(arm: str, seed: int) -> None:
    print(f"\n{arm}, seed {seed}", flush=True)
