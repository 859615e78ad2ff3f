"""A LoRA adapter of a run: what its rounds added to the model that the run began with, in peft's files.

Each round trains an adapter on the policy before it and exports the two merged. What all rounds added to a weight has
at most the rank of their adapters together, so that it is two thin matrices again: those of its singular value
decomposition (Eckart and Young 1936), which are computed here and compared with the policy that the run exported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mipo_ray.errors import UserError
from mipo_ray.models.source import local_model_directory
from mipo_ray.publish.model_card import base_on_hub
from mipo_ray.publish.policy import Policy
from mipo_ray.training.adapters import targeted_layers

_OVERSAMPLING = 8  # directions more than are kept, with power iterations: Halko, Martinsson and Tropp 2011
_ITERATIONS = 4
_OWN_ERROR = 1e-5  # of the decomposition, in units of the change's own size


@dataclass(frozen=True)
class _Change:
    """What was added to the weight of a layer, as b @ a: [out, rank] and [rank, in] in float32, as peft has them."""

    layer: str
    a: Tensor
    b: Tensor


def write_adapter(policy: Policy, folder: Path) -> int:
    """Writes adapter_config.json and adapter_model.safetensors; returns the adapter's rank.

    Raises UserError for a run that trained whole weights, for one whose first model nobody else could load, and where
    the policy is not its first model and an adapter.
    """
    from peft import LoraConfig, TaskType
    from safetensors.torch import save_file

    lora = policy.config.train.lora
    if not lora.rank:
        raise UserError("--adapter: this run trained whole weights (train.lora.rank=0): publish it without --adapter")
    base = base_on_hub(policy)
    if base is None:
        raise UserError(
            f"--adapter: an adapter needs its base, and {policy.config.model.path} is no model that a run brought from "
            "the Hub: publish the whole model, without --adapter"
        )
    rank = lora.rank * len(policy.trained)
    tensors: dict[str, Tensor] = {}
    changes = list(_changes(policy, rank))
    for change in changes:
        tensors[f"base_model.model.{change.layer}.lora_A.weight"] = change.a
        tensors[f"base_model.model.{change.layer}.lora_B.weight"] = change.b
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=rank,  # the whole scale is in the matrices
        lora_dropout=0.0,
        target_modules=sorted({change.layer.rpartition(".")[2] for change in changes}),
        base_model_name_or_path=base,
        revision=policy.config.model.revision,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return rank


def _changes(policy: Policy, rank: int) -> Iterator[_Change]:
    """The change of every layer that the run's adapters were on; raises UserError where anything else differs."""
    config = policy.config
    # A run's configuration is no word of the user's to run the code that comes with a model.
    before = local_model_directory(config.model.source)
    after = local_model_directory(policy.run.model_path(policy.directory))
    old, new = _Weights(before), _Weights(after)
    model = _without_weights(after)
    layers = {f"{name}.weight": name for name in targeted_layers(model, config.train.lora.target_modules)}
    for name in new.names:
        weight = new.read(name)
        found = old.read(name).to(weight.dtype) if name in old.names else None
        if name in layers and found is not None:
            is_transposed = type(model.get_submodule(layers[name])).__name__ == "Conv1D"
            difference = weight.float() - found.float()
            if is_transposed:
                difference = difference.T
            change = _decomposed(layers[name], difference, rank)
            left = torch.linalg.norm(difference - change.b @ change.a)
            rounding = (len(policy.trained) + 1) * torch.finfo(weight.dtype).eps * torch.linalg.norm(weight.float())
            if left > rounding + _OWN_ERROR * torch.linalg.norm(difference):
                raise UserError(
                    f"--adapter: what was added to {name} is not of rank {rank}: {left:.3g} is left of it, of which "
                    f"rounding explains {rounding:.3g}; publish the whole model, without --adapter"
                )
            yield change
        elif found is None or not torch.equal(found, weight):
            raise UserError(f"--adapter: {name} of the policy is not what it was, and no adapter was on it")


def _decomposed(layer: str, difference: Tensor, rank: int) -> _Change:
    """The matrices of a difference [out, in], filled up with zeros where a layer is smaller than the rank."""
    kept = min(rank, *difference.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(difference, q=min(kept + _OVERSAMPLING, *difference.shape), niter=_ITERATIONS)
    root = s[:kept].clamp_min(0).sqrt()
    missing = rank - kept
    return _Change(
        layer,
        a=torch.nn.functional.pad((v[:, :kept] * root).T, (0, 0, 0, missing)).contiguous(),
        b=torch.nn.functional.pad(u[:, :kept] * root, (0, missing)).contiguous(),
    )


class _Weights:
    """The tensors of a model directory, read one by one."""

    def __init__(self, directory: str) -> None:
        from safetensors import safe_open

        files = sorted(Path(directory).glob("*.safetensors"))
        self._files = [safe_open(file, framework="pt") for file in files]
        self.names = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118  (it is no dict)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        tensor: Tensor = self.names[name].get_tensor(name)
        return tensor


def _without_weights(directory: str) -> Any:
    """The model's modules, of no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
