"""The estimate of a worker's memory against the bytes that DeepSpeed really holds, for the tiny model on a CPU.

python -m pytest tests/integration/test_estimates_measured.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mipo_ray.config.train import TrainConfig
from mipo_ray.models.shape import ModelShape, model_shape
from mipo_ray.planning.estimates import training_memory
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
