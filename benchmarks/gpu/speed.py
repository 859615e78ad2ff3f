"""Both trainers on a GPU: pairs per second, model-FLOPs utilisation and peak memory of an optimizer step.

Each contestant has the device for itself, in a process of its own that goes through all shapes of pairs.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.model_flops import step_flops
from benchmarks.trainer_contestants import Specification
from benchmarks.trainer_race import ContestantFailed, ContestantProcess
from benchmarks.trainer_workload import MODEL_SHAPES, Shape, fixed, long_answers, mixed, random_pairs
from mipo_ray.models.shape import ModelShape, read_shape

WARM_UP = 3
LARGE = ("ours", "ours, compiled")  # of the contestants, on a larger model
# The medians of the last three are those that the authors of dpo-prefix-sharing give for three public sets of pairs.
PAIRS_PER_STEP = {"tiny": 2, "llama-3.2-1b": 8, "qwen2.5-3b": 4}


def shapes(pairs: int) -> tuple[Shape, ...]:
    """Of pairs, in order of worth."""
    return (
        fixed(1024, 64, pairs),
        fixed(256, 256, pairs),
        mixed(4 * pairs),
        fixed(64, 256, pairs),
        long_answers(1160, 730, pairs),
        long_answers(872, 223, pairs),
        long_answers(409, 970, pairs),
    )


def contestants(base: Specification) -> dict[str, Specification]:
    """In order of worth: ours, compiled or not, by both attention backends; TRL with weights in float32, its default
    with bf16, and in bfloat16, also with its layers compiled as ours, which is none of its own options."""
    if base.device == "cpu":
        return {"ours": base, "trl": replace(base, trainer="trl")}
    narrow = {"weights_dtype": "bfloat16"}
    return {
        "ours, compiled": replace(base, options={"torch_compile": True}),
        "trl, bfloat16 weights": replace(base, trainer="trl", options=narrow),
        "ours": base,
        "trl": replace(base, trainer="trl"),
        "trl, bfloat16 weights, compiled": replace(base, trainer="trl", options=narrow | {"torch_compile": True}),
        "ours, flex_attention": replace(base, options={"attention": "flex_attention"}),
    }


def measure(
    runners: Mapping[str, Specification], model_shape: str, workload: Sequence[Shape], repeats: int, seed: int
) -> Iterator[dict[str, Any]]:
    """A row for each contestant and shape; one that fails has its error in place of figures.

    Every step has fresh pairs of the same shape, as in training, so that lengths differ from step to step where the
    shape's do.
    """
    vocabulary = MODEL_SHAPES[model_shape]["vocab_size"]
    steps = {
        shape: [
            random_pairs(shape, vocabulary=vocabulary, seed=seed + 1000 * number) for number in range(WARM_UP + repeats)
        ]
        for shape in workload
    }
    for name, specification in runners.items():
        left = list(workload)
        while left:  # a process that ends, for want of memory as a rule, is replaced for the shapes that are left
            with ContestantProcess(specification) as contestant:
                size = contestant.ask("parameters")["parameters"]
                shape_of_model = read_shape(MODEL_SHAPES[model_shape], size)
                assert isinstance(shape_of_model, ModelShape)
                while left:
                    shape = left.pop(0)
                    place = {"model": model_shape, "parameters": size, "shape": shape.name, "pairs": shape.pairs}
                    place["trainer"] = name
                    try:
                        yield {**place, **_steps(contestant, steps[shape], shape_of_model, name.startswith("ours"))}
                    except ContestantFailed as failure:
                        yield {**place, "error": _reason(str(failure))}
                        break


def _steps(
    contestant: ContestantProcess, steps: Sequence[list[dict[str, Any]]], shape: ModelShape, is_ours: bool
) -> dict[str, Any]:
    for pairs in steps[:WARM_UP]:
        contestant.ask("step", pairs=pairs)
    contestant.ask("forget_memory")  # the peak is one of steps, and not of loading
    found = [contestant.ask("step", pairs=pairs) for pairs in steps[WARM_UP:]]
    seconds = [step["seconds"] for step in found]
    timed = steps[WARM_UP:]
    # Of each step, since their pairs differ.
    rates = [step_flops(shape, pairs, shared=is_ours) / taken for pairs, taken in zip(timed, seconds, strict=True)]
    speeds = [len(pairs) / taken for pairs, taken in zip(timed, seconds, strict=True)]
    return {
        "seconds": seconds,
        "pairs_per_second": statistics.median(speeds),
        "flops_per_second": statistics.median(rates),
        "peak_bytes": contestant.ask("memory")["peak_bytes"],
        "forward_tokens": max(step.get("forward_tokens", 0) for step in found) or None,
        "losses": [step["loss"] for step in found],
    }


def _reason(message: str) -> str:
    """The last line of a failure that says something."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1])[:300]
