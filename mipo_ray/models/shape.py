"""The shape of a model, from config.json and the headers of its weight files: no weights are read, nothing downloaded.

Nothing here imports torch, transformers, ray or vllm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mipo_ray.errors import UserError
from mipo_ray.models.directory import ModelDirectory, check_directory, read_header, well_formed
from mipo_ray.models.source import EMBEDDED, known_directory


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder: its parameters, and the widths that memory depends on."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_width: int
    vocabulary: int


# SmolLM2-135M-Instruct, whose weights are converted when they are first needed.
EMBEDDED_SHAPE = ModelShape(134_515_008, 30, 576, 1536, 9, 3, 64, 49_152)

_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def model_shape(path: str) -> ModelShape | str:
    """The shape of a model that `source.check_model` accepts, or, as a string, why it is not known."""
    if path == EMBEDDED:
        return EMBEDDED_SHAPE
    try:
        directory = known_directory(path)
        if isinstance(directory, str):
            return directory
        weights = check_directory(directory)
        with well_formed(directory, "config.json"):
            return read_shape(directory.read_json("config.json"), _parameters(directory, weights))
    except UserError as error:  # of a model from the Hub, whose weights may not be there yet
        return str(error)


def read_shape(config: dict[str, Any], parameters: int) -> ModelShape | str:
    """The shape that a config.json tells, or why it does not."""
    config = {**config, **(config.get("text_config") or {})}
    if experts := [name for name in config if name.endswith("_experts") and config[name]]:
        return f"config.json: {experts[0]}: mixtures of experts are not estimated"
    if missing := [name for name in _REQUIRED if not isinstance(config.get(name), int)]:
        return f"config.json does not say {', '.join(missing)}"
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return ModelShape(
        parameters=parameters,
        layers=config["num_hidden_layers"],
        hidden=hidden,
        intermediate=config["intermediate_size"],
        heads=heads,
        key_heads=config.get("num_key_value_heads") or heads,
        head_width=config.get("head_dim") or hidden // heads,
        vocabulary=config["vocab_size"],
    )


def _parameters(directory: ModelDirectory, weights: list[str]) -> int:
    """The numbers in all tensors; tied weights are stored once, and counted once."""
    total = 0
    for name in weights:
        for tensor in read_header(directory, name).values():
            size = 1
            for length in tensor["shape"]:
                size *= length
            total += size
    return total
