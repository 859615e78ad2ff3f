"""1, 2 and 4 workers that share the same steps train the same: plain gloo processes with real DeepSpeed, no Ray.

python -m pytest tests/integration/test_training_workers.py
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from mipo_ray.config.train import TrainConfig
from mipo_ray.storage.manifests import TrainSummary
from mipo_ray.training.layout import Pair, token_count
from mipo_ray.training.shares import deal
from mipo_ray.training.step import micro_batches
from mipo_ray.training.steps import known_steps
from mipo_ray.training.worker import train_round
from mipo_ray.training.worker_settings import WorkerSettings
from tests.helpers.tiny_training import VOCABULARY, ragged_pairs, read_all, save_tied_llama

WORKERS = (1, 2, 4)
# 19 pairs in steps of 9, which neither 2 nor 4 divide; the last step has 1 pair, and all workers but one have none.
BATCH_SIZE = 9
MOST_TOKENS = 24
TRAIN: dict[str, Any] = {
    "batch_size": BATCH_SIZE,
    "epochs": 1,
    "learning_rate": 1e-3,
    "beta": 0.5,
    "max_grad_norm": 0.5,
    "weight_decay": 0.1,
    "micro_batch_tokens": MOST_TOKENS,
}
CASES: dict[str, dict[str, Any]] = {
    "ZeRO 0 packed": {"zero_stage": 0, "layout": "packed"},
    "ZeRO 2 shared": {"zero_stage": 2, "layout": "shared"},
    "ZeRO 2 cached": {"zero_stage": 2, "reference_mode": "cached"},
    "ZeRO 3 cached": {"zero_stage": 3, "reference_mode": "cached", "layout": "padded"},
    "ZeRO 3 checkpointing": {"zero_stage": 3, "gradient_checkpointing": True},
    "ZeRO 2 adapters": {"zero_stage": 2, "reference_mode": "adapter", "lora": {"rank": 4}},
}


def long_and_short_pairs() -> list[Pair]:
    """Ragged pairs, and one so long that who has it runs other micro-batches than who has not."""
    pairs = ragged_pairs(19, seed=5)
    long = np.random.default_rng(0).integers(0, VOCABULARY, 40).astype(np.int32)
    pairs[7] = {**pairs[7], "chosen_token_ids": long}
    return read_all(pairs)


PAIRS = long_and_short_pairs()
STEPS = [PAIRS[start : start + BATCH_SIZE] for start in range(0, len(PAIRS), BATCH_SIZE)]


def shares(step: list[Pair], workers: int) -> list[list[Pair]]:
    """The pairs of a step that each worker gets."""
    sizes = [token_count(pair.trees) for pair in step]
    return [[step[index] for index in share] for share in deal(sizes, workers)]


@dataclass(frozen=True)
class Outcome:
    summary: TrainSummary
    steps: list[dict[str, float]]
    weights: dict[str, torch.Tensor]


def train_all_cases(rank: int, workers: int, directory: Path) -> None:
    """One worker's process; rank 0 leaves an Outcome of every case."""
    from safetensors.torch import load_file

    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    rendezvous = f"file://{directory}/rendezvous-{workers}"
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=workers)
    for name, options in CASES.items():
        gc.freeze()  # DeepSpeed collects garbage often, which takes longer the more objects it looks at
        output = directory / f"{name} by {workers}"
        settings = WorkerSettings(
            policy_dir=str(directory / "model"),
            reference_dir=str(directory / "model"),
            output_dir=str(output),
            reference_cache=f"{output} cache",
            train=TrainConfig(**TRAIN, **options),
            dtype="float32",
            device="cpu",
            seed=0,
            pair_count=len(PAIRS),
            threads=1,
        )
        steps: list[dict[str, float]] = []
        own = known_steps(settings, lambda epoch: [shares(step, workers)[rank] for step in STEPS])
        summary = train_round(settings, own, steps.append)
        assert bool(steps) == (rank == 0)
        if rank == 0:
            torch.save(Outcome(summary, steps, load_file(output / "model.safetensors")), f"{output}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("workers")
    save_tied_llama(directory / "model")
    for workers in WORKERS:
        torch.multiprocessing.spawn(train_all_cases, (workers, directory), nprocs=workers)
    return directory


def outcome(trained: Path, name: str, workers: int) -> Outcome:
    return torch.load(trained / f"{name} by {workers}.pt", weights_only=False)


def test_the_cases_are_the_hard_ones():
    for workers in WORKERS[1:]:
        counts = [
            [len(micro_batches(share, layout="shared", most_tokens=MOST_TOKENS)) for share in shares(step, workers)]
            for step in STEPS
        ]
        assert any(len({count for count in step if count}) > 1 for step in counts)  # unequally many micro-batches
        assert counts[-1].count(0) == workers - 1  # no pair for anyone else


@pytest.mark.parametrize("workers", WORKERS[1:])
@pytest.mark.parametrize("name", CASES)
def test_workers_together_train_as_one(trained, name, workers):
    alone, together = outcome(trained, name, 1), outcome(trained, name, workers)
    assert [step["pairs"] for step in together.steps] == [9, 9, 1]
    for key in ("step", "pairs", "tokens", "learning_rate"):
        assert [step[key] for step in together.steps] == [step[key] for step in alone.steps], key
    metrics = set(alone.steps[0]) - {"forward_tokens", "padding_share", "step_seconds", "tokens_per_second"}
    for key in metrics:
        found, expected = ([step[key] for step in one.steps] for one in (together, alone))
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5), key
    assert together.summary.tokens == alone.summary.tokens
    for key, weight in alone.weights.items():
        torch.testing.assert_close(together.weights[key], weight, atol=1e-5, rtol=0, msg=key)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("name", CASES)
def test_first_loss_is_ln_2(trained, name, workers):
    assert outcome(trained, name, workers).steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if "adapters" not in name])
def test_all_cases_of_one_objective_train_the_same(trained, name):
    """Whatever the ZeRO stage, layout and reference mode."""
    first, other = outcome(trained, "ZeRO 2 shared", 1), outcome(trained, name, 4)
    for key in ("loss", "gradient_norm", "reward_margin", "chosen_logprob"):
        found, expected = ([step[key] for step in one.steps] for one in (other, first))
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5), key
