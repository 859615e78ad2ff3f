"""Raw DeepSpeed keys: what DeepSpeed itself refuses is refused before anything starts.

python -m pytest tests/unit/training/test_deepspeed_keys.py
"""

from __future__ import annotations

import pytest

from mipo_ray.config.train import TrainConfig
from mipo_ray.errors import UserError
from mipo_ray.training.deepspeed_config import check_deepspeed_keys


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"zero_optimization": {"reduce_bucket_size": "lots"}},
            "DeepSpeedZeroConfig: reduce_bucket_size: .*, found 'lots'",
        ),
        ({"zero_optimization": {"reduce_buckt_size": 1}}, "DeepSpeedZeroConfig: reduce_buckt_size: .*not permitted"),
        ({"zero_optimization": {"offload_optimizer": {"device": "tape"}}}, "offload_optimizer.device: .*'tape'"),
        ({"zero_optimization": 3}, "DeepSpeed cannot read it: .*must be a mapping"),
        ({"optimizer": "adam"}, "DeepSpeed cannot read it"),
        ({"train_batch_size": 7}, "DeepSpeed cannot read it: .*batch"),
    ],
)
def test_what_deepspeed_refuses_is_named(keys: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError, match=f"^train.deepspeed: .*{expected}"):
        check_deepspeed_keys(TrainConfig(deepspeed=keys))


def test_what_it_takes_is_taken() -> None:
    check_deepspeed_keys(TrainConfig(deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}}))
