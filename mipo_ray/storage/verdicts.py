"""What the guard found of each round, as it was committed, and by which policy a run therefore stands.

A round that was found bad is not promoted: its policy stays where it is, and no later round starts from it. A round
without a verdict was never compared, and counts as good.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from mipo_ray.config.schema import Config
from mipo_ray.storage.manifests import GuardFacts
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory

GUARD = "guard"  # the stage below a round

OfPolicy = TypeVar("OfPolicy")


def verdicts(run: RunDirectory, rounds: Iterable[Round]) -> dict[Round, GuardFacts]:
    """The verdicts on those of the rounds that were compared, in their order."""
    found = {round: run.read_manifest(run.stage(round, GUARD), GuardFacts) for round in rounds if not round.is_base}
    return {round: manifest.facts for round, manifest in found.items() if manifest is not None}


def bad_rounds(run: RunDirectory, rounds: Iterable[Round]) -> list[Round]:
    """Those of the rounds that were found bad, in their order."""
    return [round for round, verdict in verdicts(run, rounds).items() if verdict.is_bad]


def rounds_before(round: Round) -> list[Round]:
    """The rounds before this one, from round 0."""
    return [Round(number) for number in range(round.number)]


def awaits_verdict(config: Config, run: RunDirectory, round: Round) -> bool:
    """Whether the guard has still to compare a measured round. It does not where the next one has begun: there was no
    guard then."""
    if config.guard.when_bad is None or verdicts(run, [round]):
        return False
    return not run.list_files(round.after.directory)


def last_good(run: RunDirectory, round: Round) -> Round:
    """The newest of this round and those before it that was not found bad; BASE where all were."""
    while bad_rounds(run, [round]):
        round = round.before
    return round


def planned_rounds(config: Config, run: RunDirectory) -> list[Round]:
    """The rounds that a run does, in order: as many as it is told to or, where the guard stops it, up to the first bad
    one."""
    rounds = [Round(number) for number in range(config.rounds)]
    if config.guard.when_bad == "stop" and (bad := bad_rounds(run, rounds)):
        rounds = rounds[: bad[0].number + 1]
    return rounds


def good_ones(run: RunDirectory, by_policy: Mapping[str, OfPolicy]) -> dict[str, OfPolicy]:
    """What is known of policies by their keys, without those of bad rounds."""
    rounds = {key: Round(int(key)) for key in by_policy if key != BASE.key}
    bad = set(bad_rounds(run, rounds.values()))
    return {key: each for key, each in by_policy.items() if rounds.get(key, BASE) not in bad}
