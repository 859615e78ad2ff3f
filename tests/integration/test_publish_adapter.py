"""A run's adapter in peft itself: beside its base it is the policy that the run exported.

python -m pytest tests/integration/test_publish_adapter.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mipo_ray.publish.__main__ import main
from tests.helpers.adapted_run import NAME, downloaded_model, make_adapted_run
from tests.helpers.stages import edit_manifest


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Iterator[Path]:
    with downloaded_model(tiny_model, tmp_path / "hub") as directory:
        yield directory


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    return make_adapted_run(base, tmp_path / "run")


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor([[5, 9, 17, 40, 3, 77]])).logits.float()


def test_base_and_adapter_are_the_policy(run: Path, base: Path, tmp_path: Path) -> None:
    """Two rounds of rank 2 make one adapter of rank 4, and its layers alone. What the merges rounded is all that is
    left: far less than what the rounds changed."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    assert main([str(run), "--to", "ada/adapter", "--dry-run", "--adapter", "--output", str(out)]) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, NAME)
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]
    assert not (out / "config.json").exists()
    assert not (out / "model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(base).chat_template

    first = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(first)
    policy = logits(AutoModelForCausalLM.from_pretrained(run / "rounds/001/train/policy", dtype=torch.float32))
    both = logits(PeftModel.from_pretrained(first, out))
    moved = (policy - before).abs().max()
    assert moved > 0.3
    assert (policy - both).abs().max() < 0.05 * moved

    card = (out / "README.md").read_text()
    assert "base_model: ada/tiny\nbase_model_relation: adapter" in card
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("ada/tiny"), "ada/adapter")' in card
    assert "vllm serve ada/tiny --enable-lora --max-lora-rank 8 --lora-modules mipo=ada/adapter" in card


def test_what_no_adapter_explains_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A policy that was edited by hand, or made by something else, must not be published as base and adapter."""
    from safetensors.torch import load_file, save_file

    weights = load_file(run / "rounds/001/train/policy/model.safetensors")
    options = [str(run), "--to", "ada/adapter", "--dry-run", "--adapter", "--output"]
    for name, expected in (
        ("model.layers.0.self_attn.q_proj.weight", "what was added to model.layers.0.self_attn.q_proj.weight is not"),
        ("model.norm.weight", "model.norm.weight of the policy is not what it was"),
    ):
        generator = torch.Generator().manual_seed(3)
        noise = 0.1 * torch.randn(weights[name].shape, generator=generator).to(weights[name].dtype)
        edited = weights | {name: weights[name] + noise}
        save_file(edited, run / "rounds/001/train/policy/model.safetensors", metadata={"format": "pt"})
        size = (run / "rounds/001/train/policy/model.safetensors").stat().st_size
        sizes = {"policy/model.safetensors": size}
        edit_manifest(run / "rounds/001/train/manifest.json", lambda facts, sizes=sizes: facts["files"].update(sizes))
        assert main([*options, str(tmp_path / name)]) == 2
        assert expected in capsys.readouterr().err
