"""A run with LoRA whose first model is of the Hub: made without an engine, and merged as a run merges its adapters."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mipo_ray.config.recipe import load_config
from mipo_ray.config.train import LoraConfig
from tests.helpers.paired_runs import make_pair, make_run
from tests.helpers.stages import commit, edit_manifest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "ada/tiny"


@contextlib.contextmanager
def downloaded_model(model: Path, cache: Path) -> Iterator[Path]:
    """While the block runs, the model lies where the Hub's client keeps what it has downloaded, under NAME."""
    import huggingface_hub.constants

    place = cache / "models--ada--tiny"
    shutil.copytree(model, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(COMMIT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield place / "snapshots" / COMMIT


def make_adapted_run(base: Path, directory: Path) -> Path:
    """A run of two rounds, in bfloat16: each puts an adapter of rank 2 on the policy before it, and merges it."""
    options = (f"model.path={NAME}", "train.lora.rank=2", "train.lora.target_modules=[q_proj, down_proj]")
    run = make_run(directory, [[make_pair(1)], [make_pair(2)]], *options)
    config = load_config(None, [f"run_dir={directory}", "rounds=2", *options])
    source = base
    for number in (0, 1):
        manifest = directory / f"rounds/{number:03d}/generate/manifest.json"
        edit_manifest(manifest, lambda facts: facts.update(policy_commit=COMMIT))
        source = _train(source, directory / f"rounds/{number:03d}/train/policy", config.train.lora, seed=number)
        commit(run, f"rounds/{number:03d}/train", config)
    return directory


def _train(source: Path, output: Path, lora: LoraConfig, *, seed: int) -> Path:
    """A policy whose adapters moved, merged as a run merges them."""
    import torch
    from transformers import AutoModelForCausalLM

    from mipo_ray.training.adapters import merged_weight, plain_weights, with_adapters

    shutil.copytree(source, output)
    torch.manual_seed(seed)
    model = with_adapters(AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16), lora)
    merged = {}
    for weight in plain_weights(model):
        if weight.adapter is None:
            merged[weight.name] = weight.tensor
        else:
            torch.nn.init.normal_(weight.adapter.b, std=0.05)
            merged[weight.name] = merged_weight(weight.tensor, weight.adapter)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    plain.load_state_dict(merged)
    plain.save_pretrained(output)
    return output
