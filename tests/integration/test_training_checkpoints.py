"""Checkpoints of another number of workers: plain processes with real DeepSpeed, no Ray.

python -m pytest tests/integration/test_training_checkpoints.py
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from mipo_ray.config.train import Objective, TrainConfig
from mipo_ray.storage.manifests import TrainSummary
from mipo_ray.training.checkpoint import CheckpointRefused, Checkpoints, Progress, load_checkpoint, save_checkpoint
from mipo_ray.training.deepspeed_engine import join_process_group, policy_engine, quiet_libraries
from mipo_ray.training.layout import Pair
from mipo_ray.training.shares import deal
from mipo_ray.training.step import optimizer_step
from mipo_ray.training.steps import known_steps
from mipo_ray.training.whole_checkpoints import first_whole
from mipo_ray.training.worker import train_round
from mipo_ray.training.worker_settings import WorkerSettings
from tests.helpers.tiny_training import ragged_pairs, read_all, save_tied_llama

# 11 pairs in steps of 4: 3 steps in each of 2 epochs, the last of which has 3 pairs.
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
}
# The checkpoint is after 4 of 6 steps: in the middle of the second epoch.
CHECKPOINT_STEPS = 4
FLOAT32: dict[str, dict[str, Any]] = {f"zero-{stage}": {"zero_stage": stage} for stage in (0, 1, 2, 3)}
# Several groups of parameters, each with an update of its own.
FLOAT32["zero-3"] |= {"deepspeed": {"zero_optimization": {"sub_group_size": 4096}}}
ENGINES = {
    "zero-1 bfloat16": ("bfloat16", {"zero_stage": 1}),
    "zero-2 bfloat16": ("bfloat16", {"zero_stage": 2}),
    "zero-3 bfloat16": ("bfloat16", {"zero_stage": 3}),
    "zero-2 lora": ("float32", {"zero_stage": 2, "lora": {"rank": 4}}),
    "zero-3 offloaded": ("float32", {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}),
    "zero-3 lora": ("float32", {"zero_stage": 3, "lora": {"rank": 4}}),
}


def in_processes(workers: int, function: Callable[..., None], directory: Path) -> None:
    """Runs function(directory) in so many new processes, joined by gloo; each error is the caller's."""
    rendezvous = directory / f"rendezvous-{workers}-{function.__name__}"
    torch.multiprocessing.spawn(_joined, (workers, rendezvous, function, directory), nprocs=workers)


def _joined(rank: int, workers: int, rendezvous: Path, function: Callable[..., None], directory: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_RANK": str(rank)})
    distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=workers)
    function(directory)
    distributed.destroy_process_group()


def own_steps(epoch: int, objective: Objective = "dpo") -> list[list[Pair]]:
    pairs = read_all(PAIRS, objective)
    steps = [pairs[start : start + TRAIN["batch_size"]] for start in range(0, len(pairs), TRAIN["batch_size"])]
    rank, workers = distributed.get_rank(), distributed.get_world_size()
    return [[step[index] for index in deal([1] * len(step), workers)[rank]] for step in steps]


@dataclass(frozen=True)
class Outcome:
    summary: TrainSummary
    losses: dict[int, float]  # by step
    weights: dict[str, torch.Tensor]


def train(directory: Path, output: str, checkpoints: Checkpoints | None = None, **options: Any) -> None:
    """Trains on this worker's share of PAIRS; rank 0 leaves an Outcome in directory/output."""
    from safetensors.torch import load_file

    settings = WorkerSettings(
        policy_dir=str(directory / "model"),
        reference_dir=str(directory / "model"),
        output_dir=str(directory / output),
        reference_cache=str(directory / output / "cache"),
        train=TrainConfig(**TRAIN, checkpoint_steps=CHECKPOINT_STEPS, **options),
        dtype="float32",
        device="cpu",
        seed=0,
        pair_count=len(PAIRS),
        threads=1,
    )
    losses: dict[int, float] = {}
    summary = train_round(
        settings,
        known_steps(settings, own_steps),
        lambda metrics: losses.update({int(metrics["step"]): metrics["loss"]}),
        checkpoints,
    )
    if distributed.get_rank() == 0:
        weights = load_file(directory / output / "model.safetensors")
        torch.save(Outcome(summary, losses, weights), directory / f"{output}.pt")


def copied_to(directory: Path) -> Checkpoints:
    """Checkpoints that are brought together by copying, as Ray Train does."""

    def latest() -> AbstractContextManager[Path | None]:
        if not directory.exists():
            return contextlib.nullcontext()
        return first_whole(str(directory.parent), [directory.name], lambda _: contextlib.nullcontext(directory))

    def publish(shard: Path, steps: int) -> None:
        shutil.copytree(shard, directory, dirs_exist_ok=True)

    return Checkpoints(publish, latest)


def train_and_save(directory: Path) -> None:
    for name, options in FLOAT32.items():
        train(directory, f"{name} whole", copied_to(directory / f"{name} checkpoint"), **options)
    for name in ENGINES:
        save_engine(directory, name)


def resume(directory: Path) -> None:
    for name, options in FLOAT32.items():
        checkpoints = Checkpoints(lambda shard, steps: None, copied_to(directory / f"{name} checkpoint").latest)
        train(directory, f"{name} resumed by {distributed.get_world_size()}", checkpoints, **options)
    for name in ENGINES:
        load_engine(directory, name)


def save_engine(directory: Path, name: str) -> None:
    """Two optimizer steps, a checkpoint, and a dump of the state that it should hold."""
    engine, train_config = make_engine(directory, name)
    for step, pairs in enumerate(own_steps(0, train_config.objective)[:2]):
        optimizer_step(engine, None, pairs, train_config, 1e-3, step)
    shard = directory / f"{name} shard {distributed.get_rank()}"
    shard.mkdir()
    save_checkpoint(engine, shard, Progress(steps=2))
    copied_to(directory / f"{name} checkpoint").publish(shard, 2)
    save_state(engine, directory / f"{name} state.pt")


def load_engine(directory: Path, name: str) -> None:
    engine, _ = make_engine(directory, name)
    progress = load_checkpoint(engine, directory / f"{name} checkpoint")
    assert progress.steps == 2
    save_state(engine, directory / f"{name} state by {distributed.get_world_size()}.pt")


def make_engine(directory: Path, name: str) -> tuple[Any, TrainConfig]:
    dtype, options = ENGINES[name]
    # The one objective that needs no reference; two micro-batches in a step at least.
    train_config = TrainConfig(**TRAIN | options | {"objective": "sft", "micro_batch_tokens": 16})
    quiet_libraries("cpu")
    torch.manual_seed(0)
    return policy_engine(str(directory / "model"), train_config, dtype, "cpu", trust_remote_code=False), train_config


def save_state(engine: Any, file: Path) -> None:
    """Rank 0 writes weights, float32 master weights and both moments of AdamW, whole; and the counts of its steps."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    whole: dict[str, Any] = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            whole[f"{name} master"] = safe_get_full_fp32_param(parameter)
            for moment in ("exp_avg", "exp_avg_sq"):
                whole[f"{name} {moment}"] = safe_get_full_optimizer_state(parameter, moment)
    whole["steps"] = sorted({float(state["step"]) for state in engine.optimizer.optimizer.state.values()})
    if distributed.get_rank() == 0:
        torch.save(whole, file)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Everything is trained and saved by 2 workers, then resumed by 1 and by 4."""
    directory = tmp_path_factory.mktemp("checkpoints")
    save_tied_llama(directory / "model")
    in_processes(2, train_and_save, directory)
    join_process_group("cpu")  # of this process alone
    resume(directory)
    in_processes(4, resume, directory)
    return directory


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("name", FLOAT32)
def test_another_number_of_workers_ends_where_the_first_would_have(trained, name, workers):
    whole = torch.load(trained / f"{name} whole.pt", weights_only=False)
    resumed = torch.load(trained / f"{name} resumed by {workers}.pt", weights_only=False)
    assert (list(whole.losses), list(resumed.losses)) == ([0, 1, 2, 3, 4, 5], [4, 5])
    assert resumed.summary.tokens == whole.summary.tokens
    assert resumed.summary.first_loss == whole.summary.first_loss
    assert resumed.losses == pytest.approx({step: whole.losses[step] for step in (4, 5)}, abs=1e-5)
    for key, weight in whole.weights.items():
        torch.testing.assert_close(resumed.weights[key], weight, atol=1e-5, rtol=0, msg=key)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("name", ENGINES)
def test_conversion_changes_no_bit(trained, name, workers):
    saved = torch.load(trained / f"{name} state.pt")
    loaded = torch.load(trained / f"{name} state by {workers}.pt")
    assert list(loaded) == list(saved)
    assert loaded.pop("steps") == saved.pop("steps") == [2.0]
    for key, tensor in saved.items():
        assert torch.equal(loaded[key], tensor), key


def test_a_checkpoint_of_another_stage_is_refused_by_name(trained):
    engine, _ = make_engine(trained, "zero-2 bfloat16")
    with pytest.raises(
        CheckpointRefused, match=r"ZeRO stage 1 in bfloat16, and training now runs with ZeRO stage 2 in bf"
    ):
        load_checkpoint(engine, trained / "zero-1 bfloat16 checkpoint")


def test_a_conversion_that_fails_says_why(trained, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(trained / "zero-3 checkpoint", damaged)
    next(damaged.glob("state/*rank_1*optim_states.pt")).unlink()
    engine = policy_engine(
        str(trained / "model"), TrainConfig(**TRAIN, **FLOAT32["zero-3"]), "float32", "cpu", trust_remote_code=False
    )
    with pytest.raises(RuntimeError, match=rf"{damaged}: cannot be converted on .* to 1 workers: RuntimeError: "):
        load_checkpoint(engine, damaged)


class Planted:
    """Unpickled, it makes a directory: harmless, and seen."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self._path,)


@pytest.mark.parametrize("kind", ["model", "optim"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_planted_program_does_not_run_whether_it_is_loaded_or_converted(trained, tmp_path, workers, kind):
    """A checkpoint of as many workers as load it is loaded as it is; one of two is converted first."""
    planted, seen = tmp_path / "planted", tmp_path / "seen"
    engine, _ = make_engine(trained, "zero-2 bfloat16")
    if workers == 1:
        planted.mkdir()
        save_checkpoint(engine, planted, Progress(steps=2))
    else:
        shutil.copytree(trained / "zero-2 bfloat16 checkpoint", planted)
    for file in planted.glob(f"state/*{kind}_states.pt"):
        content = torch.load(file, weights_only=False)
        torch.save({**content, "more": Planted(seen)}, file)
    with pytest.raises(CheckpointRefused, match=rf"{planted}/state/.*: expected a checkpoint of tensors .* was run"):
        load_checkpoint(engine, planted)
    assert not seen.exists()
