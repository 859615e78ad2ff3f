"""Packed rows worked out token by token from the trees, for comparison with what `layout` and `attention` make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from mipo_ray.config.train import Layout
from mipo_ray.training.layout import Tree, read_pair
from tests.helpers.tiny_families import VOCABULARY


@dataclass(frozen=True)
class Place:
    """One token of a row. In layout shared a prompt belongs to its tree and to no response (None)."""

    token: int
    position: int
    tree: int
    response: int | None


def places(trees: Sequence[Tree], layout: Layout) -> list[Place]:
    """The tokens of a packed or shared row, in order: all but the last one of each response, which predicts nothing."""
    row = []
    for number, tree in enumerate(trees):
        prompt = tree.prompt.tolist()
        if layout == "shared":
            row += [Place(token, position, number, None) for position, token in enumerate(prompt)]
        for index, response in enumerate(tree.responses):
            start = len(prompt) if layout == "shared" else 0
            sequence = prompt + response.tolist()
            row += [Place(sequence[t], t, number, index) for t in range(start, len(sequence) - 1)]
    return row


def visible(trees: Sequence[Tree], layout: Layout, window: int | None = None) -> Tensor:
    """[tokens, tokens] bool: whether the former may see the latter: what comes before it in its own sequence."""
    row = places(trees, layout)

    def sees(one: Place, other: Place) -> bool:
        same_sequence = one.tree == other.tree and other.response in (None, one.response)
        distance = one.position - other.position
        return same_sequence and distance >= 0 and (window is None or distance < window)

    return torch.tensor([[sees(one, other) for other in row] for one in row])


token_ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6)


@st.composite
def drawn_trees(draw: st.DrawFn, most_pairs: int = 2) -> list[Tree]:
    """The trees of one or more pairs with 1 to 3 rejected responses, for an objective with one or with many prompts.

    Prompts are drawn from a few, so that several trees may have equal ones; others share nothing.
    """
    objective = draw(st.sampled_from(["dpo", "sami", "sft"]))
    rejected = draw(st.integers(1, 3))
    prompts = st.sampled_from(draw(st.lists(token_ids, min_size=1, max_size=3)))
    trees = []
    for number in range(draw(st.integers(1, most_pairs))):
        pair = {
            "pair_id": str(number),
            "prompt_token_ids": draw(prompts),
            "chosen_token_ids": draw(token_ids),
            "rejected_token_ids": [draw(token_ids) for _ in range(rejected)],
            "mismatched_prompt_token_ids": [draw(prompts) for _ in range(rejected)],
        }
        trees += read_pair(pair, objective).trees
    return trees
