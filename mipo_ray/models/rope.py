"""Rotary positions as config.json describes them, and whether vLLM and transformers read the same model out of it.

The engine that samples (vLLM) and the model that is trained (transformers) compute these embeddings with code of their
own. Where the two disagree, policy and reference are other models than the one that answered, without a word; what is
known to differ is told here by name. Nothing here imports torch, transformers or vllm.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

_SAME_IN_BOTH = ("default", "linear", "llama3", "yarn", "dynamic", "longrope", "proportional")
# Earlier names of the same thing; both libraries still read them.
_OLD_NAMES = {"su": "longrope", "mrope": "default"}
# Families whose code in vLLM turns yarn into DeepSeek's, which reads `mscale` as transformers does.
_DEEPSEEK_YARN = ("deepseek", "axk1", "sarvam", "kimi", "glm4_moe_lite", "youtu", "longcat")


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the language model: a model of several parts says it in a section of its own."""
    return {**config, **(config.get("text_config") or {})}


def rope_settings(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The rotary settings of all layers, one entry for each kind of layer; [] where config.json has none.

    The older `rope_scaling` stands before `rope_parameters`, as in both libraries. Every entry has a `rope_type`.
    """
    text = text_config(config)
    found = text.get("rope_scaling") or text.get("rope_parameters")
    if not isinstance(found, dict):
        return []
    of_layers = [value for value in found.values() if isinstance(value, dict)] or [found]
    return [{**one, "rope_type": _rope_type(one)} for one in of_layers]


def rope_difference(config: dict[str, Any], window: int) -> str | None:
    """Why vLLM, with a context window of `window` tokens, and transformers would compute other positions from this
    config.json; None where no difference is known."""
    for settings in rope_settings(config):
        rope_type = settings["rope_type"]
        if rope_type not in _SAME_IN_BOTH:
            return f"rope_type {rope_type}: expected one of {', '.join(_SAME_IN_BOTH)}, which both libraries know"
        compare = {"longrope": _longrope_difference, "dynamic": _dynamic_difference, "yarn": _yarn_difference}
        if rope_type in compare and (difference := compare[rope_type](settings, text_config(config), window)):
            return f"rope_type {rope_type}: {difference}"
    return None


def _rope_type(settings: dict[str, Any]) -> str:
    name = str(settings.get("rope_type") or settings.get("type") or "default")
    return _OLD_NAMES.get(name, name)


def _original_window(settings: dict[str, Any], text: dict[str, Any]) -> float | None:
    found = [
        value
        for value in (settings.get("original_max_position_embeddings"), text.get("original_max_position_embeddings"))
        if value is not None
    ]
    return min(found) if found else text.get("max_position_embeddings")


def _longrope_difference(settings: dict[str, Any], text: dict[str, Any], window: int) -> str | None:
    """vLLM takes the long factors for every sequence as soon as its window is longer than the original one, and
    transformers for the micro-batches alone whose longest sequence is."""
    original = _original_window(settings, text)
    if original is None:
        return "expected original_max_position_embeddings, found none"
    if window > original:
        return (
            f"vLLM chooses its factors by the context window, transformers by the longest sequence of a batch, so that "
            f"log-probs would differ; both are the same up to a window of {original} tokens, found {window}"
        )
    longest = text.get("max_position_embeddings") or original
    by_ratio = _longrope_scale(longest / original, original)
    for_vllm = settings.get("short_mscale") or by_ratio
    for_transformers = settings.get("attention_factor") or _longrope_scale(
        settings.get("factor") or longest / original, original
    )
    if text.get("model_type") == "phimoe":  # whose own code in transformers reads what vLLM reads
        for_transformers = settings.get("short_mscale") or for_transformers
    if not math.isclose(for_vllm, for_transformers, rel_tol=1e-6):
        return (
            f"vLLM scales attention by {for_vllm:.6g} (short_mscale, or max_position_embeddings beside "
            f"original_max_position_embeddings), transformers by {for_transformers:.6g} (attention_factor, or factor)"
        )
    return None


def _longrope_scale(factor: float, original: float) -> float:
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _dynamic_difference(settings: dict[str, Any], text: dict[str, Any], window: int) -> str | None:
    """Within the model's own window both are plain rotary positions. Beyond it transformers grows the base with the
    longest sequence of a micro-batch, and vLLM does not."""
    if settings.get("alpha") is not None:
        family = str(text.get("model_type"))
        return None if family.startswith("hunyuan") else f"alpha is read by vLLM alone in the family {family}"
    longest = text.get("max_position_embeddings")
    if longest is not None and window > longest:
        return (
            "transformers scales by the longest sequence of a batch, vLLM does not, so that log-probs would differ; "
            f"both are the same up to a window of {longest} tokens (max_position_embeddings), found {window}"
        )
    trained = settings.get("max_trained_positions")
    if trained is not None and trained != longest:
        return f"max_trained_positions ({trained}) is read by vLLM alone"
    return None


def _yarn_difference(settings: dict[str, Any], text: dict[str, Any], window: int) -> str | None:
    """The two read the factor that scales attention from fields of different names."""
    for name, harmless in (("attn_factor", 1), ("extrapolation_factor", 1), ("apply_yarn_scaling", True)):
        if settings.get(name, harmless) not in (harmless, None):
            return f"{name} ({settings[name]}) is read by vLLM alone"
    factor = settings.get("factor")
    if factor is None:
        return "expected factor, found none"
    plain = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1
    if (own := settings.get("attention_factor")) is not None and not math.isclose(own, plain, rel_tol=1e-6):
        return f"attention_factor ({own}) is read by transformers alone; vLLM takes {plain:.6g}"
    reads_mscale = str(text.get("model_type")).startswith(_DEEPSEEK_YARN)
    if settings.get("mscale") and settings.get("mscale_all_dim") and not reads_mscale:
        return "mscale and mscale_all_dim are read by transformers alone"
    return None


def with_older_rope_fields(text: str) -> str:
    """A config.json with what `rope_parameters` says repeated in the fields that transformers 4 reads.

    Version 4 does not know `rope_parameters`, which version 5 writes alone, and would compute with its defaults. The
    text is otherwise kept as it is; one that has the older fields, or no such parameters, is returned unchanged.
    """
    config = json.loads(text)
    fields = {name: value for name, value in _older_rope_fields(config).items() if name not in config}
    opening = re.match(r"\s*\{(\s*)", text)
    if not fields or opening is None or config.get("rope_scaling"):
        return text
    lines = "".join(f"{json.dumps(name)}: {json.dumps(value)},{opening[1] or ' '}" for name, value in fields.items())
    return text[: opening.end()] + lines + text[opening.end() :]


def _older_rope_fields(config: dict[str, Any]) -> dict[str, Any]:
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict):
        return {}
    fields: dict[str, Any] = {}
    if isinstance(local := parameters.get("sliding_attention"), dict) and "rope_theta" in local:
        fields["rope_local_base_freq"] = local["rope_theta"]  # Gemma 3: the other layers' base is `rope_theta`
    own = parameters.get("full_attention", parameters)
    if not isinstance(own, dict) or any(isinstance(value, dict) for value in own.values()):
        return {}
    if "rope_theta" in own:
        fields["rope_theta"] = own["rope_theta"]
    if "partial_rotary_factor" in own:
        fields["partial_rotary_factor"] = own["partial_rotary_factor"]
    if config.get("model_type") == "gpt_neox":
        names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
        fields = {names.get(name, name): value for name, value in fields.items()}
    rope_type = _rope_type(own)
    if rope_type == "default":
        return fields
    scaling = {
        name: value for name, value in own.items() if name not in ("rope_theta", "partial_rotary_factor", "type")
    }
    scaling["rope_type"] = rope_type
    if rope_type == "longrope" and "original_max_position_embeddings" in scaling:
        # Version 4 reads it beside the section; Phi 3's section may hold these three names only.
        fields["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
        if config.get("model_type") == "phi3":
            scaling = {"type": rope_type} | {name: scaling[name] for name in ("short_factor", "long_factor")}
    return fields | {"rope_scaling": scaling}
