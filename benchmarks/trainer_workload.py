"""What the trainer benchmark trains on: shapes of pairs, and configurations of models with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# The configurations that the models' makers published, for models with random weights.
MODEL_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    # For gradients, which a few layers show; heads as wide as those of the large ones.
    "small": {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    # As wide as a 1B model and two layers deep, so that several fit on a device at once.
    "wide": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "qwen2.5-3b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}


@dataclass(frozen=True)
class Shape:
    """Tokens of prompts and of responses, each drawn evenly from low to high, and pairs of a step."""

    name: str
    prompt: tuple[int, int]
    response: tuple[int, int]
    pairs: int


def fixed(prompt: int, response: int, pairs: int) -> Shape:
    """A shape whose prompts, and whose responses, are all equally long."""
    return Shape(f"{prompt}/{response}", (prompt, prompt), (response, response), pairs)


def mixed(pairs: int) -> Shape:
    """Lengths like those of the demo's pairs."""
    return Shape("mixed", (40, 140), (8, 48), pairs)


def random_pairs(shape: Shape, *, vocabulary: int, seed: int) -> list[dict[str, Any]]:
    """A step's pairs: ids drawn evenly from the vocabulary, without its first 10, which are often special tokens."""
    generator = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return generator.integers(10, vocabulary, generator.integers(low, high + 1)).tolist()

    return [
        {
            "pair_id": f"{seed}-{index}",
            "prompt_token_ids": ids(*shape.prompt),
            "chosen_token_ids": ids(*shape.response),
            "rejected_token_ids": [ids(*shape.response)],
        }
        for index in range(shape.pairs)
    ]


def useful_tokens(pairs: list[dict[str, Any]]) -> int:
    """Tokens of all sequences, without padding; the prompt counts for the chosen and for each rejected response."""
    return sum(
        len(pair["prompt_token_ids"]) + len(response)
        for pair in pairs
        for response in (pair["chosen_token_ids"], *pair["rejected_token_ids"])
    )


def long_answers(prompt: int, response: int, pairs: int) -> Shape:
    """Lengths spread evenly around a median prompt and response, from half of it to half more."""
    return Shape(
        f"about {prompt}/{response}",
        (prompt // 2, prompt + prompt // 2),
        (response // 2, response + response // 2),
        pairs,
    )


def save_random_model(shape: str, directory: Path, *, dtype: str, device: str = "cpu") -> None:
    """Writes a model of one of MODEL_SHAPES with random weights (seed 0), drawn on `device`, to `directory`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**MODEL_SHAPES[shape])
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(directory)
