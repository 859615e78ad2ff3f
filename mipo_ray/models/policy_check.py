"""Whether a model can be a policy here: sampled by vLLM, trained and scored by transformers, and the same in both.

Everything is read from config.json and the headers of the weights. Nothing here imports torch, transformers or vllm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mipo_ray.errors import UserError, brief, cut
from mipo_ray.models.directory import ModelDirectory, read_header
from mipo_ray.models.rope import rope_difference, rope_settings, text_config

# The fields in which the families say how long a sequence may be, in tokens: those that vLLM reads.
_WINDOW_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# Parts beside the language model, as config.json names them.
_OTHER_PARTS = ("vision", "visual", "audio", "speech", "image", "video", "thinker", "talker", "mm_vision_tower")
# How the names of classes end that answer with a language-model head.
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")
# What tools that quantize leave beside the weights, by file.
_QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# Safetensors names of the dtypes that can be trained from. Masks and counters come in others.
_TRAINABLE_DTYPES = ("F64", "F32", "F16", "BF16")
_MOST_SHOWN = 1000  # characters of a difference
_WEIGHT_ENDINGS = ("weight", "qweight", "weight_packed", "qzeros", "blocks")


def check_window(directory: ModelDirectory, windows: Mapping[str, int]) -> None:
    """Raises UserError for a context window that vLLM would refuse for this model.

    windows: of a field of the configuration, its name -> tokens.
    """
    found = context_window(directory.read_json("config.json"))
    if found is None:
        return
    longest, reason = found
    for field, tokens in windows.items():
        if tokens > longest:
            raise UserError(
                f"{field}: expected at most {longest:g} tokens, the window of the model ({reason} in "
                f"{directory.shown}/config.json), found {tokens}"
            )


def context_window(config: dict[str, Any]) -> tuple[float, str] | None:
    """The longest sequence in tokens that vLLM allows by this config.json, with the field that says so; None where none
    does, as in models whose positions are not bounded."""
    text = text_config(config)
    named = {name: text[name] for name in _WINDOW_FIELDS if isinstance(text.get(name), int)}
    if not named:
        return None
    field = "model_max_length" if named.get("model_max_length") else min(named, key=lambda name: named[name])
    longest, reason = float(named[field]), field
    if "gemma3" in str(text.get("model_type")):  # its window is given as already scaled
        return longest, reason
    factor = 1.0
    for settings in rope_settings(config):
        if settings["rope_type"] in ("longrope", "llama3"):
            continue
        factor = settings.get("factor") or factor
        if settings["rope_type"] == "yarn":
            original = settings.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
            if original is not None:
                longest, reason = float(original), "original_max_position_embeddings"
    if factor != 1.0:
        longest, reason = longest * factor, f"{reason} x factor {factor:g}"
    return longest, reason


def check_policy(directory: ModelDirectory, weights: list[str], windows: Mapping[str, int]) -> None:
    """Raises UserError, naming the file and the field, for a model that cannot be trained here, or that the sampler and
    the trainer would read differently.

    weights: the files of its weights. windows: of a field of the configuration, its name -> tokens.
    """
    config = directory.read_json("config.json")
    shown = f"{directory.shown}/config.json"
    _check_is_language_model(config, shown)
    _check_is_not_quantized(directory, config, weights)
    _check_upper_layers(text_config(config), shown)
    _check_phi_sizes(text_config(config), shown)
    check_window(directory, windows)
    _check_cohere2_window(text_config(config), windows, shown)
    for field, tokens in windows.items():
        if difference := rope_difference(config, tokens):
            raise UserError(
                f"{shown}: with {field} {tokens}, vLLM and transformers read different models: "
                f"{cut(difference, _MOST_SHOWN)}"
            )


def _check_is_language_model(config: dict[str, Any], shown: str) -> None:
    names = [str(name) for name in config.get("architectures") or []]
    parts = [
        name
        for name, value in config.items()
        if value and name.startswith(_OTHER_PARTS) and (isinstance(value, dict) or name == "mm_vision_tower")
    ]
    if parts:
        raise UserError(
            f"{shown}: expected a language model of text alone, found {cut(parts[0])}"
            + (f" ({cut(', '.join(names))})" if names else "")
            + ": models that see or hear cannot be trained here"
        )
    if config.get("is_encoder_decoder"):
        raise UserError(f"{shown}: expected a causal language model, found is_encoder_decoder true")
    if names and not any(name.endswith(_CAUSAL_ENDINGS) for name in names):
        raise UserError(
            f"{shown}: field architectures: expected a causal language model (...{' or ...'.join(_CAUSAL_ENDINGS)}), "
            f"found {cut(', '.join(names))}"
        )


def _check_cohere2_window(text: dict[str, Any], windows: Mapping[str, int], shown: str) -> None:
    """In this family vLLM lets a token see the `sliding_window` tokens before it and itself, transformers one fewer."""
    sliding = text.get("sliding_window")
    if not str(text.get("model_type")).startswith("cohere2") or sliding is None:
        return
    if "sliding_attention" not in (text.get("layer_types") or ["sliding_attention"]):
        return
    for field, tokens in windows.items():
        if tokens > sliding:
            raise UserError(
                f"{shown}: field sliding_window: with {field} {tokens}, vLLM and transformers read different models: "
                f"in this family the one sees {sliding + 1} tokens in its sliding layers, the other {sliding}, so that "
                f"log-probs would differ; both are the same up to a window of {sliding} tokens"
            )


def _check_upper_layers(text: dict[str, Any], shown: str) -> None:
    """Qwen2's way to say that the upper layers alone have a sliding window, which vLLM does not do."""
    layers, first = text.get("num_hidden_layers"), text.get("max_window_layers")
    is_qwen2 = str(text.get("model_type")).startswith("qwen2")
    if is_qwen2 and text.get("use_sliding_window") and first is not None and first != layers:
        raise UserError(
            f"{shown}: field max_window_layers: expected {brief(layers)}, the number of layers, where "
            f"use_sliding_window is true, found {brief(first)}: vLLM has no sliding window in some layers of "
            "this family"
        )


def _check_phi_sizes(text: dict[str, Any], shown: str) -> None:
    """Sizes that transformers' Phi reads and vLLM's takes for granted: its engine would not start."""
    if text.get("model_type") != "phi":
        return
    heads, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    wide = text.get("n_inner") or (4 * hidden if isinstance(hidden, int) else None)
    for field, expected, reason in (
        ("num_key_value_heads", heads, "the number of heads: vLLM has no heads that share keys"),
        ("intermediate_size", wide, "n_inner or four times hidden_size: vLLM reads no other width"),
    ):
        found = text.get(field)
        if found is not None and found != expected:
            raise UserError(
                f"{shown}: field {field}: expected {brief(expected)}, {reason} in this family; found {brief(found)}"
            )


def _check_is_not_quantized(directory: ModelDirectory, config: dict[str, Any], weights: list[str]) -> None:
    shown = f"{directory.shown}/config.json"
    hint = "quantized weights cannot be trained; take the model in bfloat16, float16 or float32"
    for name in ("quantization_config", "compression_config"):
        for section in (config, text_config(config)):
            if isinstance(settings := section.get(name), dict) and settings:
                method = settings.get("quant_method") or settings.get("quantization_method") or "an unnamed method"
                raise UserError(f"{shown}: field {name}: expected none, found {cut(str(method))}: {hint}")
    if files := [name for name in _QUANTIZATION_FILES if name in directory.details]:
        raise UserError(f"{directory.shown}/{files[0]}: expected no quantization, found this file: {hint}")
    for file in weights:
        for tensor, facts in read_header(directory, file).items():
            dtype = str(facts.get("dtype"))
            is_float = dtype.startswith(("F", "BF"))
            if dtype not in _TRAINABLE_DTYPES and (is_float or tensor.endswith(_WEIGHT_ENDINGS)):
                raise UserError(
                    f"{directory.shown}/{file}: tensor {cut(tensor)}: expected one of {', '.join(_TRAINABLE_DTYPES)}, "
                    f"found {cut(dtype)}: {hint}"
                )
