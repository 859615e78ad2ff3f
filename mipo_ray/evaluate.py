"""The command that measures accuracy tasks and has held-out answers judged: of a recipe's model, or of a whole run.

    python -m mipo_ray.evaluate jobs/NAME.yaml tasks=[gsm8k, svamp]         a recipe's model, as "base" of its run_dir
    python -m mipo_ray.evaluate runs/NAME "tasks={arc_easy: {limit: 500}}"  the base and every finished round of a run
    python -m mipo_ray.evaluate runs/NAME tasks=gsm8k task_max_model_len=2048   in a larger window than the run's own
    python -m mipo_ray.evaluate runs/NAME judge.model=ORG/JUDGE             judge the held-out answers of a run
    python -m mipo_ray.evaluate --dry-run runs/NAME tasks=svamp             check everything and print the plan

`tasks=`, `task_max_model_len=` and `judge.` are short for `evaluate.tasks=` and so on. A judge compares answers that
the run has sampled already. What is finished is not measured again; the same command goes on after a kill.
Results: evaluation.json in the run directory, and each item below base/tasks and rounds/NNN/tasks.

Exit codes are those of mipo_ray.run.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mipo_ray.command import add_options, run_command
from mipo_ray.conditioning.needs import check_held_out
from mipo_ray.config.recipe import load_config, load_run_config, split_arguments
from mipo_ray.config.schema import Config
from mipo_ray.config.trust import describe_acts
from mipo_ray.errors import UserError
from mipo_ray.evaluation.figures import task_table
from mipo_ray.evaluation.judge.rows import check_judge, judged_protocols, refuse_other_references
from mipo_ray.evaluation.tasks.task import task_names
from mipo_ray.evaluation.tasks.task_check import SAMPLED, CheckedTask, check_finished_tasks, check_tasks
from mipo_ray.models.source import check_model, check_sampled_model
from mipo_ray.monitoring.display import said_as, shown
from mipo_ray.monitoring.trackers import check_trackers
from mipo_ray.monitoring.views import Display
from mipo_ray.planning.agenda import agenda
from mipo_ray.planning.chat import check_chats
from mipo_ray.planning.describe import describe_judge, describe_tasks
from mipo_ray.planning.lifetime import Lifetime, engine_lifetime, one_stage
from mipo_ray.planning.token_counts import TOKENS_HELP, TokenCounts
from mipo_ray.prompts.check import PromptSummary
from mipo_ray.ray_cluster.connection import connect, connected_work, nodes_for_dry_run, unbounded_node
from mipo_ray.ray_cluster.resources import Node, Resources, check_resources, resolve, total
from mipo_ray.storage.configuration import check_config, record_config
from mipo_ray.storage.lock import hold_lock
from mipo_ray.storage.results import is_report_current, read_evaluation, write_evaluation
from mipo_ray.storage.rounds import BASE, Round, base_and_rounds
from mipo_ray.storage.run_directory import RunDirectory, open_run
from mipo_ray.terminal import say

# Keys of the section evaluate that this command takes without its name.
SHORT_KEYS = ("tasks", "task_max_model_len", "judge")


@dataclass(frozen=True)
class EvaluationInputs:
    """What an evaluation reads, checked. `rounds`: the rounds whose policies are measured after the base; `unfinished`:
    directories of the results that are still to be measured; `judged`: the policies whose held-out answers are judged,
    those of which there are any; `held_out`: their prompts, None without a judge; `token_notes`: see `Inputs`."""

    config: Config
    run: RunDirectory
    rounds: tuple[Round, ...]
    tasks: tuple[CheckedTask, ...]
    unfinished: tuple[str, ...]
    judged: tuple[Round, ...]
    held_out: PromptSummary | None
    token_notes: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def policies(self) -> tuple[Round, ...]:
        return (BASE, *self.rounds)


@dataclass(frozen=True)
class EvaluationPlan(EvaluationInputs):
    """Checked inputs on a cluster that can hold the engines."""

    resources: Resources
    lifetime: Lifetime


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = _parse(arguments)

    def work() -> int:
        config, run, rounds = _load(options.target, options.overrides, trusts_recipe=options.trust_recipe)
        inputs_of = functools.partial(check_evaluation_inputs, config, run, rounds, count_all=options.tokens)
        with said_as(options.display):
            return _dry_run(inputs_of) if options.dry_run else _run(inputs_of, run, options.display)

    return run_command(work, resumes=not options.dry_run)


def check_evaluation_inputs(
    config: Config, run: RunDirectory, trained: Sequence[int], *, count_all: bool = False
) -> EvaluationInputs:
    """Checks everything that can be checked without a cluster; raises UserError for what a user must mend.

    trained: the numbers of the rounds whose policies are there. count_all: see `planning.plan.check_inputs`.
    """
    check_trackers(config.trackers)
    check_model(config.model.source)
    check_sampled_model(config.model.source, config.windows)
    counts = TokenCounts(config, count_all=count_all)
    tasks = check_tasks(config, counts.of_item)
    judge = config.evaluate.judge
    if not tasks and not judge.is_on:
        raise UserError(
            f"tasks: expected at least one of {', '.join(task_names())}, or a task file, or a judge (judge.model); "
            "found none"
        )
    held_out = check_held_out(config) if judge.is_on else None
    run.check_place()
    check_config(run, config)
    check_finished_tasks(tasks, run, trained)
    check_judge(config, run)
    if held_out is not None:
        refuse_other_references(config, run, held_out)
    check_chats(config, tasks)
    policies = base_and_rounds(trained)
    answered = [round for round in policies if run.is_finished(run.stage(round, "evaluate"))]
    judged = tuple(answered) if judge.is_on and BASE in answered else ()
    if not tasks and not judged:
        raise UserError(
            f"judge: {run.path(run.stage(BASE, 'evaluate'))}: expected held-out answers to judge, found none; "
            "python -m mipo_ray.run samples them"
        )
    stages = [run.stage(round, f"tasks/{task.name}") for round in policies for task in tasks]
    stages += [run.stage(round, f"judge/{name}") for round in judged for name in judged_protocols(judge, round)]
    unfinished = tuple(stage for stage in stages if not run.is_finished(stage))
    measured = [
        task.name for task in tasks for round in policies if run.stage(round, f"tasks/{task.name}") in unfinished
    ]
    notes = counts.notes(measured)
    return EvaluationInputs(config, run, tuple(policies[1:]), tasks, unfinished, judged, held_out, token_notes=notes)


def make_evaluation_plan(inputs: EvaluationInputs, nodes: Sequence[Node], *, are_all: bool = True) -> EvaluationPlan:
    """The plan on a cluster of these nodes (see `planning.plan.make_plan`); raises ResourceError where they cannot hold
    its engines."""
    resources = resolve(inputs.config, total(nodes))
    known = nodes if are_all else None
    check_resources(inputs.config, resources, total(nodes), known, engines_alone=True)
    lifetime = engine_lifetime(inputs.config, resources, known, engines_alone=True)
    if len(inputs.policies) == 1:
        lifetime = one_stage(lifetime)
    return EvaluationPlan(**vars(inputs), resources=resources, lifetime=lifetime)


def describe(plan: EvaluationPlan) -> str:
    """The plan as text."""
    config, model, pool = plan.config, plan.config.model, plan.config.generation.pool
    policies = ", ".join(round.key for round in plan.policies)
    device = "GPU" if plan.resources.on_gpu else "CPU"
    return "\n".join(
        [
            f"run directory   {plan.run.url}",
            f"model           {model.source}, {plan.resources.dtype}, window {model.max_model_len} tokens",
            f"policies        {policies}",
            *describe_tasks(config, plan.resources, plan.tasks),
            *([] if plan.held_out is None or not plan.judged else describe_judge(config.evaluate, plan.held_out.rows)),
            *_not_judged(plan),
            *describe_acts(config),
            *(f"tokens          {note}" for note in plan.token_notes),
            f"engines         {pool.min_size} to {pool.max_size}, each {pool.cpus_per_engine:g} CPUs and "
            f"{plan.resources.gpus_per_engine:g} GPUs ({device}); for the {plan.lifetime}",
            f"to do           {', '.join(plan.unfinished) or 'nothing'}",
        ]
    )


def _dry_run(inputs_of: Callable[[], EvaluationInputs]) -> int:
    inputs = inputs_of()
    say(describe(make_evaluation_plan(inputs, nodes_for_dry_run(inputs.config))))
    say("dry run: nothing was started")
    return 0


def _run(inputs_of: Callable[[], EvaluationInputs], run: RunDirectory, display: Display) -> int:
    run.check_writable()
    with hold_lock(run):
        started = time.monotonic()
        inputs = inputs_of()
        config = inputs.config
        here, is_local = unbounded_node(config)
        make_evaluation_plan(inputs, [here], are_all=is_local)  # what this machine alone refuses costs no cluster
        if not inputs.unfinished:
            say("\n".join([f"{run.url}: finished before, nothing to do", *_not_judged(inputs), _finish(inputs)]))
            return 0
        with shown(run, display):
            plan = make_evaluation_plan(inputs, connect(config))
            if run.read_text("config.yaml") is None:
                record_config(run, config)
            say(describe(plan))

            from mipo_ray.monitoring.failure_logs import kept_logs

            with connected_work(), kept_logs(run):
                measure_policies(plan)
        last = f"finished in {(time.monotonic() - started) / 60:.1f} minutes; results: {run.url}"
        say(f"\n{task_table(read_evaluation(run))}\n{last}")
    return 0


def _not_judged(inputs: EvaluationInputs) -> list[str]:
    """Lines for the plan: whose answers a judge is not asked about, since there are none."""
    if not inputs.config.evaluate.judge.is_on:
        return []
    if not inputs.judged:
        return ["judge           nothing to judge: base has no held-out answers"]
    missing = [round for round in inputs.rounds if round not in inputs.judged]
    return [f"judge           not {round.label}: it has no held-out answers" for round in missing]


def _finish(inputs: EvaluationInputs) -> str:
    """Does what a kill right after the last commit left undone; returns the table of the tasks."""
    run = inputs.run
    for round in inputs.policies if inputs.tasks else ():
        run.remove(run.stage(round, SAMPLED))
    table = task_table(write_evaluation(run))
    if not is_report_current(run):
        from mipo_ray.report.run_report import write_report

        write_report(inputs.config, run)
    return table


def measure_policies(plan: EvaluationPlan) -> None:
    """Measures the base and every round of the plan, policy by policy, on a cluster that is connected."""
    from mipo_ray.evaluation.judge.stage import judge_policy, reach_judge
    from mipo_ray.evaluation.tasks.stage import measure_tasks
    from mipo_ray.evaluation.tasks.task_requests import prepare_tasks
    from mipo_ray.generation.living_engine import engines_of_run
    from mipo_ray.monitoring.events import recording
    from mipo_ray.monitoring.watch import watched
    from mipo_ray.report.run_report import write_report
    from mipo_ray.session import Session

    config, run = plan.config, plan.run
    with (
        recording(run, config.trackers) as events,
        engines_of_run(config, plan.resources, plan.lifetime.living) as engines,
        watched(events, agenda(plan.unfinished, (), {})),
    ):
        session = Session(config, run, plan.resources, events, engines)
        if plan.judged:
            reach_judge(config.evaluate.judge)
        prepare_tasks(config, run, plan.tasks)
        for round in plan.policies:
            if plan.tasks:
                measure_tasks(session, round, plan.tasks)
            if plan.held_out is not None and round in plan.judged:
                judge_policy(session, round, plan.held_out)
    write_report(config, run)


def _load(
    target: str, overrides: Sequence[str], *, trusts_recipe: bool = False
) -> tuple[Config, RunDirectory, list[int]]:
    """The configuration, the run directory, and the rounds that a run has trained; a recipe's model has none."""
    short = tuple(f"{key}{mark}" for key in SHORT_KEYS for mark in "=.")
    overrides = [f"evaluate.{override}" if override.startswith(short) else override for override in overrides]
    if target.endswith((".yaml", ".yml")) and not os.path.isdir(target):
        config = load_config(target, overrides, trusts_recipe=trusts_recipe)
        return config, open_run(config.run_dir), []
    run = open_run(target)
    text = run.read_text("config.yaml")
    if text is None:
        raise UserError(f"{target}: expected a recipe (.yaml) or a run directory with a config.yaml, found none there")
    overrides = [*overrides, f"run_dir={run.url}"]
    config = load_run_config(text, run.path("config.yaml"), overrides, trusts_recipe=trusts_recipe)
    trained = [index for index in range(config.rounds) if run.is_finished(run.stage(Round(index), "train"))]
    return config, run, trained


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mipo_ray.evaluate",
        description="Measure the model of a recipe, or every policy of a run, on accuracy tasks.",
        epilog=f"Tasks: {', '.join(task_names())}, or the path of a task file.",
    )
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="RECIPE_OR_RUN [key=value ...]",
        help="a recipe (.yaml) or a run directory; tasks=[...], or any field of a recipe",
    )
    parser.add_argument("--tokens", action="store_true", help=TOKENS_HELP)
    add_options(parser)
    options = parser.parse_intermixed_args(arguments)
    targets, options.overrides = split_arguments(options.arguments, SHORT_KEYS)
    if len(targets) != 1:
        parser.error(f"expected one recipe or run directory, found {', '.join(targets) or 'none'}")
    options.target = targets[0]
    return options


if __name__ == "__main__":
    sys.exit(main())
