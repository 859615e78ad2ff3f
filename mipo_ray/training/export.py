"""From a trained policy to a Hugging Face model directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mipo_ray.training.adapters import PlainWeight, merged_weight, plain_weights

# Weights, in any format a model directory may hold them: replaced by the export, never copied.
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt", ".onnx"}


def export_policy(engine: Any, source_dir: str | Path, output_dir: str | Path) -> None:
    """Writes the trained policy to `output_dir`: safetensors in the dtype of training, and all that belongs to it.

    `engine` is a DeepSpeed engine (or plain module) around `ResponseLogprobs`, or a transformers model itself. Every
    worker must call this together, since ZeRO stage 3 gathers the parameters one by one; rank 0 alone keeps them (on
    its CPU) and writes. Adapters are merged into what is written, which is a plain model; the engine's own weights stay
    as they are. Tokenizer, chat template and every other file that is not weights come from `source_dir`, the directory
    the policy was loaded from; config.json is written anew, with the dtype of the weights.
    """
    model = _transformers_model(engine)
    weights = _gathered_weights(model)
    if _rank() == 0:
        output = Path(output_dir)
        model.save_pretrained(output, state_dict=weights, max_shard_size="5GB")
        _copy_other_files(Path(source_dir), output)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _transformers_model(engine: Any) -> Any:
    module = getattr(engine, "module", engine)
    return module if hasattr(module, "save_pretrained") else module.model


def _gathered_weights(model: Any) -> dict[str, Tensor]:
    """Name -> whole tensor on the CPU, adapters merged; empty on every rank but 0. Tied weights share one tensor."""
    weights: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for weight in plain_weights(model):
        if id(weight.tensor) not in copies:
            copies[id(weight.tensor)] = _gathered(weight)
        weights[weight.name] = copies[id(weight.tensor)]
    return weights if _rank() == 0 else {}


def _gathered(weight: PlainWeight) -> Tensor:
    parts = [weight.tensor] if weight.adapter is None else [weight.tensor, weight.adapter.a, weight.adapter.b]
    sharded = [part for part in parts if hasattr(part, "ds_id")]
    if sharded:
        import deepspeed

        with deepspeed.zero.GatheredParameters(sharded):
            return _on_rank_0(weight)
    return _on_rank_0(weight)


def _on_rank_0(weight: PlainWeight) -> Tensor:
    if _rank() != 0:
        return torch.empty(0)
    tensor = weight.tensor if weight.adapter is None else merged_weight(weight.tensor, weight.adapter)
    return tensor.detach().to("cpu", copy=True).contiguous()


def _copy_other_files(source: Path, output: Path) -> None:
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        is_weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_dir() or is_weights or hidden or path.name == "config.json":
            continue
        (output / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, output / relative)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
