"""The estimates of a worker's memory and of a checkpoint's size against the bytes that DeepSpeed really holds and
writes, for the tiny model on a CPU.

python -m pytest tests/integration/test_estimates_measured.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mipo_ray.config.train import TrainConfig
from mipo_ray.models.shape import ModelShape, model_shape
from mipo_ray.planning.disk import checkpoint_bytes
from mipo_ray.planning.estimates import BYTES, training_memory
from mipo_ray.training.checkpoint import Progress, save_checkpoint
from mipo_ray.training.deepspeed_engine import join_process_group, policy_engine, quiet_libraries
from mipo_ray.training.step import optimizer_step
from tests.helpers.tiny_training import ragged_pairs, read_all


def held(tensors: Any) -> int:
    """Bytes of tensors; of one number (Adam's step) none."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.numel() > 1)


@pytest.mark.parametrize(
    ("stage", "dtype", "lora_rank"), [(0, "float32", 0), (2, "float32", 0), (2, "bfloat16", 0), (2, "float32", 4)]
)
def test_weights_and_optimizer_states_are_as_estimated(
    stage: int, dtype: str, lora_rank: int, tiny_model: Path
) -> None:
    train = TrainConfig.model_validate({"zero_stage": stage, "lora": {"rank": lora_rank}, "objective": "sft"})
    shape = model_shape(str(tiny_model))
    assert isinstance(shape, ModelShape)
    estimate = training_memory(shape, train, dtype, 1, on_gpu=False)

    quiet_libraries("cpu")
    join_process_group("cpu")
    engine = policy_engine(str(tiny_model), train, dtype, "cpu", trust_remote_code=False)
    optimizer_step(engine, None, read_all(ragged_pairs(2), train.objective), train, 1e-5, step=0)
    weights = held(engine.module.parameters())
    optimizer = engine.optimizer.optimizer if stage else engine.optimizer
    masters = engine.optimizer.single_partition_of_fp32_groups if stage else []
    states = held(state for of_one in optimizer.state.values() for state in of_one.values()) + held(masters)
    assert weights == estimate.weights
    # Partitions are filled up to a multiple of a few numbers.
    assert states == pytest.approx(estimate.optimizer, rel=0.001)


@pytest.mark.parametrize(
    ("stage", "dtype", "lora_rank"),
    [
        *[(stage, "float32", 0) for stage in (0, 1, 2, 3)],
        *[(stage, "bfloat16", 0) for stage in (1, 2, 3)],
        *[(0, "float32", 4), (2, "bfloat16", 4), (3, "float32", 4)],
    ],
)
def test_a_checkpoint_is_as_large_as_estimated(
    stage: int, dtype: str, lora_rank: int, tiny_model: Path, tmp_path: Path
) -> None:
    """But for the format's own bytes, a few hundred for each tensor, which the tiny model has many of for its size."""
    train = TrainConfig.model_validate({"zero_stage": stage, "lora": {"rank": lora_rank}, "objective": "sft"})
    shape = model_shape(str(tiny_model))
    assert isinstance(shape, ModelShape)

    quiet_libraries("cpu")
    join_process_group("cpu")
    engine = policy_engine(str(tiny_model), train, dtype, "cpu", trust_remote_code=False)
    optimizer_step(engine, None, read_all(ragged_pairs(2), train.objective), train, 1e-5, step=0)
    save_checkpoint(engine, tmp_path / "checkpoint", Progress(steps=1))
    written = sum(path.stat().st_size for path in (tmp_path / "checkpoint").rglob("*.pt"))
    of_format = 2000 * len(list(engine.module.parameters()))
    # With adapters room for a tied head, which this model has not.
    head = shape.vocabulary * shape.hidden * BYTES[dtype] if lora_rank and stage < 3 else 0
    assert 0 <= written - (checkpoint_bytes(shape, train, dtype) - head) < of_format
