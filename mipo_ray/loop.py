"""The rounds: generate -> train -> evaluate, each stage committed once, the same command resuming where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from mipo_ray.evaluation.guard_stage import guard_round
from mipo_ray.evaluation.held_out.scorers import scorers_of_run
from mipo_ray.evaluation.judge.stage import reach_judge
from mipo_ray.evaluation.stage import evaluate
from mipo_ray.evaluation.summary import closing_text
from mipo_ray.generation.given_pairs import take_pairs
from mipo_ray.generation.living_engine import engines_of_run
from mipo_ray.generation.requests import condition_prompts, condition_unfinished
from mipo_ray.generation.stage import generate
from mipo_ray.monitoring.events import recording
from mipo_ray.monitoring.watch import watched
from mipo_ray.pairs.given import PairSummary
from mipo_ray.planning.agenda import agenda_of
from mipo_ray.planning.plan import Plan
from mipo_ray.prompts.check import PromptSummary
from mipo_ray.ray_cluster.beside import wait_for, work_beside
from mipo_ray.report.run_report import write_report
from mipo_ray.session import Session
from mipo_ray.storage.entries import Results
from mipo_ray.storage.results import read_results
from mipo_ray.storage.rounds import Round
from mipo_ray.terminal import say
from mipo_ray.training.stage import train
from mipo_ray.training.trainer import begin_model_check


def run_rounds(plan: Plan) -> Results:
    """Runs every unfinished stage of every round; returns the results (`results.json`), policy by policy."""
    with session_of(plan) as session:
        refuse_what_cannot_run(plan, session)
        for round in session.rounds:
            if plan.overlap.is_on:
                overlap_round(plan, session, round)
                continue
            measure_start(plan, session, round)
            if round not in plan.rounds:  # the guard found the one before it bad, and with it the run ends
                break
            if isinstance(plan.prompts, PairSummary):
                train(session, round)  # on pairs that were taken before anything else
            elif plan.schedule.streams:
                stream_round(session, round, plan.prompts)
            else:
                generate(session, round, plan.prompts)
                train(session, round)
        else:
            measure_round(plan, session, session.rounds[-1])
    return read_results(plan.run)


@contextmanager
def session_of(plan: Plan, stages: Sequence[str] | None = None) -> Iterator[Session]:
    """The session of a checked run, on a cluster that is connected and watched; when the block ends its events are on
    storage and its engines and scorers are gone. stages: those that will be done, by their directories; None: all."""
    with (
        recording(plan.run, plan.config.trackers) as events,
        engines_of_run(plan.config, plan.resources, plan.lifetime.living) as engines,
        scorers_of_run(plan.config, plan.resources, keeps_scorers=plan.lifetime.keeps_scorers) as scorers,
        watched(events, agenda_of(plan, stages)),
    ):
        yield Session(plan.config, plan.run, plan.resources, events, engines, scorers)


def refuse_what_cannot_run(plan: Plan, session: Session) -> None:
    """What only the cluster can tell, before any engine samples: a model that cannot be trained so, a judge that does
    not answer, and prompts, or pairs that exist, that cannot be used. Such pairs are the round's from then on."""
    wait_for_model_check = begin_model_check(plan.config)  # in a process that imports for some seconds
    reach_judge(plan.config.evaluate.judge)
    if isinstance(plan.prompts, PairSummary):
        take_pairs(session, Round(0), plan.prompts)
    else:
        condition_prompts(session, Round(0), plan.prompts)
    wait_for_model_check()


def stream_round(session: Session, round: Round, prompts: PromptSummary) -> None:
    """Generates a round's pairs and, at the same time, trains on those that are written."""
    condition_unfinished(session, round, prompts)
    with work_beside(lambda: generate(session, round, prompts), "generate") as generated:
        train(session, round, generated=generated)


def overlap_round(plan: Plan, session: Session, round: Round) -> None:
    """Measures the policy that a round starts from and, at the same time, generates pairs by the same engines. Training
    begins when that is measured: its workers have the places of scorers, and engines take the next policy after both.
    """
    beside = replace(session, shares_engines=condition_unfinished(session, round, plan.sampled))
    with (
        work_beside(lambda: measure_start(plan, beside, round), "evaluate") as measured,
        work_beside(lambda: generate(session, round, plan.sampled), "generate") as generated,
    ):
        wait_for([measured] if plan.schedule.streams else [measured, generated], beside=[generated])
        train(session, round, generated=generated if plan.schedule.streams else None)


def measure_start(plan: Plan, session: Session, round: Round) -> None:
    """Evaluates the policy that a round starts from and, where that is an earlier round's, says what it reached."""
    measure_round(plan, session, round.before)
    if plan.held_out is not None and not round.before.is_base and round in plan.rounds:  # else the command ends so
        say(closing_text(plan.run, full=False))


def measure_round(plan: Plan, session: Session, round: Round) -> None:
    """Evaluates the policy that stands after a round, where the run measures at all, and lets the guard say whether the
    next may start from it; brings the report up to date."""
    if plan.held_out is not None:
        evaluate(session, round, plan.held_out, plan.tasks)
        guard_round(session, round)
    write_report(plan.config, plan.run)
