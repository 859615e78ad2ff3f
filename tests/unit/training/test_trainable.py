"""What a model cannot be trained with is found without its weights, and weights that it lacks by their headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mipo_ray.config.train import TrainConfig
from mipo_ray.errors import UserError
from mipo_ray.training.trainable import check_trainable
from tests.helpers.tiny_families import tiny_model


def check(directory: Path, layout: str = "padded") -> None:
    check_trainable(str(directory), TrainConfig(layout=layout), trust_remote_code=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lost", "found"),
    [
        ("lm_head.weight", "lm_head.weight, which LlamaForCausalLM needs, are not in its weights"),
        ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight, which"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_weights_that_are_not_there_are_named(lost: str, found: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    check(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=found):
        check(tmp_path)


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {"lm_head.weight": torch.zeros(5, 32)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        check(tmp_path)


def test_a_family_that_transformers_does_not_know_is_named(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "no_such_family"}))
    with pytest.raises(UserError, match=r"transformers cannot make a language model of it: .*no_such_family"):
        check(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", []), ("hidden_act", {}), ("num_attention_heads", 0), ("vocab_size", 0), ("use_cache", "x" * 5000)],
)
def test_values_that_transformers_stumbles_over_are_one_line_and_no_traceback(
    field: str, value: object, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError, match=r"transformers cannot make a language model of it: ") as refused:
        check(tmp_path)
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_a_family_without_attention_is_refused_by_name(layout: str, tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="MambaForCausalLM"):
        check(tmp_path, layout)
