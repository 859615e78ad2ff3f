"""What DeepSpeed is told: generated keys, and the raw ones of `train.deepspeed` merged over them. No torch import."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from pydantic import ValidationError

from mipo_ray.config.train import TrainConfig
from mipo_ray.errors import UserError, brief, cut

_DTYPES = ("float32", "bfloat16")


def deepspeed_config(train: TrainConfig, dtype: str) -> dict[str, Any]:
    """The DeepSpeed configuration of the policy: the generated keys with `train.deepspeed` merged over them.

    The worker sets the learning rate and closes every accumulation window itself, so that `lr` here is the first value
    only, and the batch sizes are placeholders that DeepSpeed demands.

    Raises UserError for a dtype that is neither float32 nor bfloat16: float16 needs loss scaling, which skips steps.
    """
    if dtype not in _DTYPES:
        raise UserError(f"model.dtype: expected one of {', '.join(_DTYPES)} for training, found {dtype!r}")
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if train.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": zero,
        # DeepSpeed's own Adam for offloaded states is compiled at start; torch's runs on the CPU too.
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": train.learning_rate,
                "betas": list(train.adam_betas),
                "eps": 1e-8,
                "weight_decay": train.weight_decay,
                # torch's own fused AdamW: DeepSpeed's compiles itself at start, which needs a CUDA toolkit on every
                # node.
                "torch_adam": True,
                "fused": True,
            },
        },
        "steps_per_print": None,
    }
    if dtype == "bfloat16":
        # DeepSpeed keeps float32 master weights. Without ZeRO it cannot sum the gradients of several micro-batches in
        # float32; stage 1 can and computes the same otherwise.
        generated["bf16"] = {"enabled": True}
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
        zero["stage"] = max(train.zero_stage, 1)
    return _merged(generated, train.deepspeed)


def check_deepspeed_keys(train: TrainConfig) -> None:
    """Has DeepSpeed itself read the configuration with the raw keys of `train.deepspeed`, where there are any.

    Raises UserError for what it refuses. Keys on the first level that it does not know it leaves out silently.
    """
    if not train.deepspeed:
        return
    with contextlib.redirect_stdout(io.StringIO()):  # into which it says that it found no GPU
        from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(deepspeed_config(train, "float32"))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"train.deepspeed: {error.title}: {key}: {first['msg']}, found {brief(first['input'])}"
        ) from None
    except (ValueError, TypeError, AttributeError, AssertionError) as error:  # as DeepSpeed's readers come to raise
        raise UserError(f"train.deepspeed: DeepSpeed cannot read it: {cut(str(error))}") from None


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result
