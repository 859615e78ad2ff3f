"""Tiny random models of many families, and log-probs and gradients of them by plain means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mipo_ray.training.layout import Tree

VOCABULARY = 128

# What a family's configuration needs to be this small, besides the sizes that all of them know.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": None},
    "Phi3": {},
    "Granite": {"logits_scaling": 7.0},
    "Cohere": {"logit_scale": 0.3},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.4, "attention_dropout": 0.4},
    "GPTNeoX": {},
    "Mixtral": {"sliding_window": None, "num_local_experts": 4},
    "Olmo2": {},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "Bloom": {},
}


def tiny_model(family: str = "Llama", seed: int = 0, **options: Any) -> Any:
    """A model of 2 layers in float32 and evaluation mode.

    Its weights are far larger than those of a fresh model, whose attention is nearly uniform and whose log-probs hardly
    depend on the context, so that a wrong mask or position would hardly show.
    """
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, f"{family}Config")(**(sizes | FAMILIES[family] | options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(10)
                else:  # biases start at 0 and norms at 1
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def plain_logprobs(model: Any, trees: Iterable[Tree]) -> Tensor:
    """[responses] from the logits of whole single sequences; for a model that `use_attention` has not set up."""
    found = []
    for tree in trees:
        for response in tree.responses:
            ids = torch.tensor([*tree.prompt.tolist(), *response.tolist()])
            every_token = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
            found.append(every_token[len(tree.prompt) - 1 :].gather(1, ids[len(tree.prompt) :, None]).sum())
    return torch.stack(found)


def gradients(model: Any, logprobs: Tensor) -> dict[str, Tensor]:
    """Of a weighted sum of the log-probs, of every parameter; zeros where there is none.

    The weights differ from response to response, and have one sign: those of equal responses must not cancel out.
    """
    weights = 0.5 + torch.arange(len(logprobs)) % 3
    model.zero_grad()
    (weights * logprobs).sum().backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def assert_gradients_agree(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-5) -> None:
    """Every parameter's gradient to `relative` of that parameter's largest one.

    On top of that come 8 of float32's steps at the largest gradient of the model: gradients that cancel out, as those
    of attention over a single token do, are as far from 0 as the numbers that they are the difference of.
    """
    assert found.keys() == expected.keys()
    rounding = 2**-20 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name],
            gradient,
            atol=relative * gradient.abs().max().item() + rounding,
            rtol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def sequence_trees(sequences: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[Tree]:
    """(prompt ids, response ids) as trees of one response each."""
    return [Tree(np.asarray(prompt, np.int64), (np.asarray(response, np.int64),)) for prompt, response in sequences]


def random_trees(
    shapes: Sequence[tuple[int, Sequence[int]]], seed: int = 0, vocabulary: int = VOCABULARY
) -> list[Tree]:
    """Trees of random ids, from (tokens of the prompt, tokens of each response)."""
    generator = np.random.default_rng(seed)
    return [
        Tree(
            generator.integers(0, vocabulary, prompt),
            tuple(generator.integers(0, vocabulary, response) for response in responses),
        )
        for prompt, responses in shapes
    ]
