"""LoRA adapters, by peft: put into a model in place, switched off for its base, and merged into plain weights.

Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685, equation 3) adds to a frozen weight W a trained product of two
thin matrices: W + (alpha / rank) B A. B starts at zero, so that the model starts as its base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, addmm, nn

from mipo_ray.config.train import LoraConfig
from mipo_ray.errors import UserError

ALL_LINEAR = "all-linear"
_NAME = "default"  # of the only adapter a layer has, to peft
_BASE = "base_layer."  # where peft's layer keeps the layer it stands for


@dataclass(frozen=True)
class Adapter:
    """The trained update of one weight; its tensors are those of the model, not copies."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scaling: float  # alpha / rank
    weight_is_transposed: bool  # the weight is [in, out], as in GPT-2, and not [out, in]


@dataclass(frozen=True)
class PlainWeight:
    """One entry of the state dict that the model would have without adapters."""

    name: str
    tensor: Tensor  # the model's own, not a copy: the base weight where there is an adapter
    adapter: Adapter | None


def with_adapters(model: Any, lora: LoraConfig) -> Any:
    """Puts an adapter on the targeted linear layers of a transformers causal language model, in place; returns it.

    Afterwards only the adapters require gradients. They have the dtype and device of the layer they adapt, no dropout,
    and random numbers of torch's global generator. The model's class, head and backbone stay what they were.

    A target is the name of a layer, or the end of one after a dot: "q_proj", "self_attn.q_proj". Experts that a model
    keeps as one tensor are no linear layers and get no adapters.

    Raises UserError for targets that are no linear layer of the model, or its output head.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    names = targeted_layers(model, lora.target_modules)
    # peft gets the model in a box, and names of single layers. Shown a model of experts, it would read "gate_proj" of a
    # dense or shared layer as an old name for the tensor of all experts, and adapt that one.
    box = nn.ModuleDict({"model": model})
    config = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft only divides it by the rank
        lora_dropout=0.0,
        target_modules=[f"model.{name}" for name in names],
        fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
    )
    inject_adapter_in_model(config, box, adapter_name=_NAME)
    return model


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Inside it, a model of `with_adapters` is its base model, to the bit.

    Gradients of a forward pass made before may be computed afterwards, but not inside it.

    Raises ValueError for a model that has no adapters.
    """
    layers = _adapted_layers(model).values()
    if not layers:
        raise ValueError(f"{type(model).__name__}: expected a model with adapters, found none")
    on = [layer for layer in layers if not layer.disable_adapters]
    try:
        for layer in on:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in on:
            layer.enable_adapters(True)


def plain_weights(model: Any) -> Iterator[PlainWeight]:
    """The entries of the model's state dict, in order and under the names they have without adapters.

    A model that never had adapters gives its state dict. Tied weights come under each of their names.
    """
    layers = _adapted_layers(model)
    # From a name in the state dict to the one without peft; None for the adapters themselves.
    plain_names: dict[str, str | None] = {}
    adapters: dict[str, Adapter] = {}
    for layer_name, layer in layers.items():
        for key in layer.state_dict(keep_vars=True):
            is_base = key.startswith(_BASE)
            plain_names[f"{layer_name}.{key}"] = f"{layer_name}.{key.removeprefix(_BASE)}" if is_base else None
        adapters[f"{layer_name}.{_BASE}weight"] = Adapter(
            a=layer.lora_A[_NAME].weight,
            b=layer.lora_B[_NAME].weight,
            scaling=layer.scaling[_NAME],
            weight_is_transposed=layer.fan_in_fan_out,
        )
    for name, tensor in model.state_dict(keep_vars=True).items():
        plain_name = plain_names.get(name, name)
        if plain_name is not None:
            yield PlainWeight(plain_name, tensor, adapters.get(name))


def merged_weight(weight: Tensor, adapter: Adapter) -> Tensor:
    """W + (alpha / rank) B A: a new tensor, detached, computed in float32 and rounded once to the dtype of `weight`.

    All three must be whole: inside `deepspeed.zero.GatheredParameters` at ZeRO stage 3. peft's own `get_delta_weight`
    rounds the product to the adapter's dtype before the sum, which in bfloat16 is one rounding more.
    """
    a, b = adapter.a.detach().float(), adapter.b.detach().float()
    left, right = (a.T, b.T) if adapter.weight_is_transposed else (b, a)
    return addmm(weight.detach().float(), left, right, alpha=adapter.scaling).to(weight.dtype)


def targeted_layers(model: Any, targets: tuple[str, ...]) -> list[str]:
    """Full names of the layers that get adapters, in the model's order; raises UserError as `with_adapters` does."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linear = [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    unknown = [target for target in targets if not any(_is_target(name, target) for name in linear)]
    if unknown or not targets:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
        raise UserError(
            f"train.lora.target_modules: expected {ALL_LINEAR} or names of linear layers of {type(model).__name__} "
            f"other than its output head ({known}), found {', '.join(map(repr, unknown)) or 'nothing'}"
        )
    return [name for name in linear if any(_is_target(name, target) for target in targets)]


def _is_target(name: str, target: str) -> bool:
    return target == ALL_LINEAR or name == target or name.endswith(f".{target}")


def _adapted_layers(model: Any) -> dict[str, Any]:
    """Name -> peft's layer, of every layer that has an adapter."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
