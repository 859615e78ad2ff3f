"""The evaluate stage: everything that is measured of a policy, in order."""

from __future__ import annotations

from collections.abc import Sequence

from mipo_ray.evaluation.held_out.gains import where_gained
from mipo_ray.evaluation.held_out.matrix import matrix_of, read_matrix_rows
from mipo_ray.evaluation.held_out.metrics import measure
from mipo_ray.evaluation.held_out.rows import held_out_labels, measured_rows, sampled_tokens
from mipo_ray.evaluation.held_out.stage import measure_policy
from mipo_ray.evaluation.intervals import BOOTSTRAP_SAMPLES
from mipo_ray.evaluation.judge.stage import judge_policy
from mipo_ray.evaluation.significance import with_primary
from mipo_ray.evaluation.summary import few_text, limit_text, power_text
from mipo_ray.evaluation.tasks.stage import measure_tasks
from mipo_ray.evaluation.tasks.task_check import CheckedTask
from mipo_ray.evaluation.tasks.task_requests import prepare_tasks
from mipo_ray.measures import PRIMARY, primary_measure
from mipo_ray.models.hub import model_commit
from mipo_ray.prompts.check import PromptSummary
from mipo_ray.ray_cluster.resources import engine_request, most_gpus, scorer_request
from mipo_ray.session import Session, Stage
from mipo_ray.storage.manifests import EvaluateFacts
from mipo_ray.storage.results import write_results
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.terminal import say_error


def evaluate(session: Session, round: Round, held_out: PromptSummary, tasks: Sequence[CheckedTask]) -> None:
    """Measures the policy that stands after a round: on held-out prompts, on the tasks, by the judge.

    `held_out` are the checked held-out prompts. Each is a stage of its own; the results are brought up to date.
    """
    prepare_tasks(session.config, session.run, tasks)
    stage = session.stage(round, "evaluate")
    if stage.finished_before(EvaluateFacts) is None:
        with stage.reported() as report:
            manifest = report.commit(stage, _measure_held_out(stage, held_out))
            report.closing = f": {manifest.facts.responses} held-out responses"
        results = manifest.facts.results
        if round.is_base and (said := [text for text in (power_text(results), few_text(results)) if text]):
            stage.say("; ".join(said))
        if round.is_base and (warned := limit_text(results, session.config)):
            say_error(f"warning: {warned}")
    write_results(session.run, session.config.rounds)
    measure_tasks(session, round, tasks)
    judge_policy(session, round, held_out)


def _measure_held_out(stage: Stage, held_out: PromptSummary) -> EvaluateFacts:
    config, run, round = stage.config, stage.run, stage.round
    reserving = scorer_request if stage.session.shares_engines else engine_request
    measure_policy(stage, held_out)
    rows = measured_rows(run, round)
    base = None if round.is_base else measured_rows(run, BASE)
    draw = {"samples": BOOTSTRAP_SAMPLES, "seed": config.seed}
    measured = measure(rows, base, beta=config.train.beta, **draw)
    labels = None if base is None else held_out_labels(run)
    named = primary_measure(config.evaluate.primary, with_context=PRIMARY[0] in measured)
    results = with_primary(measured, named)
    stage.events.emit({"event": "results", **{name: entry.value for name, entry in results.items()}})
    return EvaluateFacts(
        policy=stage.session.policy(round),
        policy_commit=model_commit(stage.session.policy(round)),
        prompts_commit=held_out.commit,
        responses=len(rows.prompt_ids),
        generated_tokens=sampled_tokens(run, round),
        matrix=matrix_of(run, round, read_matrix_rows(run, run.stage(BASE, "evaluate"))),
        results=results,
        gains=None if base is None or labels is None else where_gained(rows, base, labels, **draw),
        gpus=most_gpus(reserving(config, stage.session.resources)),
    )
