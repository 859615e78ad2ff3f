"""The command `compare`: baselines, a control and kinds of MIPO at equal data and steps, one table, one plot.

    python -m mipo_ray.compare jobs/compare/personalization.yaml               train and measure every arm
    python -m mipo_ray.compare RECIPE.yaml seeds=[0,1,2] arms.sft.train.learning_rate=1e-5
    python -m mipo_ray.compare --dry-run RECIPE.yaml                           check everything and print the plan

The same command goes on where it was stopped. Each arm is a run of its own below run_dir/NAME/seed-S; comparison.json,
comparison.md and comparison.html stand in run_dir. Exit codes are those of mipo_ray.run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mipo_ray.command import parse_recipe, run_command
from mipo_ray.comparison.definition import BASE, Comparison, describe_arm, load_comparison
from mipo_ray.config.trust import describe_acts
from mipo_ray.errors import UserError
from mipo_ray.monitoring.display import said_as, shown
from mipo_ray.monitoring.views import Display
from mipo_ray.planning.describe import describe
from mipo_ray.planning.plan import Inputs, Plan, check_inputs, make_plan
from mipo_ray.ray_cluster.connection import connect, connected_work, nodes_for_dry_run, unbounded_node
from mipo_ray.ray_cluster.resources import Node
from mipo_ray.storage.lock import hold_lock
from mipo_ray.storage.run_directory import RunDirectory, StorageError
from mipo_ray.terminal import say


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = _parse(arguments)

    def work() -> int:
        comparison = load_comparison(options.recipe, options.overrides, trusts_recipe=options.trust_recipe)
        with said_as(options.display):
            return _dry_run(comparison) if options.dry_run else _run(comparison, options.display)

    return run_command(work, resumes=not options.dry_run)


def _dry_run(comparison: Comparison) -> int:
    plans = _plans(_inputs(comparison), nodes_for_dry_run(comparison.shared))
    say(describe_comparison(comparison, plans))
    say("finished: nothing to do" if _is_finished(plans) else "dry run: nothing was started")
    return 0


def _run(comparison: Comparison, display: Display) -> int:
    root = comparison.root()
    _check_root(root)
    root.check_writable()
    with hold_lock(root):
        started = time.monotonic()
        inputs = _inputs(comparison)
        here, is_local = unbounded_node(comparison.shared)
        plans = _plans(inputs, [here], are_all=is_local)  # what this machine alone refuses costs no cluster
        if _is_finished(plans):
            from mipo_ray.report import run_report

            say(f"{root.url}: finished before, nothing to train")
            for plan in plans.values():
                run_report.bring_up_to_date(plan.config, plan.run)
            _report(comparison, root)
            return 0
        with shown(root, display):
            plans = _plans(inputs, connect(comparison.shared))
            say(describe_comparison(comparison, plans))

            from mipo_ray.comparison.arms import run_arms
            from mipo_ray.comparison.tables import write_comparison
            from mipo_ray.monitoring.failure_logs import kept_logs

            with connected_work(), kept_logs(root):
                run_arms(comparison, plans, lambda: write_comparison(comparison, root))
        _report(comparison, root)
        say(f"finished in {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


def _report(comparison: Comparison, root: RunDirectory) -> None:
    from mipo_ray.comparison.tables import write_comparison

    found = write_comparison(comparison, root)
    say("\n".join(["", *found.control, *found.findings, "", f"table and plot: {root.path('comparison.html')}"]))


def describe_comparison(comparison: Comparison, plans: dict[tuple[str, int], Plan]) -> str:
    """The plan as text, for `--dry-run`: that of the base, what is equal, and each arm with what is left to do."""
    shared = comparison.shared
    first = plans[BASE, comparison.seeds[0]]
    seeds, samples = ", ".join(map(str, comparison.seeds)), shared.generation.samples_per_prompt
    lines = [
        f"comparison      {comparison.run_dir}: {len(comparison.arms)} arms, seeds {seeds}",
        f"equal           {first.prompts.rows:,} prompts x {samples} samples, of which all arms "
        f"train on those that every arm kept; {shared.train.batch_size} pairs per step, {shared.train.epochs} "
        f"epoch(s), {shared.rounds} round(s)",
        *(
            "  " + line
            for line in describe(first).split("\n")
            if not line.startswith(("stages", "  ", "run directory", "evaluation "))  # of one run
        ),
        "arms",
    ]
    names = {(arm, seed): f"{arm} (seed {seed})" for arm, seed in plans}
    width = max(32, 2 + max(map(len, names.values())))
    for (arm, seed), plan in plans.items():
        source = BASE if arm == BASE else comparison.same_pairs(arm)
        what = "the initial model" if arm == BASE else describe_arm(comparison.arms[arm])
        pairs = f"; pairs of {source}" if source != arm else ""
        done = f"{len(_finished(arm, plan))} of {len(_stages(arm, plan))} stages finished"
        lines.append(f"  {names[arm, seed]:<{width}}{what}{pairs}; {done}")
    for arm, config in comparison.arms.items():
        lines += [f"  {arm}: {line}" for line in describe_acts(config) if line not in describe_acts(shared)]
    return "\n".join(lines)


def _inputs(comparison: Comparison) -> dict[tuple[str, int], Inputs]:
    """The checked inputs of each run of the comparison; what cannot be used is told with the arm's name."""
    inputs = {}
    for arm, seed in [(BASE, seed) for seed in comparison.seeds] + comparison.runs():
        with _named(arm, seed):
            inputs[arm, seed] = check_inputs(comparison.config(arm, seed), comparison.run(arm, seed))
    return inputs


def _plans(
    inputs: dict[tuple[str, int], Inputs], nodes: Sequence[Node], *, are_all: bool = True
) -> dict[tuple[str, int], Plan]:
    """A plan for each run of the comparison; one that the nodes cannot hold is told with the arm's name."""
    plans = {}
    for arm, seed in inputs:
        with _named(arm, seed):
            plans[arm, seed] = make_plan(inputs[arm, seed], nodes, are_all=are_all)
    return plans


@contextmanager
def _named(arm: str, seed: int) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise type(error)(f"{arm}, seed {seed}: {error}") from None


def _stages(arm: str, plan: Plan) -> list[str]:
    """The base is only measured; to the arms its measurement is given."""
    return [stage for stage in plan.stages if stage.startswith("base/") == (arm == BASE)]


def _finished(arm: str, plan: Plan) -> list[str]:
    return [stage for stage in _stages(arm, plan) if stage in plan.finished]


def _is_finished(plans: dict[tuple[str, int], Plan]) -> bool:
    return all(_finished(arm, plan) == _stages(arm, plan) for (arm, _), plan in plans.items())


def _check_root(root: RunDirectory) -> None:
    if root.read_text("config.yaml") is not None:
        raise StorageError(f"{root.url}: is the directory of a single run; choose another run_dir for the comparison")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mipo_ray.compare",
        description="Train and measure several ways of improving a model at equal data and steps.",
        epilog="The recipe's keys are those of mipo_ray.run, and arms (name: overrides) and seeds (a list).",
    )
    return parse_recipe(parser, arguments, more_keys=("arms", "seeds"))


if __name__ == "__main__":
    sys.exit(main())
