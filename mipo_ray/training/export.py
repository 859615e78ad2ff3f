"""From a trained policy to a Hugging Face model directory."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mipo_ray.models.rope import with_older_rope_fields
from mipo_ray.training.adapters import PlainWeight, merged_weight, plain_weights
from mipo_ray.training.export_check import check_directory, check_export, check_sums, is_same_configuration
from mipo_ray.training.sharded_export import plan_files, write_files

MOST_BYTES = "5GB"  # of a file of weights
# Weights, in any format a model directory may hold them: replaced by the export, never copied.
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt", ".onnx"}


def export_policy(engine: Any, source_dir: str | Path, output_dir: str | Path) -> None:
    """Writes the trained policy to `output_dir`: safetensors in the dtype of training, and all that belongs to it.

    `engine` is a DeepSpeed engine (or plain module) around `ResponseLogprobs`, or a transformers model itself. Every
    worker must call this together, since ZeRO stage 3 gathers the parameters one by one; rank 0 alone keeps them (on
    its CPU) and writes: there of one file at a time, else all of them. Adapters are merged into what is written, which
    is a plain model; the engine's own weights stay as they are. Tokenizer, chat template and every other file that is
    not weights come from `source_dir`, the directory the policy was loaded from, byte for byte; config.json too, but
    for the dtype of the weights and, where it has none, the rotary fields that transformers 4 reads.

    The export is loaded back before this returns. Raises ExportDiffers, on every worker, where it is not the policy.
    """
    model = _transformers_model(engine)
    source, output = Path(source_dir), Path(output_dir)
    weights = list(plain_weights(model))
    is_sharded = any(hasattr(weight.tensor, "ds_id") for weight in weights)
    files = plan_files(model, weights, MOST_BYTES) if is_sharded else None
    if files is None:
        whole, failure = _gathered_weights(weights)
        _on_first(lambda: _write_whole(model, whole, source, output), failure)
    else:
        sums = write_files(model, weights, files, _gathered, output)
        _on_first(lambda: _complete(model, sums, source, output), None)


def _on_first(write: Callable[[], None], met: Exception | None) -> None:
    """Has rank 0 alone write, unless it met an error before; raises what it met on every worker: the others would wait
    for ever."""
    failure = [met]
    if _rank() == 0 and met is None:
        try:
            write()
        except Exception as error:
            failure = [error]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


def _write_whole(model: Any, weights: dict[str, Tensor], source: Path, output: Path) -> None:
    # It empties the dictionary that it is given.
    model.save_pretrained(output, state_dict=dict(weights), max_shard_size=MOST_BYTES)
    if not (source / "generation_config.json").exists():
        (output / "generation_config.json").unlink(missing_ok=True)  # transformers made one up
    _write_other_files(model, source, output)
    check_export(model, weights, source, output)


def _complete(model: Any, sums: Mapping[str, str | None], source: Path, output: Path) -> None:
    """Makes a model directory of the files of weights, whose sums are known of a small model."""
    _write_other_files(model, source, output)
    check_directory(model, source, output)
    if sums:
        check_sums(model, sums, output)


def _write_other_files(model: Any, source: Path, output: Path) -> None:
    _copy_other_files(source, output)
    text = _with_dtype((source / "config.json").read_text(encoding="utf-8"), str(model.dtype).removeprefix("torch."))
    config_file = output / "config.json"
    config_file.write_text(with_older_rope_fields(text), encoding="utf-8")
    if not is_same_configuration(type(model.config), source, output):
        config_file.write_text(text, encoding="utf-8")  # rather unread by transformers 4 than misread by 5


def _with_dtype(text: str, dtype: str) -> str:
    """A config.json that says of which dtype the weights are, where it said so before, and is else kept to the byte."""
    return re.sub(r'("(?:torch_)?dtype"\s*:\s*)(?:"[^"]*"|null)', rf'\g<1>"{dtype}"', text)


def _transformers_model(engine: Any) -> Any:
    module = getattr(engine, "module", engine)
    return module if hasattr(module, "save_pretrained") else module.model


def _gathered_weights(plain: Sequence[PlainWeight]) -> tuple[dict[str, Tensor], Exception | None]:
    """Name -> whole tensor on the CPU, adapters merged; empty on every rank but 0. Tied weights share one tensor.

    With it, on rank 0, the first error that kept it from having one.
    """
    copies: dict[int, Tensor | Exception] = {}
    for weight in plain:
        if id(weight.tensor) not in copies:
            copies[id(weight.tensor)] = _gathered(weight)
    failure = next((found for found in copies.values() if isinstance(found, Exception)), None)
    if failure is not None or _rank() != 0:
        return {}, failure
    whole = {key: found for key, found in copies.items() if isinstance(found, Tensor)}
    return {weight.name: whole[id(weight.tensor)] for weight in plain}, None


def _gathered(weight: PlainWeight) -> Tensor | Exception:
    """The whole weight on rank 0, or what it met there: other ranks go on to gather the next, and it must as well."""
    parts = [weight.tensor] if weight.adapter is None else [weight.tensor, weight.adapter.a, weight.adapter.b]
    sharded = [part for part in parts if hasattr(part, "ds_id")]
    if sharded:
        import deepspeed

        with deepspeed.zero.GatheredParameters(sharded):
            return _on_rank_0(weight)
    return _on_rank_0(weight)


def _on_rank_0(weight: PlainWeight) -> Tensor | Exception:
    if _rank() != 0:
        return torch.empty(0)
    try:
        tensor = weight.tensor if weight.adapter is None else merged_weight(weight.tensor, weight.adapter)
        return tensor.detach().to("cpu", copy=True).contiguous()
    except Exception as error:  # no memory, for one
        return error


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
