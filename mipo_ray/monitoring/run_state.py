"""What a run is doing and how long it will take, as its events tell. Pure: no Ray, no clock of its own.

Times are seconds since the epoch, as the events have them. Nothing here is a guess: a time that is left comes from what
this run, or an earlier one like it, has taken, and is None where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mipo_ray.storage.rounds import BASE, Round

Event = Mapping[str, Any]
# A stage of a round: the round's index (None: the base) and the stage's name.
StageKey = tuple[int | None, str]

# The only phase after which its stage has another one with much to do.
_NOT_THE_LAST = "answer"
_TRAINING = ("loss", "reward_margin", "reward_accuracy", "tokens_per_second", "memory_bytes")


@dataclass(frozen=True)
class Agenda:
    """What a run is to do: its stages in order, those that are finished, and what stages took that were measured before
    it began, in seconds by name."""

    stages: tuple[StageKey, ...] = ()
    finished: frozenset[StageKey] = frozenset()
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Phase:
    """A phase of a stage: `done` of `total` (None: not known yet) of `unit`."""

    name: str
    unit: str
    started: float
    total: int | None = None
    actors: int = 0
    """Engines, scorers or workers that said they are ready."""
    began: float | None = None
    """When the first of them was: what comes before is no part of the speed."""
    changed: float = 0.0
    """When it was last told that something is done."""
    in_blocks: int = 0
    in_rows: int = 0
    answers: int = 0
    tokens: int = 0
    pairs: int = 0
    kept: int = 0
    numbers: dict[str, float] = field(default_factory=dict)
    """Of the newest training step: those of _TRAINING that it has."""

    @property
    def done(self) -> int:
        """Rows are counted one by one, and once more with their block, which may come from an earlier attempt."""
        done = max(self.in_blocks, self.in_rows)
        return done if self.total is None else min(done, self.total)

    @property
    def waits_for(self) -> str:
        """What it waits for, "" once something is done."""
        if self.done:
            return ""
        if self.unit == "steps":
            return "the first step" if self.actors else "training workers to start"
        what = {
            "rows": ("engines to start", "the first answers"),
            "responses": ("scorers to start", "the first scores"),
        }
        return what[self.unit][min(self.actors, 1)]

    @property
    def waits_since(self) -> float:
        """Since when it waits for that."""
        return self.started if self.began is None else self.began

    @property
    def tokens_per_second(self) -> float | None:
        """The speed since the first engine was ready, or that of the newest training step; None: nothing is done."""
        if "tokens_per_second" in self.numbers:
            return self.numbers["tokens_per_second"]
        seconds = self.changed - self.waits_since
        return self.tokens / seconds if self.tokens and seconds > 0 else None

    def seconds_left(self, now: float) -> float | None:
        """By its own speed so far; None where it is not known how much there is, or no block was finished: many rows
        are answered at the same time, and what the first of them took says nothing of the others."""
        seconds = self.changed - self.waits_since
        if self.total is None or not self.in_blocks or seconds <= 0:
            return None
        each = seconds / self.done
        return max(0.0, each * (self.total - self.done) - (now - self.changed))

    def take(self, event: Event) -> None:
        """Takes note of an event of the phase's stage."""
        kind, time = event["event"], float(event["time"])
        if kind == "ready":
            self.began = time if self.began is None else self.began
            self.actors += 1
        elif kind == "engine_death":
            self.in_rows = self.in_blocks  # what it had in hand is answered again
        elif kind == "answered":
            self.changed, self.in_rows = time, self.in_rows + event["rows"]
            self.answers += event["answers"]
            self.tokens += event["tokens"]
        elif kind == "generated":
            before, self.in_blocks = self.done, self.in_blocks + event["rows"]
            self.changed = time if self.done > before else self.changed
        elif kind == "scored":
            self.changed, self.in_blocks = time, self.in_blocks + event["scored_responses"]
        elif kind == "assembled":
            self.pairs += event["pairs"]
            self.kept += event["kept"]
        elif kind == "train_step":
            if not self.done:  # a speed is that of the steps alone
                self.began = time - event["step_seconds"]
            self.changed, self.total = time, int(event["total_steps"])
            self.in_blocks = int(event["step"]) + 1
            self.numbers = {name: float(event[name]) for name in _TRAINING if name in event}


@dataclass
class StageState:
    """A stage under way, and the phase that it is in; `since`: when it began, or its last phase ended."""

    key: StageKey
    since: float
    phase: Phase | None = None

    @property
    def label(self) -> str:
        """As a line about it begins: the round, and the phase or the stage."""
        return f"{round_of(self.key).label}  {self.phase.name if self.phase else self.key[1]:<8}"


class RunState:
    """A run under way, event by event; `began`: when it was first looked at."""

    def __init__(self, agenda: Agenda, began: float) -> None:
        self.agenda = agenda
        self.began = began
        self.under_way: dict[StageKey, StageState] = {}
        self.took: dict[StageKey, float] = {}
        """Seconds of each stage that ended since, from the end of the one before it, so that they add up."""
        self._boundary = began
        self._warnings: list[str] = []

    def take(self, event: Event) -> None:
        """Takes note of an event, told or emitted, in their order."""
        kind, key = event["event"], (event.get("round"), str(event.get("stage")))
        if kind in ("warning", "weight_swap_failure", "engine_death", "quarantined"):
            self._warnings.append(_warning(event))
        if kind == "stage":
            self.under_way.pop(key, None)
            self.took[key] = float(event["time"]) - self._boundary
            self._boundary = float(event["time"])
        elif kind in ("stage_start", "phase_start"):
            state = self.under_way.setdefault(key, StageState(key, float(event["time"])))
            if kind == "phase_start":
                state.phase = Phase(event["phase"], event["unit"], float(event["time"]), event.get("total"))
        elif (found := self.under_way.get(key)) is not None and found.phase is not None:
            if kind == "phase_end":
                found.phase, found.since = None, float(event["time"])
            else:
                found.phase.take(event)

    def take_warnings(self) -> list[str]:
        """What is to be said at once, since the last call."""
        warnings, self._warnings = self._warnings, []
        return warnings

    @property
    def round_index(self) -> int | None:
        """The round that is shown: the newest under way. A policy may be evaluated while the next round samples."""
        return max((key[0] for key in self.under_way), key=lambda index: -1 if index is None else index, default=None)

    def of_round(self) -> list[tuple[str, float | None, bool]]:
        """The stages of the round that is under way: name, seconds it took (None: not in this process), whether it is
        done."""
        keys = [key for key in self.agenda.stages if self.under_way and key[0] == self.round_index]
        return [(key[1], self.took.get(key), key in self.took or key in self.agenda.finished) for key in keys]

    def seconds_left(self, now: float) -> float | None:
        """Of the whole run; None where a stage that is left was never measured."""
        todo = [key for key in self.agenda.stages if key not in self.took and key not in self.agenda.finished]
        at_once = [key for key in todo if key in self.under_way] or todo[:1]
        left = self._left_at_once(at_once, now)
        for key in todo:
            if key not in at_once:
                known = self._known_seconds(key[1])
                left = None if left is None or known is None else left + known
        return left if todo else None

    def _left_at_once(self, keys: Sequence[StageKey], now: float) -> float | None:
        """Of the stages under way. What such stages took adds up where they went on at once, as their times do here."""
        known = [self._known_seconds(key[1]) for key in keys]
        by_phase = [self._left_by_phase(key, now) for key in keys]
        if any(one is None and other is None for one, other in zip(known, by_phase, strict=True)):
            return None
        of_known = sum(seconds or 0.0 for seconds in known) - (now - self._boundary)
        of_phases = [seconds for seconds in by_phase if seconds is not None]
        if of_known <= 0 and not of_phases:  # slower than they were then
            return None
        return max(0.0, of_known, *of_phases)

    def _left_by_phase(self, key: StageKey, now: float) -> float | None:
        state = self.under_way.get(key)
        if state is None or state.phase is None or state.phase.name == _NOT_THE_LAST:
            return None
        return state.phase.seconds_left(now)

    def _known_seconds(self, stage: str) -> float | None:
        """What such a stage took: the newest of this run, else as it was measured before; a round's before the base's,
        for which there is less to score and no policy to load."""
        own = [key for key in self.took if key[1] == stage]
        rounds = [key for key in own if key[0] is not None]
        for keys in (rounds, own):
            if keys:
                return self.took[keys[-1]]
        return self.agenda.seconds.get(stage)


def round_of(key: StageKey) -> Round:
    """The round of a stage."""
    return BASE if key[0] is None else Round(key[0])


def _warning(event: Event) -> str:
    if event["event"] == "warning":
        return str(event["text"])
    if event["event"] == "quarantined":
        return f"warning: engines died of prompt {event['prompt_id']!r} alone, and it is set aside: {event['reason']}"
    name, error = event.get("engine", ""), str(event.get("error", ""))
    if event["event"] == "engine_death":
        return f"warning: engine {name} died and is started anew: {error}"
    return f"warning: engine {name} did not take the policy's weights and is started anew: {error}"
