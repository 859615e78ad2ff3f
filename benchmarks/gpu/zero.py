"""ZeRO stages and offload with one worker: they compute the same, their checkpoints go on, and their memory is as told.

The memory is what `--dry-run` estimates for such a worker, beside the peak that torch allocated.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.trainer_contestants import Specification
from benchmarks.trainer_race import ContestantFailed, ContestantProcess
from benchmarks.trainer_workload import MODEL_SHAPES, fixed, random_pairs
from mipo_ray.config.train import TrainConfig
from mipo_ray.models.shape import ModelShape, read_shape
from mipo_ray.planning.estimates import training_memory

SETTINGS: dict[str, dict[str, Any]] = {
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
    "ZeRO 1, gradient checkpointing": {"zero_stage": 1, "gradient_checkpointing": True},
    "ZeRO 2, offloaded optimizer": {"zero_stage": 2, "offload_optimizer": True},
    "ZeRO 3, all offloaded": {
        "zero_stage": 3,
        "offload_optimizer": True,
        "offload_parameters": True,
        "offload_reference": True,
    },
}
STEPS = 3  # before the checkpoint, and as many after it
PAIRS = fixed(256, 64, 8)


def measure(base: Specification, model_shape: str, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of a setting: losses with and without an interruption, peak and estimated bytes.

    On a GPU all settings run at once, since nothing is timed and most of their time is start-up.
    """
    vocabulary = MODEL_SHAPES[model_shape]["vocab_size"]
    steps = [random_pairs(PAIRS, vocabulary=vocabulary, seed=seed + number) for number in range(2 * STEPS)]

    def row(name: str) -> dict[str, Any]:
        place = {"setting": name, "model": model_shape}
        try:
            return {**place, **_interrupted(replace(base, options=SETTINGS[name]), steps)}
        except ContestantFailed as failure:
            return {**place, "error": str(failure)[-600:]}

    with ThreadPoolExecutor(len(SETTINGS) if base.device == "cuda" else 1) as pool:
        yield from pool.map(row, SETTINGS)


def _interrupted(specification: Specification, steps: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """A training run that goes on from its own checkpoint in another process, beside one that was left alone."""
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as directory:
        with ContestantProcess(specification) as contestant:
            parameters = contestant.ask("parameters")["parameters"]
            before = [contestant.ask("step", pairs=pairs) for pairs in steps[:STEPS]]
            size = contestant.ask("save", directory=directory)["bytes"]
            contestant.ask("forget_memory")
            after = [contestant.ask("step", pairs=pairs) for pairs in steps[STEPS:]]
            peak = contestant.ask("memory")["peak_bytes"]
        with ContestantProcess(specification) as contestant:
            contestant.ask("load", directory=directory)
            again = [contestant.ask("step", pairs=pairs)["loss"] for pairs in steps[STEPS:]]
    losses = [step["loss"] for step in before + after]
    return {
        "losses": losses,
        "losses_after_resuming": again,
        # Of the first step, whose loss is that of the weights alone; a GPU's backward adds up in any order.
        "resume_difference": abs(losses[STEPS] - again[0]),
        "checkpoint_bytes": size,
        "peak_bytes": peak,
        "estimated_bytes": estimate(specification, parameters, max(step["forward_tokens"] for step in after)),
    }


def estimate(specification: Specification, parameters: int, tokens: int) -> float:
    """Bytes on its device that `--dry-run` estimates for a worker whose micro-batches have so many tokens."""
    shape = read_shape(_config(specification), parameters)
    assert isinstance(shape, ModelShape)
    options = {"zero_stage": 0, "micro_batch_tokens": int(tokens), **specification.options}
    train = TrainConfig.model_validate({"reference_mode": specification.reference_mode, **options})
    return training_memory(shape, train, specification.dtype, 1, on_gpu=specification.device == "cuda").device


def _config(specification: Specification) -> dict[str, Any]:
    return json.loads(Path(specification.model, "config.json").read_text())
