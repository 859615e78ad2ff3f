"""What travels through a run as values: the session, and a stage of one of its rounds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from mipo_ray.config import Config
from mipo_ray.errors import UserError
from mipo_ray.monitoring.events import Events
from mipo_ray.ray_cluster.connection import user_error
from mipo_ray.ray_cluster.living import LivingActors
from mipo_ray.ray_cluster.resources import Resources
from mipo_ray.storage.faults import StorageError, full_disk
from mipo_ray.storage.lock import check_locks
from mipo_ray.storage.manifests import AnyFacts, Manifest, Work
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.storage.verdicts import bad_rounds, last_good, rounds_before
from mipo_ray.terminal import say


@dataclass(frozen=True)
class Session:
    """A run under way: what never changes while it runs."""

    config: Config
    run: RunDirectory
    resources: Resources
    events: Events
    living_engines: LivingActors | None = None
    """The policy's engines that outlive a stage; None: every stage starts its own."""
    living_scorers: LivingActors | None = None
    """The scorer that outlives a stage; None: every stage starts its own."""
    shares_engines: bool = False
    """Whether another stage samples from the same policy with the living engines at the same time. That one counts what
    they reserve, and how long they have no work."""

    @property
    def kept_gpus(self) -> float:
        """GPUs that the living engines hold reserved also while nothing samples."""
        return 0.0 if self.living_engines is None else self.living_engines.kept_gpus

    @property
    def rounds(self) -> list[Round]:
        """The rounds of the run, in order; the base is not among them."""
        return [Round(number) for number in range(self.config.rounds)]

    def stage(self, round: Round, name: str) -> Stage:
        """A stage of this run by its name: generate, train, evaluate, tasks, tasks/NAME, judge/PROTOCOL, guard."""
        return Stage(self, round, name)

    def start(self, round: Round) -> Round:
        """The round whose policy this one starts from: the one before it, or the last that the guard found good."""
        return last_good(self.run, round.before)

    def learning_rate(self, round: Round) -> float:
        """That of a round's training at its peak: halved for each bad round before it."""
        bad = bad_rounds(self.run, rounds_before(round))
        return self.config.train.learning_rate * 0.5 ** len(bad)

    def policy(self, round: Round) -> str:
        """The model that stands after a round, as `models.source.local_model_directory` takes it; the base's is the
        initial one."""
        return self.config.model.source if round.is_base else self.run.model_path(f"{round.directory}/train/policy")


@dataclass(frozen=True)
class Stage:
    """One stage of one round: where it lies, who hears of it, and how it is done once and committed."""

    session: Session
    round: Round
    name: str

    @property
    def config(self) -> Config:
        return self.session.config

    @property
    def run(self) -> RunDirectory:
        return self.session.run

    @property
    def directory(self) -> str:
        """Below the run directory."""
        return self.run.stage(self.round, self.name)

    @property
    def events(self) -> Events:
        """Sends events in this stage's name."""
        return self.session.events.at(self.round, self.name)

    def path(self, *parts: str) -> str:
        """Path of something in the stage on the run's filesystem."""
        return self.run.path(self.directory, *parts)

    def read_manifest(self, kind: type[AnyFacts]) -> Manifest[AnyFacts] | None:
        """The manifest where the stage is finished, else None; raises StorageError where it is damaged."""
        return self.run.read_manifest(self.directory, kind)

    def finished_manifest(self, kind: type[AnyFacts]) -> Manifest[AnyFacts]:
        """The manifest of a stage that must be finished by now; raises RuntimeError where it is not."""
        if (manifest := self.read_manifest(kind)) is None:
            raise RuntimeError(f"{self.path()}: expected a finished stage, found no manifest")
        return manifest

    def finished_before(self, kind: type[AnyFacts]) -> Manifest[AnyFacts] | None:
        """The manifest where the stage is finished, and says so; None where its work is to be done."""
        if (manifest := self.read_manifest(kind)) is not None:
            self.say("finished before")
        return manifest

    @contextmanager
    def reported(self, what: str = "") -> Iterator[StageReport]:
        """Says and records that the stage starts (`what` behind it) and, where the block ends well, that it is done.

        Raises StorageError, which names the stage, where a full disk ended it.
        """
        report = StageReport()
        self.say(f"started{what}")
        self.events.emit({"event": "stage_start"})
        try:
            yield report
        except Exception as error:
            # Met anywhere: by Ray Data's writers, by a worker, by Ray's own store of objects.
            if not isinstance(error, UserError) and user_error(error) is None and (found := full_disk(error)):
                raise StorageError(f"{self.path()}: cannot be finished: {found}") from error
            raise
        seconds = report.seconds
        self.events.emit({"event": "stage", "stage_seconds": seconds, "written_bytes": report.written_bytes})
        self.session.events.flush()
        self.say(f"done in {seconds:.0f} s{report.closing}")

    def say(self, what: str) -> None:
        """Prints a line about the stage on the driver."""
        say(f"{self.round.label}  {self.name:<8}  {what}")


@dataclass
class StageReport:
    """What a stage under way will say of itself; `seconds` stand still from its first commit on."""

    started: float = field(default_factory=time.monotonic)
    took: float | None = None
    written_bytes: int = 0
    closing: str = ""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started if self.took is None else self.took

    def commit(self, stage: Stage, facts: AnyFacts, files: Sequence[str] | None = None) -> Manifest[AnyFacts]:
        """Writes the manifest that makes `stage` finished, with its round, the seconds so far and its facts.

        `files` are those that make up the stage; None: all that lie there. Raises StorageError where another process
        has taken the run directory over.
        """
        check_locks()
        self.took = self.seconds
        work = Work(stage.round.index, self.took, facts, files)
        manifest = stage.run.commit(stage.directory, stage.config, work)
        self.written_bytes += sum(manifest.files.values())
        return manifest
