"""Policy and reference as DeepSpeed engines: made, checked and joined for one training step.

Everything that a round, the profile and the benchmark train with is made here, so that all three measure the same.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import distributed, nn

from mipo_ray.config.train import TrainConfig
from mipo_ray.errors import UserError
from mipo_ray.ray_cluster.resources import TRAINS_ON_GPUS_ONLY
from mipo_ray.training.adapters import with_adapters
from mipo_ray.training.attention import leave_out_of_compilation, use_attention
from mipo_ray.training.deepspeed_config import deepspeed_config
from mipo_ray.training.layout import Pair
from mipo_ray.training.logprobs import ResponseLogprobs, check_logprobs
from mipo_ray.training.reference import (
    Reference,
    adapter_reference,
    cached_reference,
    colocated_reference,
    compute_logprobs,
    read_logprobs,
    release_weights,
    write_logprobs,
)
from mipo_ray.training.sharded_loading import load_own_part
from mipo_ray.training.step import plan_micro_batches

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Raw keys of ZeRO 3 by which DeepSpeed keeps more than a part of each parameter, or another one than it was given.
_SHARDED_OTHERWISE = (
    "mics_shard_size",
    "zero_hpz_partition_size",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
)


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


def policy_engine(model_dir: str, train: TrainConfig, dtype: str, device: str, *, trust_remote_code: bool) -> Any:
    """The DeepSpeed engine around `ResponseLogprobs` of the model in `model_dir`, ready to train.

    With `train.lora.rank` only adapters are trained. The torch process group must be initialised.

    Raises UserError when the model or the device cannot honour `train.layout` and `train.attention`; a few tokens find
    the former out.
    """
    if device == "cpu" and train.attention in TRAINS_ON_GPUS_ONLY:
        raise UserError(
            f"train.attention: {train.attention} trains on GPUs only ({TRAINS_ON_GPUS_ONLY[train.attention]}); choose "
            "attention sdpa"
        )
    import deepspeed

    config = deepspeed_config(train, dtype)
    model = _load(model_dir, train, config, dtype, trust_remote_code)
    if train.lora.rank:
        model = with_adapters(model, train.lora)
    if train.gradient_checkpointing:
        _checkpoint_gradients(model)
    module = _placed(ResponseLogprobs(model), config, dtype, device)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory use whatever its log level
        engine, *_ = deepspeed.initialize(model=module, model_parameters=trained, config=config)
    if distributed.get_world_size() == 1 and not engine.zero_optimization():
        engine.enable_backward_allreduce = False  # it would copy all gradients twice to sum them over one worker
    check_logprobs(model, train.layout, device)
    return engine


def reference_module(model_dir: str, train: TrainConfig, dtype: str, device: str, *, trust_remote_code: bool) -> Any:
    """A frozen `ResponseLogprobs` of the model in `model_dir`, or a DeepSpeed engine around one.

    At ZeRO stage 3, and with `train.offload_reference`, it is sharded over the workers, and every worker must call it
    equally often; else every worker has the whole model.
    """
    config = deepspeed_config(train, dtype)
    zero = {key: value for key, value in config["zero_optimization"].items() if key != "offload_optimizer"}
    if train.offload_reference:
        zero |= {"stage": 3, "offload_param": {"device": "cpu"}}
    config = {key: value for key, value in config.items() if key != "optimizer"} | {"zero_optimization": zero}
    model = _load(model_dir, train, config, dtype, trust_remote_code)
    module: Any = ResponseLogprobs(model).requires_grad_(False)
    module = _placed(module, config, dtype, device)
    if zero["stage"] == 3:
        import deepspeed

        with contextlib.redirect_stdout(io.StringIO()):
            module, *_ = deepspeed.initialize(model=module, config=config)
    return module


def _load(model_dir: str, train: TrainConfig, config: dict[str, Any], dtype: str, trust_remote_code: bool) -> Any:
    """The model in evaluation mode, so that no dropout blurs the ratio of policy and reference.

    It is whole and on the CPU; at ZeRO stage 3 each worker has its part of every parameter where that will stay.
    """
    from transformers import AutoModelForCausalLM

    if _loads_own_part(config["zero_optimization"]):
        model = load_own_part(model_dir, config, DTYPES[dtype], trust_remote_code)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=trust_remote_code
        ).eval()
    use_attention(model, train.attention, train.layout)
    if train.torch_compile:
        compile_layers(model)
    return model


def _loads_own_part(zero: dict[str, Any]) -> bool:
    on_disk = (zero.get("offload_param") or {}).get("device") == "nvme"
    return zero["stage"] == 3 and not on_disk and not any(zero.get(key) for key in _SHARDED_OTHERWISE)


def compile_layers(model: Any) -> None:
    """Compiles each decoder layer at its first call; equal layers share what is compiled, and lengths may change."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    leave_out_of_compilation()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):  # what every family's decoder layer is
            layer.compile(dynamic=True)


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


def policy_and_reference(
    policy_dir: str,
    reference_dir: str,
    train: TrainConfig,
    dtype: str,
    device: str,
    *,
    trust_remote_code: bool,
    steps: Callable[[], Iterable[Sequence[Pair]]],
    pair_count: int | None,
    cache: str | None,
) -> tuple[Any, Reference | None]:
    """The policy's engine (`deepspeed_engine.policy_engine`), and the reference where the objective has one.

    In reference mode cached the log-probs of all pairs are computed before the policy is loaded, so that there is never
    a second model beside it: `steps()` streams this worker's pairs of every step once, and `cache`, a directory on any
    filesystem, keeps the log-probs of the `pair_count` pairs of all workers; None: they are not kept. All workers must
    call this together.
    """
    place = (train, dtype, device)

    def frozen_copy() -> Any:
        return reference_module(reference_dir, *place, trust_remote_code=trust_remote_code)

    reference = None
    if train.needs_reference and train.reference_mode == "cached":
        assert pair_count is not None, "log-probs are cached of pairs that are all there"
        reference = _cached_reference(frozen_copy, train, device, steps, pair_count, cache)
    engine = policy_engine(policy_dir, *place, trust_remote_code=trust_remote_code)
    if train.needs_reference and reference is None:
        reference = (
            adapter_reference(engine) if train.reference_mode == "adapter" else colocated_reference(frozen_copy())
        )
    return engine, reference


def _cached_reference(
    frozen_copy: Callable[[], Any],
    train: TrainConfig,
    device: str,
    steps: Callable[[], Iterable[Sequence[Pair]]],
    pair_count: int,
    cache: str | None,
) -> Reference:
    """The reference's log-probs of every pair, from the cache or computed into it.

    They are computed in the same micro-batches as training, so that policy and reference agree to the bit at step 0
    (to rounding, where a cache is used again with other workers or another layout).
    """
    stored = None if cache is None else read_logprobs(cache, pair_count)
    is_stored = torch.tensor(int(stored is not None), device=device)
    distributed.all_reduce(is_stored, distributed.ReduceOp.MIN)  # another worker may have looked a moment earlier
    if stored is None or not is_stored:
        module = frozen_copy()
        planned = (micro_batch for pairs in steps() for micro_batch in plan_micro_batches(pairs, train, device))
        stored = compute_logprobs(
            colocated_reference(module), ((micro_batch.pairs, micro_batch.batch) for micro_batch in planned)
        )
        release_weights(module)
        if cache is not None:
            write_logprobs(cache, stored)
            distributed.barrier()
    return cached_reference(stored)
