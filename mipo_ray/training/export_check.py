"""An exported policy is loaded back before anyone relies on it: files, configuration, weights and a log-prob."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mipo_ray.errors import UserError
from mipo_ray.models.directory import open_directory, weight_files
from mipo_ray.models.one_model import check_one_model
from mipo_ray.training.agreement import Comparison, bound_for
from mipo_ray.training.layout import Tree, lay_out
from mipo_ray.training.logprobs import response_logprobs

# Up to this size the export is loaded whole, as whoever uses it will load it. Above it every tensor is compared by its
# name in the files, one at a time, so that no machine needs the memory of two large models.
WHOLE_BYTES = 4 * 1024**3
# What a configuration says about how it was loaded, not about the model.
_NOT_THE_MODEL = ("dtype", "torch_dtype", "_name_or_path", "transformers_version", "_attn_implementation")
_OLDER = (
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "rotary_pct",
    "rotary_emb_base",
    "rope_local_base_freq",
)


class ExportDiffers(RuntimeError):
    """What was written is not the policy that was trained."""


def check_export(model: Any, weights: Mapping[str, Tensor], source: Path, output: Path) -> None:
    """Raises ExportDiffers where `output` does not hold the policy `model`, with these plain `weights`.

    source: the directory that it was trained from. Every tensor must come back to the bit, the configuration as it was,
    and, of a model of WHOLE_BYTES at most whose weights are not sharded, a probe's log-prob.
    """
    check_directory(model, source, output)
    unique = {tensor.data_ptr(): tensor for tensor in weights.values()}
    if sum(tensor.nbytes for tensor in unique.values()) > WHOLE_BYTES:
        _check_by_name(weights, output)
        return
    loaded = _check_whole(model, output, {name: functools.partial(torch.equal, weights[name]) for name in weights})
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        _check_probe(model, loaded, output)


def check_directory(model: Any, source: Path, output: Path) -> None:
    """Raises ExportDiffers where `output` is not one model of the configuration of `source`, with every tensor once."""
    try:
        directory = open_directory(str(output))
        check_one_model(directory, weight_files(directory), are_all_read=True)
    except UserError as error:
        raise ExportDiffers(f"{output}: the exported policy cannot be used: {error}") from error
    if not is_same_configuration(type(model.config), source, output):
        raise ExportDiffers(f"{output}/config.json: expected the configuration of {source}, found another model's")
    _check_names(type(model), output)


def check_file(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raises ExportDiffers where a file of weights does not hold these tensors, to the bit, and no other."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as found:
        if different := set(found.keys()) ^ tensors.keys():
            raise ExportDiffers(f"{file}: expected the tensors that were written, found other ones: {min(different)}")
        for name, tensor in tensors.items():
            if not torch.equal(found.get_tensor(name), tensor):
                raise ExportDiffers(f"{file}: tensor {name}: expected the trained values, found other ones")


def check_sums(model: Any, sums: Mapping[str, str | None], output: Path) -> None:
    """Raises ExportDiffers where a policy, loaded whole, has a weight with another sum than `checksum` gave it before
    it was written (None: it was not written)."""

    def is_same(expected: str | None, found: Tensor) -> bool:
        return expected is None or checksum(found) == expected

    _check_whole(model, output, {name: functools.partial(is_same, expected) for name, expected in sums.items()})


def checksum(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor on the CPU, in hex."""
    return sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _check_whole(model: Any, output: Path, tests: Mapping[str, Callable[[Tensor], bool]]) -> Any:
    """The model of `output`, each of whose tensors has passed its test."""
    loaded = type(model).from_pretrained(output, dtype=model.dtype, use_safetensors=True).eval()
    found = loaded.state_dict()
    different = [name for name, is_same in tests.items() if name not in found or not is_same(found[name])]
    if different or len(found) != len(tests):
        named = ", ".join(different[:3]) or f"{len(found)} tensors instead of {len(tests)}"
        raise ExportDiffers(f"{output}: expected the trained weights, found other ones: {named}")
    return loaded


def is_same_configuration(config_class: Any, source: Path, output: Path) -> bool:
    """Whether transformers reads the same model out of the config.json of both directories."""
    first, second = (_model_facts(config_class.from_pretrained(directory)) for directory in (source, output))
    # An older field that one of them lacks is repeated in `rope_parameters`, which both have.
    in_both = first.keys() & second.keys()
    names = in_both | {name for name in first.keys() ^ second.keys() if name not in _OLDER}
    return all(first.get(name) == second.get(name) for name in names)


def _model_facts(config: Any) -> dict[str, Any]:
    """What a configuration says about the model, every fact under one name."""
    found = {name: value for name, value in config.to_dict().items() if value is not None}
    facts = {name: value for name, value in found.items() if name not in _NOT_THE_MODEL}
    if isinstance(rope := facts.get("rope_parameters"), dict) and "rope_type" in rope:
        facts["rope_parameters"] = {name: value for name, value in rope.items() if name != "type"}
    return facts


def _check_names(model_class: Any, output: Path) -> None:
    """Every tensor that the model has is in the files with its shape, and no other; no data is read."""
    _, facts = model_class.from_pretrained(
        output, use_safetensors=True, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, facts[what])):
            raise ExportDiffers(
                f"{output}: expected every tensor of the model once, found {what}: {', '.join(names[:3])}"
            )


def _check_by_name(weights: Mapping[str, Tensor], output: Path) -> None:
    """The tensors that lie in the files under the model's own names; experts that are stored one by one do not."""
    from safetensors import safe_open

    for file in sorted(output.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # no mapping: it has keys() alone
                if name in weights and not torch.equal(tensors.get_tensor(name), weights[name]):
                    raise ExportDiffers(f"{file}: tensor {name}: expected the trained values, found other ones")


def _check_probe(model: Any, loaded: Any, output: Path) -> None:
    """A few tokens through both models, each by its own attention, as an evaluation would score them."""
    ids = np.arange(24) % min(24, model.config.get_text_config().vocab_size)
    tree = Tree(ids[:8], (ids[8:],))
    is_packed = model.config._attn_implementation not in ("sdpa", "eager")
    with torch.no_grad():
        trained = response_logprobs(model, lay_out([tree], "packed" if is_packed else "padded").to(model.device))
        read_back = response_logprobs(loaded, lay_out([tree], "padded"))
    probe = Comparison("a probe", len(tree.responses[0]), float(trained), float(read_back))
    if bound_for(model, model.device).excess(probe) > 1:
        raise ExportDiffers(
            f"{output}: a probe of {probe.tokens} tokens has a log-prob of {probe.sampler:.4f} in the trained policy, "
            f"of {probe.trainer:.4f} in the export"
        )
