"""What earlier rounds took, from the metrics.jsonl of run directories: the plan's speeds are then measured ones.

A round counts where its run is like the planned one in what decides tokens and speed (`_ALIKE`). Of a stage that was
interrupted, its last attempt counts: the seconds and the tokens between its start and its commit belong together.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mipo_ray.config.recipe import load_run_config
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError, brief
from mipo_ray.monitoring.event_lines import parse_events
from mipo_ray.storage.run_directory import RunDirectory, StorageError, open_run

Event = dict[str, Any]

# What must be the same, so that its tokens and speeds are those of the plan.
_ALIKE = (
    *("pairs.path", "preference.chooser", "preference.samples"),
    *("model.path", "model.revision", "model.dtype", "conditioning.strategy", "conditioning.mixture"),
    *(f"generation.{name}" for name in ("samples_per_prompt", "negatives_per_prompt", "pairing", "score_pmi")),
    *("generation.sampling.max_tokens", "generation.pool.tensor_parallel_size"),
    *(f"train.{name}" for name in ("objective", "layout", "reference_mode", "lora.rank", "zero_stage")),
    *(f"train.{name}" for name in ("gradient_checkpointing", "torch_compile", "offload_optimizer")),
)


@dataclass(frozen=True)
class Measured:
    """Finished rounds of earlier runs, summed. Device seconds are those of GPUs where they had any, else of engines and
    workers: from a stage's start to its commit, so that starts, waiting and exports are in them."""

    rounds: int = 0
    on_gpu: bool = False
    rows: float = 0.0
    """Pair rows before filters."""
    kept: float = 0.0
    generated_tokens: float = 0.0
    generate_seconds: float = 0.0
    trained_tokens: float = 0.0
    """Through the policy, in one epoch: as `estimates.RoundWork` counts them, with padding."""
    train_seconds: float = 0.0
    """Of one epoch."""

    def __add__(self, other: Measured) -> Measured:
        sums = {name: value + getattr(other, name) for name, value in vars(self).items() if name != "on_gpu"}
        return Measured(**sums, on_gpu=other.on_gpu)

    def tokens(self, rows: int, epochs: int) -> tuple[float, float]:
        """Generated and trained tokens of a round of so many pair rows, by what rows made then."""
        return rows * self.generated_tokens / self.rows, epochs * rows * self.trained_tokens / self.rows

    def seconds(self, rows: int, epochs: int) -> tuple[float, float]:
        """Device seconds to generate and to train such a round."""
        return rows * self.generate_seconds / self.rows, epochs * rows * self.train_seconds / self.rows


@dataclass(frozen=True)
class EarlierRuns:
    """The rounds of earlier runs, each with its run directory, and which named runs were left out and why."""

    rounds: tuple[tuple[str, Measured], ...] = ()
    left_out: tuple[str, ...] = ()

    def measured(self, *, on_gpu: bool) -> Measured | None:
        """The sum of the rounds on that kind of device; None where there are none."""
        found = [one for _, one in self.rounds if one.on_gpu == on_gpu]
        return functools.reduce(Measured.__add__, found) if found else None

    def places(self, *, on_gpu: bool) -> tuple[str, ...]:
        """The run directories with rounds on that kind of device."""
        return tuple(dict.fromkeys(place for place, one in self.rounds if one.on_gpu == on_gpu))

    def not_used(self, *, on_gpu: bool) -> list[str]:
        """Each run that does not count on that kind of device, with the reason."""
        devices = "CPUs there, GPUs here" if on_gpu else "GPUs there, CPUs here"
        others = set(self.places(on_gpu=not on_gpu)) - set(self.places(on_gpu=on_gpu))
        return [*self.left_out, *(f"{place}: {devices}" for place in sorted(others))]


def read_earlier_runs(config: Config, run: RunDirectory) -> EarlierRuns:
    """The finished rounds in the run directory itself and in `cost.earlier_runs`.

    Raises StorageError for a directory there that is none of a run.
    """
    found: list[tuple[str, Measured]] = []
    left_out = []
    named = [open_run(url) for url in config.cost.earlier_runs]
    for place in dict.fromkeys([run, *named]):
        text = place.read_text("config.yaml")
        if text is None and place in named:
            raise StorageError(f"cost.earlier_runs: {place.url}: expected a run directory, found no config.yaml there")
        rounds, reason = ([], "") if text is None else _rounds_of(config, place, text)
        found += [(place.url, one) for one in rounds]
        left_out += [f"{place.url}: {reason}"] if reason and place in named else []
    return EarlierRuns(tuple(found), tuple(left_out))


def _rounds_of(config: Config, place: RunDirectory, text: str) -> tuple[list[Measured], str]:
    """The measured rounds of a run, or why none counts."""
    try:
        # It is compared and never run, so that nothing in it needs the user's word.
        there = load_run_config(text, place.path("config.yaml"), trusts_recipe=True)
    except UserError as error:
        return [], f"its config.yaml is not one of this version: {error}"
    for path in _ALIKE:
        before, now = _value(there, path), _value(config, path)
        if before != now:
            return [], f"{path} is {brief(before)} there, {brief(now)} here"
    try:
        rounds = measured_rounds(there, parse_events(place.read_text("metrics.jsonl") or ""))
    except (KeyError, TypeError, AttributeError) as error:
        return [], f"its metrics.jsonl is not one of this version: {type(error).__name__}: {error}"
    return rounds, "" if rounds else "no finished round in its metrics.jsonl"


def measured_rounds(config: Config, events: Sequence[Event]) -> list[Measured]:
    """Each round of a run whose generate and train stages are finished."""
    found = []
    for number in sorted({event["round"] for event in events if isinstance(event.get("round"), int)}):
        generate, train = (_last_attempt(events, number, stage) for stage in ("generate", "train"))
        pairs = [event for event in generate if event["event"] == "pairs"]
        if not pairs or not train or not pairs[-1]["rows"]:
            continue
        sampled = [event for event in generate if event["event"] == "generated"]
        steps = [event for event in train if event["event"] == "train_step"]
        on_gpu = any("idle_gpu_seconds" in event for event in (*sampled, *steps))
        engines = len({event["engine"] for event in sampled})
        tokens = _sum(sampled, "generated_tokens")
        if not tokens or not steps:
            continue  # resumed with little left to do: nothing that can be divided by
        epochs, workers = config.train.epochs, config.train.num_workers * _gpus_per_worker(config, on_gpu=on_gpu)
        share = _sum(steps, "pairs") / (epochs * pairs[-1]["kept"]) if pairs[-1]["kept"] else 0.0
        if not 0.99 < share < 1.01 or not 0.99 < tokens / pairs[-1]["generated_tokens"] < 1.01:
            continue  # a part of the round was done in an earlier attempt
        found.append(
            Measured(
                rounds=1,
                on_gpu=on_gpu,
                rows=pairs[-1]["rows"],
                kept=pairs[-1]["kept"],
                generated_tokens=tokens,
                generate_seconds=_seconds(generate) * engines * _gpus_per_engine(config, on_gpu=on_gpu),
                trained_tokens=_sum(steps, "forward_tokens") / epochs,
                train_seconds=_seconds(train) * workers / epochs,
            )
        )
    return found


def _last_attempt(events: Sequence[Event], number: int, stage: str) -> list[Event]:
    """The events of a stage from its last start to its commit; none where it is not committed."""
    own = [event for event in events if event.get("round") == number and event.get("stage") == stage]
    kinds = [event["event"] for event in own]
    if "stage" not in kinds or "stage_start" not in kinds:
        return []
    end = len(kinds) - kinds[::-1].index("stage")
    start = max(index for index, kind in enumerate(kinds[:end]) if kind == "stage_start")
    return own[start:end]


def _seconds(attempt: Sequence[Event]) -> float:
    return float(attempt[-1]["stage_seconds"])


def _sum(events: Iterable[Event], key: str) -> float:
    return float(sum(event[key] for event in events))


def _gpus_per_engine(config: Config, *, on_gpu: bool) -> float:
    pool = config.generation.pool
    if not on_gpu:
        return 1.0
    return float(pool.tensor_parallel_size if pool.gpus_per_engine is None else pool.gpus_per_engine)


def _gpus_per_worker(config: Config, *, on_gpu: bool) -> float:
    return 1.0 if not on_gpu or config.train.gpus_per_worker is None else config.train.gpus_per_worker


def _value(config: Config, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), config)
