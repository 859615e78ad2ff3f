"""From token ids to tensors: three layouts of the same sequences. The ids are the sampler's own; no tokenizer here.

    padded   prompt chosen ........      one row for each response, filled up on the right
             prompt rejected ......
    packed   prompt chosen|prompt rejected|prompt chosen|...      one row; nothing crosses a bar
    shared   prompt chosen rejected|prompt chosen rejected|...    one row; each response sees its prompt and itself

All give the same log-probs. `packed` and `shared` leave out the last token of each response, which predicts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mipo_ray.config.train import Layout, Objective

# The columns of a pair row that training reads, in the form of pairs.as_version_2: `rejected_token_ids` is a list of
# responses. Objective sami reads the last one too, a list of prompts.
PAIR_COLUMNS = ["pair_id", "prompt_token_ids", "chosen_token_ids", "rejected_token_ids"]
MISMATCHED_PROMPTS = "mismatched_prompt_token_ids"

Pair = Mapping[str, Any]


@dataclass(frozen=True)
class Tree:
    """A prompt and the responses that are scored under it; all are int64 arrays of [tokens], none of them empty."""

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Segment:
    """Tokens start:end of a packed row, which attend to one another causally, and to all of prefix_start:prefix_end."""

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


@dataclass(frozen=True)
class TokenBatch:
    """Laid-out trees. Response numbers count tree after tree, in each tree in the order of its responses.

    input_ids, position_ids: [rows, tokens] int64. Padding has id 0, which nothing looks at.
    attention_mask: [rows, tokens] int64, 1 on tokens and 0 on padding; None in packed layouts, which have none.
    segments: what attends to what in a packed row; empty in layout padded.
    predicting: [response tokens] int64: where, in the flattened rows, the hidden state is that predicts each.
    targets: [response tokens] int64: the ids that are predicted.
    response_index: [response tokens] int64: the number of the response that each belongs to.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    segments: tuple[Segment, ...]
    predicting: Tensor
    targets: Tensor
    response_index: Tensor
    response_count: int

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()
        }
        return TokenBatch(**moved)


def pair_trees(pair: Pair, objective: Objective) -> list[Tree]:
    """What an objective scores of a pair: the chosen response, then its K rejected ones, under the pair's prompt.

    For sft the chosen response alone. For sami 1 + K trees: all responses under the pair's own prompt, and under the
    mismatched prompt of each rejected one.

    Raises ValueError, naming the pair, for an empty prompt (its first response token would have nothing to be predicted
    from) or an empty response.
    """
    chosen = _ids(pair, "chosen_token_ids", pair["chosen_token_ids"])
    prompt = _ids(pair, "prompt_token_ids", pair["prompt_token_ids"])
    if objective == "sft":
        return [Tree(prompt, (chosen,))]
    rejected = [_ids(pair, "rejected_token_ids", ids) for ids in pair["rejected_token_ids"]]
    if not rejected:
        raise ValueError(f"pair {pair.get('pair_id')!r}: expected at least one rejected response, found none")
    responses = (chosen, *rejected)
    if objective != "sami":
        return [Tree(prompt, responses)]
    others = [_ids(pair, MISMATCHED_PROMPTS, ids) for ids in pair[MISMATCHED_PROMPTS]]
    return [Tree(one, responses) for one in (prompt, *others)]


def sequence_trees(sequences: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[Tree]:
    """(prompt ids, response ids) as trees of one response each; raises ValueError for an empty one, by its number."""
    trees = []
    for index, (prompt, response) in enumerate(sequences):
        found = Tree(np.asarray(prompt, dtype=np.int64), (np.asarray(response, dtype=np.int64),))
        if not len(found.prompt) or not len(found.responses[0]):
            part = "response" if len(found.prompt) else "prompt"
            raise ValueError(f"sequence {index}: expected at least one {part} token, found none")
        trees.append(found)
    return trees


def lay_out(trees: Sequence[Tree], layout: Layout) -> TokenBatch:
    """The trees as one batch on the CPU; raises ValueError for no trees."""
    if not trees:
        raise ValueError("expected at least one tree, found an empty batch")
    return {"padded": _padded, "packed": _packed, "shared": _shared}[layout](trees)


def token_count(trees: Iterable[Tree]) -> int:
    """Tokens of all sequences, each prompt counted once for each of its responses, without padding."""
    return sum(len(tree.prompt) + len(response) for tree in trees for response in tree.responses)


def laid_out_tokens(trees: Sequence[Tree], layout: Layout) -> int:
    """Tokens of the batch that `lay_out` makes of the trees, padding included."""
    sequences = [(len(tree.prompt), len(response)) for tree in trees for response in tree.responses]
    if layout == "padded":
        return len(sequences) * max(prompt + response for prompt, response in sequences)
    without_prompts = sum(response - 1 for _, response in sequences)
    if layout == "packed":
        return without_prompts + sum(prompt for prompt, _ in sequences)
    return without_prompts + sum(len(tree.prompt) for tree in trees)


def _padded(trees: Sequence[Tree]) -> TokenBatch:
    sequences = [(tree.prompt, response) for tree in trees for response in tree.responses]
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = np.zeros((len(sequences), width), dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    predicting = []
    for row, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        input_ids[row, : len(prompt)] = prompt
        input_ids[row, len(prompt) : end] = response
        attention_mask[row, :end] = 1
        # Position t predicts token t + 1.
        predicting.append(row * width + np.arange(len(prompt) - 1, end - 1))
    # Padding on the right leaves every token at its own position.
    position_ids = np.broadcast_to(np.arange(width), input_ids.shape).copy()
    return _batch(input_ids, position_ids, torch.from_numpy(attention_mask), (), predicting, sequences)


def _packed(trees: Sequence[Tree]) -> TokenBatch:
    sequences = [(tree.prompt, response) for tree in trees for response in tree.responses]
    ids, positions, segments, predicting, offset = [], [], [], [], 0
    for prompt, response in sequences:
        length = len(prompt) + len(response) - 1
        ids += [prompt, response[:-1]]
        positions.append(np.arange(length))
        segments.append(Segment(offset, offset + length))
        predicting.append(np.arange(offset + len(prompt) - 1, offset + length))
        offset += length
    return _batch(
        np.concatenate(ids)[None], np.concatenate(positions)[None], None, tuple(segments), predicting, sequences
    )


def _shared(trees: Sequence[Tree]) -> TokenBatch:
    ids, positions, segments, predicting, offset = [], [], [], [], 0
    for tree in trees:
        prompt_end = offset + len(tree.prompt)
        ids.append(tree.prompt)
        positions.append(np.arange(len(tree.prompt)))
        segments.append(Segment(offset, prompt_end))
        end = prompt_end
        for response in tree.responses:
            start, end = end, end + len(response) - 1
            ids.append(response[:-1])
            positions.append(len(tree.prompt) + np.arange(len(response) - 1))
            if end > start:
                segments.append(Segment(start, end, offset, prompt_end))
            # The prompt's last token predicts the first one of every response.
            predicting.append(np.concatenate([[prompt_end - 1], np.arange(start, end)]))
        offset = end
    sequences = [(tree.prompt, response) for tree in trees for response in tree.responses]
    return _batch(
        np.concatenate(ids)[None], np.concatenate(positions)[None], None, tuple(segments), predicting, sequences
    )


def _batch(
    input_ids: np.ndarray,
    position_ids: np.ndarray,
    attention_mask: Tensor | None,
    segments: tuple[Segment, ...],
    predicting: list[np.ndarray],
    sequences: list[tuple[np.ndarray, np.ndarray]],
) -> TokenBatch:
    responses = [response for _, response in sequences]
    lengths = [len(response) for response in responses]
    return TokenBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        attention_mask=attention_mask,
        segments=segments,
        predicting=torch.from_numpy(np.concatenate(predicting)),
        targets=torch.from_numpy(np.concatenate(responses)),
        response_index=torch.from_numpy(np.repeat(np.arange(len(responses)), lengths)),
        response_count=len(responses),
    )


def _ids(pair: Pair, column: str, values: Sequence[int]) -> np.ndarray:
    """[tokens] int64, a copy: Arrow hands out read-only arrays, which torch refuses to share."""
    ids = np.array(values, dtype=np.int64)
    if not len(ids):
        raise ValueError(f"pair {pair.get('pair_id')!r}, {column}: expected at least one token, found none")
    return ids
