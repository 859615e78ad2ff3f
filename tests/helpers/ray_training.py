"""Training of eleven pairs on the cluster, or in this process on the same pairs, and how two outcomes are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import ray.data
import torch

from mipo_ray.config.schema import Config
from mipo_ray.monitoring import events as monitoring
from mipo_ray.pairs.schema import SAMPLER_LOGPROB, TOKEN_IDS
from mipo_ray.ray_cluster.resources import Resources
from mipo_ray.session import Session
from mipo_ray.storage.manifests import TrainSummary
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.training.steps import known_steps, steps_of
from mipo_ray.training.trainer import AllPairs, Models, train_policy
from mipo_ray.training.worker import train_round
from mipo_ray.training.worker_settings import WorkerSettings
from tests.helpers.tiny_training import ragged_pairs, read_all

# 11 pairs in steps of 4: 3 steps in each of 2 epochs, the last of which has 3 pairs. A checkpoint after every other.
PAIRS = ragged_pairs(11)
TRAIN: dict[str, Any] = {
    "batch_size": 4,
    "epochs": 2,
    "learning_rate": 1e-3,
    "beta": 0.5,
    "max_grad_norm": 0.5,
    "weight_decay": 0.1,
    "warmup_ratio": 0.3,
    "micro_batch_tokens": 64,
    "zero_stage": 2,
    "num_workers": 2,
    "checkpoint_steps": 2,
    "max_failures": 0,
}
# The worker dies in the last of 6 steps, so that step 4, after the second checkpoint, is done twice.
KILLED_STEP = 5
STEPS_WITH_A_KILL = [0, 1, 2, 3, 4, 4, 5]
ON_CPU = Resources(on_gpu=False, dtype="float32", gpus_per_engine=0.0, gpus_per_worker=0.0)
SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt_token_ids", TOKEN_IDS),
        ("chosen_token_ids", TOKEN_IDS),
        ("rejected_token_ids", pa.list_(TOKEN_IDS)),
        ("mismatched_prompt_token_ids", pa.list_(TOKEN_IDS)),  # read by objective sami alone
        (SAMPLER_LOGPROB, pa.float32()),
    ]
)


@dataclass(frozen=True)
class Outcome:
    summary: TrainSummary
    steps: list[dict[str, float]]  # one for each time that a step was done
    weights: dict[str, torch.Tensor]


STAGE = "rounds/000/train"


def on_ray(
    model_dir: Path,
    run: RunDirectory,
    events: Any,
    pair_count: int = len(PAIRS),
    pairs: list[dict[str, Any]] = PAIRS,
    **train: Any,
) -> Outcome:
    """Trains on the cluster; what it did is read from the run directory."""
    dataset = ray.data.from_arrow(pa.Table.from_pylist(pairs, SCHEMA)).repartition(3)
    summary = train_policy(
        Session(Config.model_validate({"train": TRAIN | train}), run, ON_CPU, events).stage(Round(0), "train"),
        Models(str(model_dir), str(model_dir)),
        AllPairs(dataset, pair_count),
    )
    return Outcome(summary, steps_done(run, events), load(Path(run.root) / STAGE / "policy"))


def steps_done(run: RunDirectory, events: Any) -> list[dict[str, float]]:
    getattr(events, "events", events).flush()
    return [event for event in monitoring.read_events(run) if event["event"] == "train_step"]


def load(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def assert_equal_outcomes(found: Outcome, expected: Outcome, tolerance: float) -> None:
    newest = {step["step"]: step for step in found.steps}
    assert list(newest) == [step["step"] for step in expected.steps] == [0, 1, 2, 3, 4, 5]
    for key in ("pairs", "tokens", "loss", "gradient_norm", "reward_accuracy", "chosen_logprob", "learning_rate"):
        values = [step[key] for step in expected.steps]
        assert [step[key] for step in newest.values()] == pytest.approx(values, abs=tolerance), key
    assert (found.summary.steps, found.summary.pairs) == (6, 11)
    assert found.summary.tokens == expected.summary.tokens
    assert found.summary.first_loss == pytest.approx(expected.summary.first_loss, abs=tolerance)
    assert found.summary.last_loss == pytest.approx(expected.summary.last_loss, abs=tolerance)
    assert list(found.weights) == list(expected.weights)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, atol=tolerance, rtol=0, msg=name)


def in_this_process(model_dir: Path, directory: Path, pairs: list[dict[str, Any]], **train: Any) -> Outcome:
    """Trains on the same pairs without Ray."""
    settings = WorkerSettings(
        policy_dir=str(model_dir),
        reference_dir=str(model_dir),
        output_dir=str(directory / "policy"),
        reference_cache=str(directory / "cache"),
        train=Config.model_validate({"train": TRAIN | train}).train,
        dtype="float32",
        device="cpu",
        seed=0,
        pair_count=len(pairs),
        threads=1,
    )
    steps: list[dict[str, float]] = []
    read = read_all(pairs, settings.train.objective)
    epochs = known_steps(settings, lambda epoch: steps_of(read, TRAIN["batch_size"]))
    summary = train_round(settings, epochs, steps.append)
    assert [step["pairs"] for step in steps] == [4, 4, 3, 4, 4, 3]
    return Outcome(summary, steps, load(directory / "policy"))
