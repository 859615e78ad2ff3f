"""Engine deaths of a generate stage: which rows were with each engine that died, and which rows are set aside.

One actor on the driver's node keeps the record, for it outlives engines and the actors that ask them. Two files in the
stage hold what a resumed run needs, each a JSON object a line: `deaths.jsonl`, groups of rows that were with an engine
as it died, and `quarantine.jsonl`, rows that are set aside because engines died of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray

from mipo_ray.errors import UserError, cut
from mipo_ray.monitoring.event_lines import parse_events
from mipo_ray.monitoring.events import Events
from mipo_ray.session import Stage
from mipo_ray.storage.run_directory import RunDirectory

DEATHS = "deaths.jsonl"
QUARANTINE = "quarantine.jsonl"
QUARANTINED = "quarantined"  # why a row gives no pair that is set aside

# Deaths of one actor's engines with not a row answered between them, after which it is not the rows that they die of. A
# search among a thousand takes 12 where the first row is deadly, and 2 or 3 more for each of its neighbours that is.
MOST_DEATHS_IN_A_ROW = 30
MOST_CHARACTERS = 1000  # of an error
SILENT_DEATH = (
    "its process ended without a word: it was killed (as where a node runs out of memory), or its node is gone"
)


class QuarantineError(UserError):
    """Engines die of more rows than `generation.max_quarantined_share` lets go, or whatever they are asked."""


@dataclass(frozen=True)
class Group:
    """Rows that are asked together, of one block; `step`: what of them, "sample" or "score"."""

    step: str
    rows: int
    first: str
    """The prompt_id of the first of them."""
    key: str
    """Of the step and every prompt_id, 16 hex digits."""


def group_of(step: str, prompt_ids: Sequence[str]) -> Group:
    """The group of these rows, at least one, by their prompt_ids in order."""
    key = hashlib.sha256(json.dumps([step, *prompt_ids]).encode()).hexdigest()[:16]
    return Group(step, len(prompt_ids), prompt_ids[0], key)


class DeathRecord:
    """The record itself: what is with which client's engine, and how often groups were when it died. A client is the
    actor that asks an engine, by its id, which it keeps when Ray starts it again.

    allowed: how many rows may be set aside.
    """

    def __init__(self, run: RunDirectory, directory: str, allowed: int, events: Events):
        self._run, self._directory, self._allowed, self._events = run, directory, allowed, events
        self._deaths = self._read(DEATHS)
        self._quarantine = self._read(QUARANTINE)
        self._with_engine: defaultdict[str, dict[str, Group]] = defaultdict(dict)
        self._alive: set[str] = set()
        self._in_a_row: Counter[str] = Counter()

    def start(self, client: str) -> int:
        """A client begins, with an engine. Returns how many of its engines died in a row, nothing answered between.

        One that had begun before and told of no death was ended itself, with the engine.
        """
        self.die(client, SILENT_DEATH)
        self._alive.add(client)
        return self._in_a_row[client]

    def ask(self, client: str, group: Group) -> None:
        """A group goes to the client's engine."""
        self._with_engine[client][group.key] = group

    def answer(self, client: str, group: Group) -> None:
        """A group is answered."""
        self._with_engine[client].pop(group.key, None)
        self._in_a_row[client] = 0

    def die(self, client: str, error: str) -> None:
        """The client's engine died, and all that was with it is noted; only the first word about a death counts."""
        if client not in self._alive:
            return
        self._alive.discard(client)
        self._in_a_row[client] += 1
        groups = self._with_engine.pop(client, {})
        for group in groups.values():
            alone = len(groups) == 1
            death = {**vars(group), "alone": alone, "error": cut(" ".join(error.split()), MOST_CHARACTERS)}
            self._deaths.append({"time": _now(), **death})
        if groups:
            self._write(DEATHS, self._deaths)

    def deaths(self, key: str, *, alone: bool) -> int:
        """How many engines died that had a group; `alone`: and nothing else."""
        return sum(death["key"] == key and (death["alone"] or not alone) for death in self._deaths)

    def set_aside(self, group: Group) -> str:
        """Sets a single row aside. Returns why the run has to stop, "" where it goes on."""
        if group.first not in {row["prompt_id"] for row in self._quarantine}:
            reason = [death["error"] for death in self._deaths if death["key"] == group.key][-1]
            row = {"prompt_id": group.first, "step": group.step, "reason": reason}
            self._quarantine.append({"time": _now(), **row})
            self._write(QUARANTINE, self._quarantine)
            self._events.emit({"event": "quarantined", "quarantined_prompts": 1, **row})
        if len(self._quarantine) <= self._allowed:
            return ""
        return (
            f"{self._run.path(self._directory, QUARANTINE)}: rows of which engines died, each alone: "
            f"{len(self._quarantine)}, the newest {group.first!r}; expected at most {self._allowed} "
            "(generation.max_quarantined_share). The file has the errors. Where it is not the rows' fault, "
            f"mend the cause, remove this file and {DEATHS} beside it, and start the run again"
        )

    def _read(self, name: str) -> list[dict[str, Any]]:
        return parse_events(self._run.read_text(f"{self._directory}/{name}") or "")

    def _write(self, name: str, lines: list[dict[str, Any]]) -> None:
        # As a whole: an object store cannot append, and a kill must not leave half a line.
        self._run.write_text(f"{self._directory}/{name}", "".join(json.dumps(line) + "\n" for line in lines))


@dataclass(frozen=True)
class Deaths:
    """The record of a stage for those who ask engines, and for engines; travels to actors. `client`: whose it is."""

    record: Any
    client: str = ""

    def of(self, client: str) -> Deaths:
        """For a client that begins; see `DeathRecord.start`. Raises QuarantineError after MOST_DEATHS_IN_A_ROW."""
        in_a_row = ray.get(self.record.start.remote(client))
        if in_a_row >= MOST_DEATHS_IN_A_ROW:
            raise QuarantineError(
                f"{in_a_row} vLLM engines died one after the other with no row answered between: they die whatever "
                f"they are asked; {DEATHS} in the stage and metrics.jsonl (engine_death) hold the errors"
            )
        return replace(self, client=client)

    def die(self, error: Exception) -> None:
        """Says that the client's engine died; returns when it is noted. For a process that is about to end."""
        with contextlib.suppress(ray.exceptions.RayError):  # the stage has ended, and nobody keeps its record
            ray.get(self.record.die.remote(self.client, f"{type(error).__name__}: {error}"))

    async def had(self, group: Group) -> bool:
        """Whether an engine that died had this group."""
        return bool(await self.record.deaths.remote(group.key, alone=False))

    async def alone(self, group: Group) -> int:
        """How many engines died that had this group and nothing else."""
        count: int = await self.record.deaths.remote(group.key, alone=True)
        return count

    async def ask(self, group: Group) -> None:
        """Notes a group before an engine has it."""
        await self.record.ask.remote(self.client, group)

    async def answer(self, group: Group) -> None:
        """Notes that the engine has answered a group."""
        await self.record.answer.remote(self.client, group)

    async def set_aside(self, group: Group) -> None:
        """Sets a single row aside; raises QuarantineError past `generation.max_quarantined_share`."""
        if why := await self.record.set_aside.remote(group):
            raise QuarantineError(why)


@contextmanager
def deaths_of(stage: Stage, rows: int) -> Iterator[Deaths]:
    """The record of a generate stage of so many rows, with what an earlier call noted, until the block ends."""
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    allowed = math.ceil(stage.config.generation.max_quarantined_share * rows)
    actor = ray.remote(DeathRecord).options(num_cpus=0, scheduling_strategy=here)
    record: Any = actor.remote(stage.run, stage.directory, allowed, stage.events)
    try:
        yield Deaths(record)
    finally:
        ray.kill(record)


def quarantined(stage: Stage) -> int:
    """How many rows of a generate stage are set aside."""
    return len(parse_events(stage.run.read_text(f"{stage.directory}/{QUARANTINE}") or ""))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
