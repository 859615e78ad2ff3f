"""What can be a policy, by config.json and the headers of the weights: kinds of models, windows, rotary positions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mipo_ray.errors import UserError
from mipo_ray.models.policy_check import context_window
from mipo_ray.models.rope import rope_difference
from mipo_ray.models.source import check_model, check_policy_model, check_sampled_model
from mipo_ray.run import main
from tests.unit.models.test_models import write_model

LONG = {"short_factor": [1.0], "long_factor": [4.0]}


def model_of(directory: Path, **config: Any) -> str:
    write_model(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return str(directory)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sees": (
        {"architectures": ["Qwen2VLForConditionalGeneration"], "vision_config": {"depth": 2}},
        r"config\.json: expected a language model of text alone, found vision_config \(Qwen2VLForConditionalGeneration",
    ),
    "sees, with the name of a language model": (
        {"architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "openai/clip"},
        "found mm_vision_tower",
    ),
    "hears": ({"audio_config": {"d_model": 8}, "text_config": {}}, "found audio_config"),
    "translates": ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "is_encoder_decoder"),
    "classifies": (
        {"architectures": ["LlamaForSequenceClassification"]},
        r"field architectures: expected a causal language model .*found LlamaForSequenceClassification",
    ),
    "embeds": ({"architectures": ["Qwen3Model"]}, "found Qwen3Model"),
    "fills gaps": ({"architectures": ["BertForMaskedLM"]}, "found BertForMaskedLM"),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        r"config\.json: field quantization_config: expected none, found bitsandbytes: quantized weights cannot",
    ),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "found gptq"),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, "found awq"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "found fp8"),
    "mxfp4": ({"quantization_config": {"quant_method": "mxfp4"}}, "found mxfp4"),
    "compressed tensors": ({"compression_config": {"quant_method": "compressed-tensors"}}, "found compressed-tensors"),
    "slides above": (
        {
            "model_type": "qwen2",
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 2,
        },
        r"field max_window_layers: expected 4, the number of layers, .*found 2",
    ),
    "quantized inside": ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "found fp8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_trained_is_refused_by_name(case: str, tmp_path: Path) -> None:
    config, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        check_policy_model(model_of(tmp_path / "model", **config), {})


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_a_file_that_quantizers_leave_is_enough(name: str, tmp_path: Path) -> None:
    path = model_of(tmp_path / "model")
    (tmp_path / "model" / name).write_text("{}")
    with pytest.raises(UserError, match=f"model/{name}: expected no quantization"):
        check_policy_model(path, {})


@pytest.mark.parametrize(
    ("dtype", "tensor"),
    [("F8_E4M3", "layer.weight"), ("F8_E4M3", "layer.weight_scale"), ("I32", "layer.qweight"), ("U8", "layer.weight")],
)
def test_weights_that_no_one_trains_are_refused_by_their_headers(dtype: str, tensor: str, tmp_path: Path) -> None:
    path = model_of(tmp_path / "model")
    rename_dtype(tmp_path / "model" / "model.safetensors", tensor, dtype)
    check_model(path)  # a judge may be such a model
    with pytest.raises(UserError, match=rf"model\.safetensors: tensor {tensor}: expected one of .*found {dtype}"):
        check_policy_model(path, {})


def rename_dtype(file: Path, tensor: str, dtype: str) -> None:
    """Writes 48 bytes of a tensor under that name; the header alone says of which dtype they are."""
    width = {"F8_E4M3": 1, "U8": 1, "I32": 4}[dtype]
    header = json.dumps({tensor: {"dtype": dtype, "shape": [48 // width], "data_offsets": [0, 48]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(48))


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": ["GPT2LMHeadModel"], "vision_config": None, "quantization_config": None},
        {"architectures": None},
        {},
        {"image_token_id": None},
    ],
)
def test_plain_language_models_pass(config: dict[str, Any], tmp_path: Path) -> None:
    check_policy_model(model_of(tmp_path / "model", **config), {"model.max_model_len": 1024})


def test_masks_and_counters_of_other_dtypes_pass(tmp_path: Path) -> None:
    path = model_of(tmp_path / "model")
    tensors = {
        "attn.bias": numpy.ones((2, 2), dtype=bool),
        "position_ids": numpy.arange(3),
        "w.weight": numpy.ones(2, dtype=numpy.float16),
    }
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    check_policy_model(path, {})


WINDOWS: dict[str, tuple[dict[str, Any], float | None]] = {
    "plain": ({"max_position_embeddings": 512}, 512),
    "learned": ({"n_positions": 64}, 64),
    "the smallest": ({"max_position_embeddings": 512, "max_seq_len": 128}, 128),
    "its own word": ({"max_position_embeddings": 512, "model_max_length": 4096}, 4096),
    "linear": ({"max_position_embeddings": 512, "rope_scaling": {"type": "linear", "factor": 2.0}}, 1024),
    "llama3": ({"max_position_embeddings": 512, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 512),
    "yarn": (
        {
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100},
        },
        400,
    ),
    "longrope": (
        {
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "su", "factor": 8.0, **LONG},
        },
        512,
    ),
    "scaled before": (
        {
            "model_type": "gemma3_text",
            "max_position_embeddings": 512,
            "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}},
        },
        512,
    ),
    "inside": ({"max_position_embeddings": 9999, "text_config": {"max_position_embeddings": 256}}, 256),
    "unbounded": ({"state_size": 16}, None),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_the_window_is_that_of_the_engines(case: str) -> None:
    config, expected = WINDOWS[case]
    found = context_window(config)
    assert (None if found is None else found[0]) == expected


@pytest.mark.parametrize(
    "field", ["model.max_model_len", "evaluate.task_max_model_len", "evaluate.judge.max_model_len"]
)
def test_a_longer_window_is_refused_by_field(field: str, tmp_path: Path) -> None:
    path = model_of(tmp_path / "model", max_position_embeddings=512)
    check_sampled_model(path, {field: 512})
    with pytest.raises(
        UserError,
        match=rf"{field}: expected at most 512 tokens, .*\(max_position_embeddings in .*/config\.json\), found 513",
    ):
        check_sampled_model(path, {field: 513})
    with pytest.raises(UserError, match="found 513"):
        check_policy_model(path, {field: 513})


def test_the_dry_run_refuses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model_of(tmp_path / "model", max_position_embeddings=512)
    arguments = ["--dry-run", f"run_dir={tmp_path}/run", f"model.path={path}"]
    assert main([*arguments, "model.max_model_len=513"]) == 2
    assert "model.max_model_len: expected at most 512 tokens" in capsys.readouterr().err
    assert main([*arguments, "model.max_model_len=512"]) == 0
    assert main([*arguments, "model.max_model_len=512", "evaluate.task_max_model_len=600"]) == 2
    assert "evaluate.task_max_model_len: expected at most 512" in capsys.readouterr().err
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"vision_config": {"depth": 1}}))
    assert main([*arguments, "model.max_model_len=512"]) == 2
    assert "found vision_config" in capsys.readouterr().err


def long_rope(**settings: Any) -> dict[str, Any]:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64, **LONG, **settings}
    return {"model_type": "phi3", "max_position_embeddings": 256, "rope_parameters": rope}


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"model_type": "llama", "max_position_embeddings": 64, "rope_scaling": {"rope_type": kind, **settings}}


DIFFERENT: dict[str, tuple[dict[str, Any], int, str]] = {
    "longrope beyond its short factors": (long_rope(), 65, "up to a window of 64 tokens, found 65"),
    "its old name": (long_rope(rope_type="su"), 256, "rope_type longrope"),
    "its factor elsewhere": (long_rope(factor=2.0), 64, "vLLM scales attention by 1.15.*transformers by 1.08"),
    "its scale elsewhere": (long_rope(attention_factor=1.5), 64, "transformers by 1.5"),
    "its scale in vLLM alone": (long_rope(short_mscale=1.5), 64, "vLLM scales attention by 1.5"),
    "dynamic beyond the trained window": (rope("dynamic", factor=4.0), 65, "up to a window of 64 tokens"),
    "dynamic with alpha": (rope("dynamic", alpha=1000.0), 64, "alpha is read by vLLM alone in the family llama"),
    "dynamic, trained on fewer": (rope("dynamic", factor=2.0, max_trained_positions=32), 64, "max_trained_positions"),
    "yarn with a scale of its own": (
        rope("yarn", factor=4.0, attention_factor=2.0),
        64,
        r"attention_factor \(2\.0\) is read by transformers alone; vLLM takes 1\.13863",
    ),
    "yarn with vLLM's name of it": (rope("yarn", factor=4.0, attn_factor=2.0), 64, "attn_factor"),
    "yarn of DeepSeek in another family": (rope("yarn", factor=4.0, mscale=0.7, mscale_all_dim=1.0), 64, "mscale"),
    "in one kind of layers": (
        {
            "max_position_embeddings": 64,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "dynamic", "factor": 4.0},
            },
        },
        65,
        "rope_type dynamic",
    ),
    "a kind of one library": (rope("xdrope", alpha=1000.0), 64, "rope_type xdrope: expected one of default, "),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_positions_that_the_libraries_read_differently_are_refused(case: str, tmp_path: Path) -> None:
    config, window, message = DIFFERENT[case]
    path = model_of(tmp_path / "model", **config)
    with pytest.raises(UserError, match=rf"config\.json: with model\.max_model_len {window}, .*different.*{message}"):
        check_policy_model(path, {"model.max_model_len": window})


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (long_rope(), 64),
        (long_rope(factor=4.0), 64),
        (long_rope(rope_type="su"), 32),
        ({**long_rope(short_mscale=1.2, long_mscale=1.3), "model_type": "phimoe"}, 64),
        (rope("dynamic", factor=4.0), 64),
        ({**rope("dynamic", alpha=1000.0), "model_type": "hunyuan_v1_dense"}, 64),
        (rope("yarn", factor=4.0, attention_factor=0.1 * math.log(4) + 1), 128),
        ({**rope("yarn", factor=4.0, mscale=0.7, mscale_all_dim=1.0), "model_type": "deepseek_v3"}, 128),
        (rope("linear", factor=4.0), 256),
        (rope("llama3", factor=4.0), 64),
        ({"max_position_embeddings": 64, "rope_theta": 1e6, "rope_scaling": None}, 64),
    ],
)
def test_positions_that_both_read_alike_pass(config: dict[str, Any], window: int) -> None:
    assert rope_difference(config, window) is None


@given(window=st.integers(1, 400), original=st.integers(16, 128), name=st.sampled_from(["longrope", "su"]))
def test_longrope_is_refused_exactly_beyond_its_short_factors(window: int, original: int, name: str) -> None:
    config = long_rope(rope_type=name, original_max_position_embeddings=original)
    assert (rope_difference(config, window) is not None) == (window > original)


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"sliding_window": 63}, True),
        ({"sliding_window": 63, "layer_types": ["sliding_attention", "full_attention"]}, True),
        ({"sliding_window": 64}, False),
        ({"sliding_window": None}, False),
        ({"sliding_window": 63, "layer_types": ["full_attention"]}, False),
        ({"sliding_window": 63, "model_type": "mistral"}, False),
    ],
)
def test_the_sliding_window_of_cohere2_is_refused_where_it_matters(
    config: dict[str, Any], refused: bool, tmp_path: Path
) -> None:
    path = model_of(tmp_path / "model", **{"model_type": "cohere2", **config})
    if not refused:
        check_policy_model(path, {"model.max_model_len": 64})
        return
    with pytest.raises(UserError, match=r"field sliding_window: .*the one sees 64 tokens .*, the other 63"):
        check_policy_model(path, {"model.max_model_len": 64})


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads: expected 4"),
        ({"intermediate_size": 128}, "intermediate_size: expected 256"),
        ({"n_inner": 192, "intermediate_size": 256}, "intermediate_size: expected 192"),
        ({}, None),
        ({"num_key_value_heads": None, "intermediate_size": 256}, None),
        ({"num_key_value_heads": 4, "n_inner": 192, "intermediate_size": 192}, None),
        ({"num_key_value_heads": 2, "model_type": "llama"}, None),
    ],
)
def test_the_sizes_that_an_engine_of_phi_does_not_read_are_refused(
    tmp_path: Path, sizes: dict[str, Any], field: str | None
) -> None:
    config = {"model_type": "phi", "hidden_size": 64, "num_attention_heads": 4, **sizes}
    path = model_of(tmp_path / "model", **config)
    if field is None:
        check_policy_model(path, {})
        return
    with pytest.raises(UserError, match=f"field {field}"):
        check_policy_model(path, {})
