"""An export is the source with other weights: every other byte is kept, older fields are added, and it is read back.

python -m pytest tests/unit/training/test_export.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from mipo_ray.models.rope import with_older_rope_fields
from mipo_ray.training.export import export_policy
from mipo_ray.training.export_check import ExportDiffers, check_export
from tests.helpers.tiny_families import tiny_model

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "LICENSE")


def source_of(model: Any, directory: Path, config: str | None = None) -> Path:
    """A model directory around `model` whose config.json is this text (default: as transformers writes it)."""
    directory.mkdir()
    model.config.save_pretrained(directory)
    if config is not None:
        (directory / "config.json").write_text(config, encoding="utf-8")
    for number, name in enumerate(COMPANIONS):
        (directory / name).write_bytes(f'{{"odd":   {number},\r\n "spaces": "é"}}\n'.encode())
    return directory


OLDER = {
    "plain": {"rope_theta": 500000.0},
    "scaled": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "linear by its old name": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
}


@pytest.mark.parametrize("case", OLDER)
def test_a_source_that_transformers_4_wrote_is_kept_to_the_byte(case: str, tmp_path: Path) -> None:
    fields = {"model_type": "llama", "torch_dtype": "float32", "vocab_size": 128, "hidden_size": 32}
    sizes = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text = json.dumps(fields | sizes | OLDER[case], indent=3) + "\n\n"
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(text)
    config = AutoConfig.from_pretrained(tmp_path / "config")
    model = type(tiny_model())(config)
    source = source_of(model, tmp_path / "source", text)
    (source / "generation_config.json").write_bytes(b'{"eos_token_id":  [1,\t2]}')
    export_policy(model, source, tmp_path / "out")
    for name in ("config.json", "generation_config.json", *COMPANIONS):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    # What was not there is not made up.
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.safetensors"} | {
        file.name for file in source.iterdir()
    }


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_alone_changes(key: str, tmp_path: Path) -> None:
    model = tiny_model().bfloat16()
    text = json.dumps({**model.config.to_dict(), key: "float32"}).replace('"model_type"', '\n "odd" : 1,  "model_type"')
    other = {"dtype": "torch_dtype", "torch_dtype": "dtype"}[key]
    content = json.loads(text)
    content.pop(other, None)
    content["rope_theta"] = content["rope_parameters"]["rope_theta"]
    text = json.dumps(content)
    source = source_of(model, tmp_path / "source", text)
    export_policy(model, source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == text.replace(f'"{key}": "float32"', f'"{key}": "bfloat16"')
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_what_version_5_alone_reads_is_repeated_for_version_4(tmp_path: Path) -> None:
    model = tiny_model(rope_parameters={"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0})
    source = source_of(model, tmp_path / "source")
    assert "rope_theta" not in json.loads((source / "config.json").read_text())
    export_policy(model, source, tmp_path / "out")
    before, after = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "out"))
    assert after.pop("rope_theta") == 1e5
    scaling = after.pop("rope_scaling")
    assert (scaling["rope_type"], scaling["factor"]) == ("yarn", 4.0)
    assert after == before
    first, second = (AutoConfig.from_pretrained(d).rope_parameters for d in (source, tmp_path / "out"))
    assert first == second


PARAMETERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, {"rope_theta": 1e5}),
    "part": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "GPT-NeoX": (
        {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
        {"rotary_emb_base": 1e4, "rotary_pct": 0.25},
    ),
    "two kinds of layers": (
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
        {
            "rope_local_base_freq": 1e4,
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "Phi 3": (
        {
            "model_type": "phi3",
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0],
                "long_factor": [2.0],
                "original_max_position_embeddings": 32,
            },
        },
        {
            "rope_theta": 1e4,
            "original_max_position_embeddings": 32,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
        },
    ),
    "none": ({"n_positions": 8}, {}),
    "older ones there": ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 5.0}}, {}),
}


@pytest.mark.parametrize("case", PARAMETERS)
@pytest.mark.parametrize("indent", [None, 2])
def test_older_fields_are_added_before_an_unchanged_rest(case: str, indent: int | None) -> None:
    config, added = PARAMETERS[case]
    text = json.dumps(config, indent=indent)
    found = with_older_rope_fields(text)
    assert json.loads(found) == config | added
    assert found.endswith(text[1:].lstrip())
    assert with_older_rope_fields(found) == found


def spoil(output: Path, how: str) -> None:
    file = output / "model.safetensors"
    tensors = load_file(file)
    if how == "value":
        tensors["model.norm.weight"][3] += 1e-3
    elif how == "shape":
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    elif how == "lost":
        del tensors["lm_head.weight"]
    elif how == "more":
        tensors["model.layers.7.mlp.weight"] = torch.zeros(2)
    if how == "adapter":
        (output / "adapter_config.json").write_text("{}")
    elif how == "config":
        text = (output / "config.json").read_text()
        assert "1e-06" in text
        (output / "config.json").write_text(text.replace("1e-06", "1e-01"))
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("value", r"expected the trained weights, found other ones: model\.norm\.weight"),
        ("shape", "mismatched"),
        ("lost", r"found missing_keys: lm_head\.weight"),
        ("more", r"found unexpected_keys: model\.layers\.7"),
        ("adapter", "cannot be used: .*adapter"),
        ("config", r"config\.json: expected the configuration of .*source, found another"),
        ("cut", "cannot be used: .*bytes"),
    ],
)
@pytest.mark.parametrize("is_large", [False, True])
def test_an_export_that_is_not_the_policy_is_refused(
    how: str, message: str, is_large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    source = source_of(model, tmp_path / "source")
    export_policy(model, source, tmp_path / "out")
    if is_large:
        monkeypatch.setattr("mipo_ray.training.export_check.WHOLE_BYTES", 0)
    check_export(model, model.state_dict(), source, tmp_path / "out")
    spoil(tmp_path / "out", how)
    with pytest.raises(ExportDiffers, match=message if how != "value" or not is_large else "tensor model.norm.weight"):
        check_export(model, model.state_dict(), source, tmp_path / "out")


def test_a_probe_finds_a_model_that_computes_otherwise(tmp_path: Path) -> None:
    model = tiny_model()
    source = source_of(model, tmp_path / "source")
    export_policy(model, source, tmp_path / "out")
    model.model.rotary_emb.inv_freq *= 3  # no weight, and not in the configuration
    with pytest.raises(ExportDiffers, match="a probe of 16 tokens has a log-prob of"):
        check_export(model, model.state_dict(), source, tmp_path / "out")
