"""What a run cost: seconds, tokens and devices of each stage, for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ShownStage:
    """A finished stage of a run, as the report tells of it."""

    round: int | str
    """The number of the round; "base" for the measurement before the first one."""
    stage: str
    """Its name: generate, train, evaluate, tasks, judge/PROTOCOL."""
    seconds: float
    gpus: float | None = None
    """How many it reserved at most; None where nobody noted it."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """What it counted, by name. The picture of a round shows prompts and generated_tokens (generate), steps, tokens,
    first_loss and last_loss (train), and responses (evaluate)."""
    idle_gpu_seconds: float = 0.0
    """GPU seconds in which what was reserved had no work (`monitoring.idle`)."""
    is_streamed: bool = False
    """A train stage that ran beside its generate stage."""


@dataclass(frozen=True)
class StageCost:
    """One stage as it is shown; figures that a stage does not have are empty."""

    round: str
    stage: str
    seconds: float
    duration: str
    percent: float  # of the longest stage
    generated_tokens: str
    trained_tokens: str
    tokens_per_second: str
    gpus: str
    counts: str  # what else it counted


@dataclass(frozen=True)
class Cost:
    """All stages, and a sentence with their sums."""

    stages: list[StageCost]
    total: str
    any_gpus: bool
    splits: list[str]
    """Of each streamed round on GPUs: how busy both sides were, and by which split they would be equally busy."""


def run_cost(stages: Sequence[ShownStage]) -> Cost | None:
    """What the stages cost; None where nothing is finished.

    Tokens per second are a stage's generated (or, in training, trained) tokens over its whole duration, the start of
    engines and the loading of models included. GPUs are what the stage may reserve at most.
    """
    if not stages:
        return None
    longest = max(stage.seconds for stage in stages) or 1.0
    costs, sums = [], {"generated_tokens": 0.0, "tokens": 0.0}
    for stage in stages:
        counts, seconds = stage.counts, stage.seconds
        generated, trained = counts.get("generated_tokens"), counts.get("tokens")
        sums["generated_tokens"] += generated or 0
        sums["tokens"] += trained or 0
        tokens = trained if generated is None else generated
        costs.append(
            StageCost(
                round=str(stage.round),
                stage=stage.stage,
                seconds=seconds,
                duration=duration(seconds),
                percent=100 * seconds / longest,
                generated_tokens="" if generated is None else f"{generated:,}",
                trained_tokens="" if trained is None else f"{trained:,}",
                tokens_per_second="" if tokens is None or not seconds else f"{tokens / seconds:,.1f}",
                gpus=f"{stage.gpus:g}" if stage.gpus else "",
                counts=", ".join(
                    f"{name} {count:,}"
                    for name, count in counts.items()
                    if isinstance(count, int) and name not in ("generated_tokens", "tokens")
                ),
            )
        )
    total = f"All finished stages together: {duration(sum(stage.seconds for stage in stages))}"
    total += f", {sums['generated_tokens']:,.0f} tokens generated" if sums["generated_tokens"] else ""
    total += f", {sums['tokens']:,.0f} tokens trained on" if sums["tokens"] else ""
    gpu_seconds = sum(stage.seconds * (stage.gpus or 0) for stage in stages)
    total += f", at most {duration(gpu_seconds)} of GPU time reserved" if gpu_seconds else ", no GPU"
    return Cost(costs, f"{total}.", any(cost.gpus for cost in costs), _splits(stages))


def _splits(stages: Sequence[ShownStage]) -> list[str]:
    generated = {stage.round: stage for stage in stages if stage.stage == "generate"}
    sentences = []
    for trained in stages:
        engines = generated.get(trained.round)
        if not trained.is_streamed or engines is None or not engines.gpus or not trained.gpus:
            continue
        busy, busy_training = _busy_gpu_seconds(engines), _busy_gpu_seconds(trained)
        gpus = engines.gpus + trained.gpus
        better = round(gpus * busy / (busy + busy_training)) if busy + busy_training else engines.gpus
        sentences.append(
            f"Round {trained.round} streamed on {engines.gpus:g} GPUs of engines and {trained.gpus:g} of workers. They "
            f"had no work for {duration(engines.idle_gpu_seconds)} and {duration(trained.idle_gpu_seconds)} of GPU "
            f"time; by what each side did, {better:g} and {gpus - better:g} would be equally busy."
        )
    return sentences


def _busy_gpu_seconds(stage: ShownStage) -> float:
    """Of its newest attempt; idle time is that of all attempts."""
    return max(0.0, (stage.gpus or 0.0) * stage.seconds - stage.idle_gpu_seconds)


def duration(seconds: float) -> str:
    """Seconds as "0 min 48 s", "12 min 05 s" or "3 h 07 min"."""
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
