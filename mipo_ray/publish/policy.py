"""Which policy of a run is published, and what the run knows of it."""

from __future__ import annotations

from dataclasses import dataclass

from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.pairs.export import run_config
from mipo_ray.storage.manifests import GenerateFacts, TrainFacts
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.storage.verdicts import bad_rounds

_POLICY = "policy"  # below a train stage


@dataclass(frozen=True)
class Policy:
    """A finished round's policy. trained: the rounds that it came through, its own the last; generated: every round up
    to it whose pairs are known; files: those that its stage's manifest lists, below `directory`."""

    run: RunDirectory
    config: Config
    round: Round
    trained: dict[Round, TrainFacts]
    generated: dict[Round, GenerateFacts]
    files: tuple[str, ...] = ()

    @property
    def directory(self) -> str:
        """Below the run directory."""
        return f"{self.run.stage(self.round, 'train')}/{_POLICY}"


def find_policy(run: RunDirectory, number: int | None = None) -> Policy:
    """The newest finished policy of a run that the guard did not find bad, or that of round `number`; raises UserError
    where it is not there."""
    config = run_config(run)
    rounds = [Round(index) for index in range(config.rounds)]
    manifests = {round: run.read_manifest(run.stage(round, "train"), TrainFacts) for round in rounds}
    trained = {round: manifest.facts for round, manifest in manifests.items() if manifest is not None}
    bad = bad_rounds(run, trained)
    good = [each for each in trained if each not in bad]
    if not good if number is None else Round(number) not in trained:
        wanted = "a round that is trained" if number is None else f"round {number} to be trained"
        there = ", ".join(f"{each.key}{' (found bad: name it)' * (each in bad)}" for each in trained) or "none"
        raise UserError(f"{run.url}: expected {wanted}, found these: {there}")
    round = max(good) if number is None else Round(number)
    sampled = {each: run.read_manifest(run.stage(each, "generate"), GenerateFacts) for each in rounds if each <= round}
    manifest = manifests[round]
    assert manifest is not None
    return Policy(
        run,
        config,
        round,
        {each: facts for each, facts in trained.items() if each == round or (each < round and each in good)},
        {each: found.facts for each, found in sampled.items() if found is not None},
        tuple(name.removeprefix(f"{_POLICY}/") for name in manifest.files if name.startswith(f"{_POLICY}/")),
    )
