"""The guard's stage: the verdict on a round, found once and committed."""

from __future__ import annotations

from collections.abc import Sequence

from mipo_ray.evaluation.figures import causes
from mipo_ray.evaluation.guard import Figures, check_measured, figures_of, verdict
from mipo_ray.session import Session, StageReport
from mipo_ray.storage.manifests import GuardFacts
from mipo_ray.storage.results import read_evaluation, read_results
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.storage.verdicts import GUARD, awaits_verdict, bad_rounds, rounds_before, verdicts


def guard_round(session: Session, round: Round) -> None:
    """Compares a measured round with the guard's bounds and commits the verdict, which nothing changes later; says it
    where there is one. Of the base it only checks that it has the measures that are bounded (UserError)."""
    config, run, stage = session.config, session.run, session.stage(round, GUARD)
    if round.is_base:
        if config.guard.when_bad is not None:
            check_measured(_figures(run, [BASE])[BASE.key], config.guard.bounds)
        return
    if awaits_verdict(config, run, round):
        found = StageReport().commit(stage, _verdict(session, round)).facts
        stage.events.emit({"event": "guard", "broken_bounds": len(found.broken), "text": causes(found)})
        session.events.flush()
    for found in verdicts(run, [round]).values():
        stage.say(f"bad, not promoted: {causes(found)}" if found.is_bad else f"good: keeps all {found.compared} bounds")


def _verdict(session: Session, round: Round) -> GuardFacts:
    before = rounds_before(round)
    bad = bad_rounds(session.run, before)
    good = [BASE, *(each for each in before if each not in bad)]
    figures = _figures(session.run, [*good, round])
    policy = figures.pop(round.key)
    return verdict(policy, figures, session.config.guard.bounds)


def _figures(run: RunDirectory, rounds: Sequence[Round]) -> dict[str, Figures]:
    """What was measured of policies, by their keys."""
    results, evaluation = read_results(run), read_evaluation(run)
    return {round.key: figures_of(results[round.key], evaluation.get(round.key, {})) for round in rounds}
