"""The files of an exported policy at ZeRO stage 3: gathered and written one after the other, so that no worker ever
holds more of the policy than one of them.

Which tensor goes into which file is planned from shapes alone, by the same functions by which transformers saves a
model, on every worker alike: gathering a parameter takes all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mipo_ray.training.adapters import PlainWeight
from mipo_ray.training.export_check import WHOLE_BYTES, ExportDiffers, check_file, checksum
from mipo_ray.training.whole_checkpoints import gathered

# From a weight to all of it on the CPU of the first worker, adapters merged, or to the error that it met there. Every
# worker calls it.
Gather = Callable[[PlainWeight], Tensor | Exception]
_PATTERN = "model{suffix}.safetensors"
_NUMBERED = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class PlannedFile:
    """One file of weights: the names of its tensors, and the weights of the model that they are made of."""

    name: str
    tensors: tuple[str, ...]
    sources: tuple[str, ...]


def plan_files(model: Any, weights: Sequence[PlainWeight], most_bytes: int | str) -> list[PlannedFile] | None:
    """The files that `save_pretrained` makes of these weights, each of `most_bytes` at most where a tensor allows it.

    None where a tensor of the files is made of several weights of the model together.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from transformers.core_model_loading import revert_weight_conversion

    shapes = {weight.name: _shape(weight) for weight in weights}
    kept = _saved(model, weights)
    stored = revert_weight_conversion(model, {name: shapes[name] for name in kept})
    source_of: dict[str, str] = {}
    for name in kept:
        try:
            alone = revert_weight_conversion(model, {name: shapes[name]})
        except Exception:  # whatever a conversion that misses a weight comes to raise
            return None
        if any(key not in stored or stored[key].shape != tensor.shape for key, tensor in alone.items()):
            return None
        source_of |= dict.fromkeys(alone, name)
    if source_of.keys() != stored.keys():
        return None
    split = split_torch_state_dict_into_shards(stored, filename_pattern=_PATTERN, max_shard_size=most_bytes)
    return [
        PlannedFile(file, tuple(tensors), tuple(dict.fromkeys(source_of[tensor] for tensor in tensors)))
        for file, tensors in split.filename_to_tensors.items()
    ]


def write_files(
    model: Any, weights: Sequence[PlainWeight], files: Sequence[PlannedFile], gather: Gather, output: Path
) -> dict[str, str | None]:
    """Writes the files, and their index where there are several, and reads each back; every worker must call this.

    Returns, to the first worker alone and of a model of WHOLE_BYTES at most, the `checksum` of every weight, by all
    names that it has (None: it is in no file).
    Raises what the first worker met, on all: ExportDiffers where a file does not hold what was written.
    """
    by_name = {weight.name: weight for weight in weights}
    is_small = sum(_shape(weight).nbytes for weight in weights) <= WHOLE_BYTES
    sums: dict[int, str] = {}  # by the id of the model's own tensor, which tied weights share
    for file in files:
        stored: dict[str, Tensor] = {}
        failure = None
        for name in file.sources:
            tensor = gather(by_name[name])
            if isinstance(tensor, Exception):
                failure = failure or tensor
            elif _is_first() and failure is None:
                try:
                    if is_small:
                        sums[id(by_name[name].tensor)] = checksum(tensor)
                    stored |= _as_stored(model, name, tensor, file)
                except Exception as error:  # the others would wait for ever, here and below
                    failure = error
            del tensor
        if _is_first() and failure is None:
            try:
                _write_file(stored, file, output)
                if file is files[-1]:
                    _write_index(weights, files, output)
            except Exception as error:
                failure = error
        if (met := gathered(failure)[0]) is not None:
            raise met
    return {weight.name: sums.get(id(weight.tensor)) for weight in weights} if _is_first() and is_small else {}


def _as_stored(model: Any, name: str, tensor: Tensor, file: PlannedFile) -> dict[str, Tensor]:
    """What a weight becomes in the files, by name; of that what goes into this one."""
    from transformers.core_model_loading import revert_weight_conversion

    made = revert_weight_conversion(model, {name: tensor})
    return {key: value.contiguous() for key, value in made.items() if key in file.tensors}


def _write_file(stored: dict[str, Tensor], file: PlannedFile, output: Path) -> None:
    from safetensors.torch import save_file

    output.mkdir(parents=True, exist_ok=True)
    if missing := set(file.tensors) - stored.keys():
        raise ExportDiffers(f"{output}/{file.name}: expected tensors as planned, lacking {min(missing)}")
    save_file(stored, output / file.name, metadata={"format": "pt"})
    check_file(stored, output / file.name)


def _write_index(weights: Sequence[PlainWeight], files: Sequence[PlannedFile], output: Path) -> None:
    """As transformers writes it; files of another export that was there go."""
    names = {file.name for file in files}
    for path in output.iterdir():
        if _NUMBERED.fullmatch(path.name) and path.name not in names:
            path.unlink()
    index_file = output / "model.safetensors.index.json"
    if len(files) == 1:
        index_file.unlink(missing_ok=True)
        return
    unique = {id(weight.tensor): _shape(weight) for weight in weights if isinstance(weight.tensor, nn.Parameter)}
    facts = {
        "total_parameters": sum(shape.numel() for shape in unique.values()),
        "total_size": sum(_bytes_of(output / name) for name in names),
    }
    index = {"metadata": facts, "weight_map": {tensor: file.name for file in files for tensor in file.tensors}}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    index_file.write_text(text, encoding="utf-8")


def _bytes_of(file: Path) -> int:
    """Of the tensors of a file: all of it but the header, and the 8 bytes that say how long that is."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def _saved(model: Any, weights: Sequence[PlainWeight]) -> list[str]:
    """The names that are saved: of tied weights one, and none that the model says to leave out."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    stand_ins: dict[int, Tensor] = {}
    named = {weight.name: stand_ins.setdefault(id(weight.tensor), torch.empty(1)) for weight in weights}
    for name in model._keys_to_ignore_on_save or ():
        named.pop(name, None)
    return list(remove_tied_weights_from_state_dict(named, model))


def _shape(weight: PlainWeight) -> Tensor:
    """The whole weight without its values, also where this worker has a part of it."""
    shape = getattr(weight.tensor, "ds_shape", weight.tensor.shape)
    return torch.empty(shape, dtype=weight.tensor.dtype, device="meta")


def _is_first() -> bool:
    return torch.distributed.get_rank() == 0
