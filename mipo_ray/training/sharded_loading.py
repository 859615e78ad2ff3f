"""A model at ZeRO stage 3, loaded so that no worker ever holds more of it than its own part and one parameter.

The files of the weights are mapped into memory, and not read. transformers loads the model from the maps, so that
names, conversions, casts, ties and buffers are its own; but one parameter after the other, and each is cut down to
this worker's part as soon as it has its value. Copying the part is what reads the file, and reads no more of it, except
where a parameter is cast or converted (experts that are stored one by one): each worker reads all of these, one at a
time. What was read of the maps is given back at once; it stays in the page cache alone, which a node's workers share.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mipo_ray.errors import UserError
from mipo_ray.models.directory import open_directory, read_header, weight_files
from mipo_ray.training.whole_checkpoints import gathered

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# transformers reads several tensors ahead in threads where this is not set.
_ONE_AFTER_THE_OTHER = "HF_DEACTIVATE_ASYNC_LOAD"
_COMPARED_BYTES = 64  # at the beginning and in the middle of each tensor


class MappedWeights:
    """The tensors of a model directory's safetensors as maps of the files: a page is read when it is first used."""

    def __init__(self, directory: str) -> None:
        """Maps all files; raises UserError for one that is cut, or has a dtype that torch has not."""
        listed = open_directory(directory)
        self.tensors: dict[str, Tensor] = {}
        """Name -> the whole tensor. Not to be written to."""
        self._maps: list[mmap.mmap] = []
        for file in weight_files(listed):
            header = read_header(listed, file)
            with (Path(listed.root) / file).open("rb") as opened:
                # Private: torch warns of memory that cannot be written to.
                mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            self._maps.append(mapped)
            data = 8 + int.from_bytes(mapped[:8], "little")
            for name, tensor in header.items():
                if (dtype := _DTYPES.get(tensor["dtype"])) is None:
                    raise UserError(
                        f"{listed.shown}/{file}: tensor {name}: expected a dtype of {', '.join(_DTYPES)}, found "
                        f"{tensor['dtype']!r}"
                    )
                start, end = tensor["data_offsets"]
                self.tensors[name] = _view(mapped, data + start, end - start, dtype).view(tensor["shape"])

    def give_back(self) -> None:
        """Takes what was read so far out of this process's memory; it is read again where it is used again."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def digest(self) -> str:
        """Names the weights by their names, shapes and a few bytes of each; two trainings of one model differ in it."""
        digest = sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            own_bytes = tensor.view(-1).view(torch.uint8)
            for start in (0, len(own_bytes) // 2):
                digest.update(own_bytes[start : start + _COMPARED_BYTES].numpy().tobytes())
        self.give_back()
        return digest.hexdigest()


def _view(mapped: mmap.mmap, start: int, size: int, dtype: torch.dtype) -> Tensor:
    """[numbers] of `size` bytes of a map."""
    if not size:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=size // dtype.itemsize, offset=start)


def load_own_part(model_dir: str, zero_config: Mapping[str, Any], dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The causal language model of `model_dir`, in evaluation mode, with every parameter that the files hold sharded.

    zero_config: what DeepSpeed is told, of ZeRO stage 3. The weights are those of `from_pretrained` in `dtype`, to the
    bit, and buffers are whole and on the CPU. Parameters that the files lack are whole, too, with random numbers. All
    workers must call this together.

    Raises UserError, on every worker, where they have different weights in `model_dir`, each on its own node.
    """
    import deepspeed
    from transformers import AutoModelForCausalLM

    weights = MappedWeights(model_dir)
    sharding = deepspeed.zero.Init(config_dict_or_path=dict(zero_config), dtype=dtype)  # also chooses the worker's GPU
    _check_all_have_the_same(model_dir, weights)
    compared: set[str] = set()  # tied parameters that transformers compares when all are there

    def keep_own_part(model: Any, name: str) -> None:
        place, _, own_name = name.rpartition(".")
        value = getattr(model.get_submodule(place), own_name)
        if value.is_meta:  # of another shape than that in the files: transformers has left it
            return
        if not isinstance(value, nn.Parameter):
            value.data = value.clone()  # a buffer; the map of the file goes
        elif name in _both_there(model, weights.tensors):
            compared.add(name)
        else:
            _shard(sharding, value)
        weights.give_back()

    empty = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, device_map="meta"
    )
    with _told_of_each_parameter(keep_own_part):
        model = type(empty).from_pretrained(None, config=empty.config, state_dict=weights.tensors, dtype=dtype).eval()
    # What transformers takes from the directory's name alone.
    model.generation_config = empty.generation_config
    model.name_or_path = model.config.name_or_path = model_dir
    for name in sorted(compared):
        parameter = model.get_parameter(name)
        if not hasattr(parameter, "ds_id"):
            _shard(sharding, parameter)
    weights.give_back()
    return model


def _shard(sharding: Any, parameter: nn.Parameter) -> None:
    """As DeepSpeed does it, without the broadcast of all of it from the first worker: every worker has its value."""
    sharding._convert_to_deepspeed_param(parameter)
    parameter.partition()  # type: ignore[attr-defined]
    parameter.data = parameter.data.to(sharding.local_device)  # empty by now


def _both_there(model: Any, tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of parameters that the model ties to others which the files hold as well."""
    return {name for tie in model.all_tied_weights_keys.items() if set(tie) <= tensors.keys() for name in tie}


def _check_all_have_the_same(model_dir: str, weights: MappedWeights) -> None:
    if len(set(gathered(weights.digest()))) > 1:
        raise UserError(
            f"{model_dir}: expected the same weights on the nodes of all training workers, found different ones: a "
            "model that changed while they fetched it needs a revision, or a directory that nobody writes to"
        )


@contextlib.contextmanager
def _told_of_each_parameter(told: Callable[[Any, str], None]) -> Iterator[None]:
    """Inside it transformers loads one parameter or buffer after the other; `told(model, name)` follows on each."""
    from transformers import core_model_loading

    set_value = core_model_loading.set_param_for_module
    before = os.environ.get(_ONE_AFTER_THE_OTHER)

    def set_and_tell(model: Any, name: str, *arguments: Any, **options: Any) -> None:
        set_value(model, name, *arguments, **options)
        told(model, name)

    instead: Any = set_and_tell
    core_model_loading.set_param_for_module = instead
    os.environ[_ONE_AFTER_THE_OTHER] = "1"
    try:
        yield
    finally:
        core_model_loading.set_param_for_module = set_value
        if before is None:
            del os.environ[_ONE_AFTER_THE_OTHER]
        else:
            os.environ[_ONE_AFTER_THE_OTHER] = before
