"""The policy and the frozen reference as DeepSpeed runs them, and the DeepSpeed configuration behind both.

DeepSpeed and transformers are imported inside the functions: DeepSpeed fixes its accelerator when it is imported,
which must come after the worker knows its device.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from mipo_ray.config import TrainConfig
from mipo_ray.errors import UserError
from mipo_ray.training.layout import SequenceBatch
from mipo_ray.training.logprobs import ResponseLogprobs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Logprobs = Callable[[SequenceBatch], Tensor]


def quiet_libraries(device: str) -> None:
    """Warnings and errors only from DeepSpeed and transformers; fixes DeepSpeed's accelerator to `device`."""
    os.environ["DS_ACCELERATOR"] = device
    warnings.filterwarnings("ignore", category=FutureWarning)
    import deepspeed
    import transformers

    # DeepSpeed would test-compile its optional operators here and build a shared-memory all-reduce for CPUs: a minute
    # and a compiler that this needs neither of. Told that none can be built, it uses what torch has.
    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.disable_progress_bar()


def join_process_group(device: str) -> None:
    """Makes a torch process group of this process alone where the caller has made none."""
    if distributed.is_initialized():
        return
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    backend = "gloo" if device == "cpu" else "nccl"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)


def deepspeed_config(train: TrainConfig, dtype: str, num_workers: int) -> dict[str, Any]:
    """The DeepSpeed configuration of the policy: the generated keys with `train.deepspeed` merged over them.

    The worker sets the learning rate and closes every accumulation window itself, so that `lr` and
    `gradient_accumulation_steps` here are the first value and the largest window.

    Raises UserError for a dtype that is neither float32 nor bfloat16: float16 needs loss scaling, which skips steps.
    """
    if dtype not in DTYPES:
        raise UserError(f"model.dtype: expected one of {', '.join(DTYPES)} for training, found {dtype!r}")
    pairs_per_step = train.batch_size // num_workers
    micro_batch_size = min(train.micro_batch_size, pairs_per_step)
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": -(-pairs_per_step // micro_batch_size),
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": {"stage": train.zero_stage},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": train.learning_rate,
                "betas": list(train.adam_betas),
                "eps": 1e-8,
                "weight_decay": train.weight_decay,
                # torch's own AdamW: DeepSpeed's compiles itself at start, which needs a CUDA toolkit on every node.
                "torch_adam": True,
            },
        },
        "steps_per_print": None,
    }
    if dtype == "bfloat16":
        # DeepSpeed keeps float32 master weights. Without ZeRO it cannot sum the gradients of several micro-batches in
        # float32; stage 1 can and computes the same otherwise.
        generated["bf16"] = {"enabled": True}
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
        generated["zero_optimization"] = {"stage": max(train.zero_stage, 1)}
    return _merged(generated, train.deepspeed)


def policy_engine(model_dir: str, config: dict[str, Any], dtype: str, device: str, **options: bool) -> Any:
    """The DeepSpeed engine around `ResponseLogprobs` of the model in `model_dir`, ready to train.

    Options: `gradient_checkpointing`, `trust_remote_code`. The torch process group must be initialised.
    """
    import deepspeed

    model = _load(model_dir, dtype, options["trust_remote_code"])
    if options["gradient_checkpointing"]:
        _checkpoint_gradients(model)
    module = _placed(ResponseLogprobs(model), config, dtype, device)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory use whatever its log level
        engine, *_ = deepspeed.initialize(model=module, model_parameters=trained, config=config)
    return engine


def reference_logprobs(
    model_dir: str, config: dict[str, Any], dtype: str, device: str, *, trust_remote_code: bool
) -> Logprobs:
    """A function from a batch to the frozen reference's response log-probs: [sequences], float32, nats, no gradient.

    `config` is the policy's: at ZeRO stage 3 the reference is sharded over the workers as the policy is, and every
    worker must call the function equally often; below stage 3 every worker has the whole reference.
    """
    module: Any = ResponseLogprobs(_load(model_dir, dtype, trust_remote_code)).requires_grad_(False)
    module = _placed(module, config, dtype, device)
    if config["zero_optimization"]["stage"] == 3:
        import deepspeed

        without_optimizer = {key: value for key, value in config.items() if key != "optimizer"}
        zero = {key: value for key, value in config["zero_optimization"].items() if key != "offload_optimizer"}
        module, *_ = deepspeed.initialize(model=module, config={**without_optimizer, "zero_optimization": zero})

    def logprobs(batch: SequenceBatch) -> Tensor:
        with torch.no_grad():
            return module(batch.input_ids, batch.attention_mask, batch.response_mask)

    return logprobs


def _load(model_dir: str, dtype: str, trust_remote_code: bool) -> Any:
    """The model on the CPU, in evaluation mode, so that no dropout blurs the ratio of policy and reference."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=trust_remote_code
    ).eval()


def _placed(module: nn.Module, config: dict[str, Any], dtype: str, device: str) -> nn.Module:
    """The module on its device; at ZeRO stage 3 each parameter is sharded alone, so that no device holds them all."""
    if config["zero_optimization"]["stage"] != 3:
        return module.to(device)
    import deepspeed

    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
    deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=DTYPES[dtype])
    return module


def _checkpoint_gradients(model: Any) -> None:
    """Turns on activation recomputation, which transformers ties to training mode, without turning on dropout."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            # Of the layer alone and not of what is in it; some layers apply dropout by an attribute of their own.
            layer.training = True
            for name, value in vars(layer).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(layer, name, 0.0)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result
