"""FLOPs that a model's training step cannot do without, by its shape: what utilisation is counted in.

A multiplication and an addition are two FLOPs. Counted are matrix products and attention; of attention only what its
mask leaves, and nothing that is computed a second time in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mipo_ray.models.shape import ModelShape


def step_flops(shape: ModelShape, pairs: Sequence[dict[str, Any]], *, shared: bool) -> int:
    """FLOPs of an optimizer step on `pairs`: forward and backward of the policy, forward of the reference.

    Backward has two matrix products for each one of forward. `shared`: a prompt goes through the model once for all its
    responses. The last token of a response predicts nothing and is not counted.
    """
    return 4 * sum(_forward_flops(shape, pair, shared=shared) for pair in pairs)


def _forward_flops(shape: ModelShape, pair: dict[str, Any], *, shared: bool) -> int:
    query, key = shape.heads * shape.head_width, shape.key_heads * shape.head_width
    layer = shape.hidden * (2 * query + 2 * key + 3 * shape.intermediate)
    prompt = len(pair["prompt_token_ids"])
    responses = [len(ids) for ids in (pair["chosen_token_ids"], *pair["rejected_token_ids"])]
    prompts = 1 if shared else len(responses)
    tokens = prompts * prompt + sum(length - 1 for length in responses)
    # Pairs of a query and a key that it sees: a triangle of the prompt, and of each response all of its prompt and the
    # triangle of its own.
    seen = prompts * _triangle(prompt)
    seen += sum((length - 1) * prompt + _triangle(length - 1) for length in responses)
    # q @ k and weights @ v: two products over the width of all query heads.
    backbone = 2 * shape.layers * (tokens * layer + 2 * seen * query)
    return backbone + 2 * sum(responses) * shape.hidden * shape.vocabulary


def _triangle(length: int) -> int:
    return length * (length + 1) // 2
