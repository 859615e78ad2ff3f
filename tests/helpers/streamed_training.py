"""Training on pairs whose blocks are written while it runs, on the cluster and, on the same pairs, in this process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from mipo_ray.config.recipe import load_config
from mipo_ray.monitoring.events import read_events, recording
from mipo_ray.pairs.schema import TOKEN_IDS
from mipo_ray.ray_cluster.resources import Resources
from mipo_ray.session import Session
from mipo_ray.storage.manifests import TrainSummary
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.training.steps import known_steps, steps_of
from mipo_ray.training.stream import PairStream
from mipo_ray.training.trainer import ArrivingPairs, Models, train_policy
from mipo_ray.training.worker import train_round
from mipo_ray.training.worker_settings import WorkerSettings
from tests.helpers.tiny_training import KillsItsWorker, ragged_pairs, read_all

ON_CPU = Resources(on_gpu=False, dtype="float32", gpus_per_engine=0.0, gpus_per_worker=0.0)
GENERATE, TRAIN_STAGE = "rounds/000/generate", "rounds/000/train"
BLOCK = 6
TRAIN = ("train.batch_size=4", "train.learning_rate=1e-2", "train.beta=0.5", "train.checkpoint_steps=2")
PAIR_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("pair_id", pa.string()),
        ("prompt_token_ids", TOKEN_IDS),
        ("chosen_token_ids", TOKEN_IDS),
        ("rejected_token_ids", pa.list_(TOKEN_IDS)),
        ("dropped", pa.string()),
    ]
)


@dataclass(frozen=True)
class Outcome:
    summary: TrainSummary
    steps: list[dict[str, Any]]  # the newest event of each
    weights: dict[str, torch.Tensor]


def rows_of(count: int, dropped: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Pairs whose ids are not in the order of their prompts."""
    return [
        row
        | {
            "prompt_id": f"prompt-{number}",
            "pair_id": f"{(number * 7919) % 1000:016x}",
            "dropped": "truncated" if number in dropped else "",
        }
        for number, row in enumerate(ragged_pairs(count))
    ]


def in_training_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    ordered = [row for block in blocks for row in sorted(block, key=lambda row: row["pair_id"])]
    return [row for row in ordered if not row["dropped"]]


def write_conditioned(run: RunDirectory, rows: list[dict[str, Any]]) -> None:
    """The conditioned rows of a generate stage, as far as training reads them."""
    columns = {
        "prompt_id": [row["prompt_id"] for row in rows],
        "block_id": [f"block-{number // BLOCK}" for number in range(len(rows))],
        "dropped": [""] * len(rows),
    }
    directory = Path(run.root) / GENERATE / "conditioned"
    directory.mkdir(parents=True)
    pyarrow.parquet.write_table(pa.table(columns), directory / "x_000000-0.parquet")


def write_block(run: RunDirectory, rows: list[dict[str, Any]], number: int) -> None:
    """The pairs of a block and, when they are complete, their note, as Ray Data writes them."""
    block, stage = rows[number * BLOCK : (number + 1) * BLOCK], Path(run.root) / GENERATE
    pyarrow.parquet.write_table(pa.Table.from_pylist(block, PAIR_SCHEMA), stage / f"y_{number:06d}-0.parquet")
    notes = stage / "checkpoint"
    notes.mkdir(exist_ok=True)
    ids = pa.table({"prompt_id": [row["prompt_id"] for row in block]})
    pyarrow.parquet.write_table(ids, notes / f"y_{number:06d}.pending.parquet")
    (notes / f"y_{number:06d}.pending.parquet").rename(notes / f"y_{number:06d}.parquet")


@contextlib.contextmanager
def written_beside(run: RunDirectory, rows: list[dict[str, Any]], order: Sequence[int]) -> Iterator[None]:
    """Blocks that are written in this order while the block of `with` runs, each when the training has begun."""

    def write() -> None:
        for number in order:
            time.sleep(1.0)
            write_block(run, rows, number)

    writer = threading.Thread(target=write)
    writer.start()
    yield
    writer.join()


def streamed(model_dir: Path, run: RunDirectory, kills_worker_at: int | None = None, *overrides: str) -> Outcome:
    """Trains on what is written below the run, on the cluster."""
    config = load_config(None, [*TRAIN, *overrides])
    with recording(run) as writer:
        events: Any = writer
        if kills_worker_at is not None:
            events = KillsItsWorker(events, kills_worker_at, Path(run.root) / "killed")
        summary = train_policy(
            Session(config, run, ON_CPU, events).stage(Round(0), "train"),
            Models(str(model_dir), str(model_dir)),
            ArrivingPairs(PairStream(run, GENERATE, samples_per_prompt=1)),
        )
    steps = {event["step"]: event for event in read_events(run) if event["event"] == "train_step"}
    weights = load_file(Path(run.root) / TRAIN_STAGE / "policy/model.safetensors")
    return Outcome(summary, [steps[number] for number in sorted(steps)], weights)


def in_this_process(model_dir: Path, directory: Path, rows: list[dict[str, Any]], *overrides: str) -> Outcome:
    """Trains on the same pairs, all known beforehand, without Ray."""
    train = load_config(None, [*TRAIN, *overrides]).train
    settings = WorkerSettings(
        policy_dir=str(model_dir),
        reference_dir=str(model_dir),
        output_dir=str(directory / "policy"),
        reference_cache=None,
        train=train,
        dtype="float32",
        device="cpu",
        seed=0,
        pair_count=len(rows),
        threads=1,
    )
    steps: list[dict[str, Any]] = []
    read = read_all(rows, train.objective)
    summary = train_round(settings, known_steps(settings, lambda _: steps_of(read, train.batch_size)), steps.append)
    return Outcome(summary, steps, load_file(directory / "policy/model.safetensors"))


def assert_equal(found: Outcome, expected: Outcome, tolerance: float) -> None:
    assert (found.summary.steps, found.summary.pairs) == (expected.summary.steps, expected.summary.pairs)
    for name in ("step", "pairs", "loss", "learning_rate", "gradient_norm"):
        assert [step[name] for step in found.steps] == pytest.approx([step[name] for step in expected.steps], abs=1e-5)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, atol=tolerance, rtol=0, msg=name)
