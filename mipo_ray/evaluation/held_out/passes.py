"""From rows that are to be scored to forward passes in which each prompt stands once. Pure, without Ray and torch.

A held-out prompt is scored under by its own answers, by those of other prompts, and by all of the matrix; so sequences
are grouped by what stands before the response, and a group is a tree, as in training (`training.layout`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mipo_ray.training.layout import Tree

# Of a score: the row's number, and the position of the conditioning in it.
Place = tuple[int, int]


@dataclass(frozen=True)
class ScoredTree:
    """A prompt with responses to score under it, and for each response the places of its score."""

    tree: Tree
    places: tuple[tuple[Place, ...], ...]

    @property
    def tokens(self) -> int:
        """Of the prompt and all responses."""
        return len(self.tree.prompt) + sum(map(len, self.tree.responses))


def scoring_passes(rows: Iterable[Mapping[str, Any]], most_responses: int) -> list[list[ScoredTree]]:
    """Every conditioning and response of `rows` once, in passes of at most so many responses, alike ones together.

    rows: `conditionings`, each [tokens] int64, and `response_token_ids` [tokens] int64. A response that stands under
    the same conditioning in several rows is scored once.

    Raises ValueError, naming the row's number, for a conditioning or a response without tokens.
    """
    prompts: dict[bytes, np.ndarray] = {}
    wanted: dict[bytes, dict[bytes, tuple[np.ndarray, list[Place]]]] = {}
    for index, row in enumerate(rows):
        response = row["response_token_ids"]
        for position, prompt in enumerate(row["conditionings"]):
            if not len(prompt) or not len(response):
                empty = "conditioning" if len(response) else "response"
                raise ValueError(f"row {index}: expected at least one {empty} token, found none")
            key = prompt.tobytes()
            prompts[key] = prompt
            responses = wanted.setdefault(key, {})
            responses.setdefault(response.tobytes(), (response, []))[1].append((index, position))
    trees = []
    for key, responses in wanted.items():
        by_length = sorted(responses.values(), key=lambda item: len(item[0]))
        for start in range(0, len(by_length), most_responses):
            part = by_length[start : start + most_responses]
            tree = Tree(prompts[key], tuple(response for response, _ in part))
            trees.append(ScoredTree(tree, tuple(tuple(places) for _, places in part)))
    return _in_passes(sorted(trees, key=lambda tree: tree.tokens), most_responses)


def _in_passes(trees: Sequence[ScoredTree], most_responses: int) -> list[list[ScoredTree]]:
    passes: list[list[ScoredTree]] = []
    responses = most_responses
    for tree in trees:
        if responses + len(tree.places) > most_responses:
            passes.append([])
            responses = 0
        passes[-1].append(tree)
        responses += len(tree.places)
    return passes
