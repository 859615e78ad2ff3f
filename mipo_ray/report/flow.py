"""The report's picture of a round: how many prompts, rows, pairs, steps and answers stand behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mipo_ray.conditioning.blocks import BY_REWARD
from mipo_ray.pairs.schema import GIVEN
from mipo_ray.report.charts import Part
from mipo_ray.report.cost import ShownStage
from mipo_ray.storage.pair_statistics import PairStatistics


@dataclass(frozen=True)
class Step:
    """One station of the flow: a count, what is counted, and what else there is to say."""

    count: str
    label: str
    details: list[str]


@dataclass(frozen=True)
class Flow:
    """One round; `parts` are its rows by what became of them."""

    round: int
    steps: list[Step]
    parts: list[Part]


def flows(stages: Sequence[ShownStage], statistics: Mapping[int, PairStatistics]) -> list[Flow]:
    """One flow for each round that has generated pairs, from what its finished stages counted.

    `statistics`: by the number of the round. What a stage did not count is left out.
    """
    counts = {(stage.round, stage.stage): stage.counts for stage in stages}
    return [_flow(number, of_round, counts) for number, of_round in statistics.items()]


def _flow(number: int, of_round: PairStatistics, counts: Mapping[tuple[int | str, str], Mapping[str, float]]) -> Flow:
    rows, kept = of_round.rows, of_round.kept
    generate, train, evaluate = (counts.get((number, stage), {}) for stage in ("generate", "train", "evaluate"))
    dropped = sorted(of_round.dropped.items(), key=lambda item: (-item[1], item[0]))
    strategies = [f"{name}: {entry.rows:,}" for name, entry in of_round.by_strategy.items()]
    steps = []
    if "prompts" in generate:
        steps.append(Step(f"{generate['prompts']:,}", "prompts", []))
    if set(of_round.by_strategy) == {GIVEN}:
        steps.append(Step(f"{rows:,}", "pairs that exist", []))
    elif set(of_round.by_strategy) != {BY_REWARD}:  # each prompt is one row, and nothing in it is mismatched
        steps.append(Step(f"{rows:,}", "conditioned rows", strategies))
    if set(of_round.by_strategy) != {GIVEN}:
        steps.append(
            Step(f"{of_round.generated_tokens:,}", "tokens sampled", ["for chosen and rejected answers"])
            if of_round.generated_tokens is not None
            else Step(f"{rows:,}", "rows sampled", [])
        )
    steps += [
        Step(f"{rows - kept:,}", "rows dropped", [f"{reason}: {count:,}" for reason, count in dropped]),
        Step(f"{kept:,}", "pairs", ["a chosen answer against the rejected"]),
    ]
    if "steps" in train:
        details = [f"{train['tokens']:,} tokens trained"] if "tokens" in train else []
        if "first_loss" in train:
            details.append(f"loss {train['first_loss']:.4f} to {train['last_loss']:.4f}")
        steps.append(Step(f"{train['steps']:,}", "optimizer steps", details))
        steps.append(Step(f"round {number}", "policy", ["where the next round starts"]))
    if "responses" in evaluate:
        steps.append(Step(f"{evaluate['responses']:,}", "held-out answers", ["measured, never trained on"]))
    parts = [Part("kept", f"{kept:,}", 100 * kept / rows, "kept")] if rows else []
    parts += [
        Part(reason, f"{count:,}", 100 * count / rows, "dropped" if index % 2 == 0 else "dropped-2")
        for index, (reason, count) in enumerate(dropped)
        if rows and count
    ]
    return Flow(number, steps, parts)
