"""From pair rows to trees of token ids, and from trees to tensors, in three layouts of the same sequences.

The ids are the sampler's own; no tokenizer here.

    padded   prompt chosen ........      one row for each response, filled up on the right
             prompt rejected ......
    packed   prompt chosen|prompt rejected|prompt chosen|...      one row; nothing crosses a bar
    shared   prompt chosen rejected|prompt chosen rejected|...    one row; each response sees its prompt and itself

All give the same log-probs. `packed` and `shared` leave out the last token of each response, which predicts nothing.
A sequence is a prompt of p tokens and a response of r tokens; what predicts its response are positions p - 1 to
p + r - 2, each of which predicts the token after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mipo_ray.config.train import Layout, Objective
from mipo_ray.pairs.schema import REJECTED_SIDE, SAMPLER_LOGPROB, innermost_lists, lists_as_arrays, pair_columns

if TYPE_CHECKING:
    # Imported where tensors are made: Ray's actors and tasks that only share pairs out start a second sooner without.
    import torch
    from torch import Tensor


class TreeLengths(NamedTuple):
    """The tokens of a tree's prompt, and of each of its responses."""

    prompt: int
    responses: tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """A prompt and the responses that are scored under it, none of them empty.

    prompt      [tokens] int64
    responses   each [tokens] int64
    """

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]

    @property
    def lengths(self) -> TreeLengths:
        return TreeLengths(len(self.prompt), tuple(len(response) for response in self.responses))


@dataclass(frozen=True)
class Pair:
    """A pair as its objective scores it: made once, when a worker reads the pair's row.

    dpo, ipo, infonce   one tree: under the pair's prompt the chosen response, then its K rejected ones
    sft                 one tree: under the pair's prompt the chosen response alone
    sami                1 + K trees: all responses under the pair's prompt, and under the mismatched prompt of each
                        rejected one
    """

    pair_id: str
    trees: tuple[Tree, ...]
    sampler_logprob: float | None = None  # of the chosen response, in nats; None where it is not known

    @property
    def lengths(self) -> list[TreeLengths]:
        return [tree.lengths for tree in self.trees]


@dataclass(frozen=True)
class Segment:
    """Tokens start:end of a packed or shared row.

    Each of them sees those before it in the segment and itself, and all of prefix_start:prefix_end.
    """

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


@dataclass(frozen=True)
class TokenBatch:
    """Laid-out trees. Responses are numbered tree after tree, in each tree in its own order.

    input_ids        [rows, tokens] int64; padding has id 0, which nothing looks at
    position_ids     [rows, tokens] int64, of each token in its own sequence
    attention_mask   [rows, tokens] int64, 1 on tokens and 0 on padding; None for packed and shared, which have none
    segments         what attends to what in a packed or shared row; empty for padded
    predicting       [response tokens] int64, where in the flattened rows the hidden state is that predicts each
    targets          [response tokens] int64, the ids that are predicted
    response_index   [response tokens] int64, the number of the response that each belongs to
    response_count   the number of responses

    rows is the number of sequences for padded, and 1 for packed and shared.
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
        from torch import Tensor

        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def read_pair(row: Mapping[str, Any], objective: Objective) -> Pair:
    """The pair of a row of version 2: the columns `pair_columns(objective)`, and SAMPLER_LOGPROB where it is there.

    Raises ValueError, naming the pair, for an empty prompt (its first response token would have nothing to be predicted
    from), an empty response, or no rejected response where the objective compares.
    """
    ids = {name: _token_ids(row, name) for name in _id_columns(objective)}
    if "rejected_token_ids" in ids and not ids["rejected_token_ids"]:
        raise ValueError(f"pair {row['pair_id']!r}: expected at least one rejected response, found none")
    trees = [Tree(prompt, responses) for prompt, responses in _scored(ids, objective)]
    return Pair(row["pair_id"], tuple(trees), row.get(SAMPLER_LOGPROB))


def read_pairs(rows: pa.Table, objective: Objective) -> list[Pair]:
    """The pairs of a table of rows; see `read_pair`."""
    ids = innermost_lists(rows, _id_columns(objective), lists_as_arrays)
    plain = rows.select([name for name in ("pair_id", SAMPLER_LOGPROB) if name in rows.column_names]).to_pylist()
    return [read_pair({**row, **of_row}, objective) for row, of_row in zip(plain, ids, strict=True)]


def read_lengths(rows: pa.Table, objective: Objective) -> list[list[TreeLengths]]:
    """The lengths of each pair's trees, as `Pair.lengths` gives them, without a look at the ids."""
    lengths = innermost_lists(rows, _id_columns(objective), lambda lists: pc.list_value_length(lists).to_pylist())
    return [[TreeLengths(*tree) for tree in _scored(row, objective)] for row in lengths]


def lay_out(trees: Sequence[Tree], layout: Layout) -> TokenBatch:
    """The trees as one batch on the CPU; raises ValueError for no trees."""
    if not trees:
        raise ValueError("expected at least one tree, found an empty batch")
    return {"padded": _padded, "packed": _packed, "shared": _shared}[layout](trees)


def token_count(trees: Iterable[Tree]) -> int:
    """Tokens of all sequences, without padding; a prompt counts once for each of its responses."""
    # sum over sequences of (p + r)
    return sum(len(tree.prompt) + len(response) for tree in trees for response in tree.responses)


def laid_out_tokens(trees: Sequence[TreeLengths], layout: Layout) -> int:
    """Tokens of the batch that `lay_out` makes of trees of these lengths, padding included."""
    sequences = [(tree.prompt, response) for tree in trees for response in tree.responses]
    if layout == "padded":  # sequences * max(p + r)
        return len(sequences) * max(prompt + response for prompt, response in sequences)
    without_prompts = sum(response - 1 for _, response in sequences)
    if layout == "packed":  # sum over sequences of (p + r - 1)
        return without_prompts + sum(prompt for prompt, _ in sequences)
    # sum over trees of p + sum over their responses of (r - 1)
    return without_prompts + sum(tree.prompt for tree in trees)


def _padded(trees: Sequence[Tree]) -> TokenBatch:
    import torch

    sequences = [(tree.prompt, response) for tree in trees for response in tree.responses]
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    # [sequences, width]
    input_ids = np.zeros((len(sequences), width), dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    predicting = []
    for row, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        input_ids[row, : len(prompt)] = prompt
        input_ids[row, len(prompt) : end] = response
        attention_mask[row, :end] = 1
        # Position t predicts token t + 1: [r]
        predicting.append(row * width + np.arange(len(prompt) - 1, end - 1))
    # Padding on the right leaves every token at its own position.
    position_ids = np.broadcast_to(np.arange(width), input_ids.shape).copy()
    return _batch(input_ids, position_ids, torch.from_numpy(attention_mask), (), predicting, sequences)


def _packed(trees: Sequence[Tree]) -> TokenBatch:
    sequences = [(tree.prompt, response) for tree in trees for response in tree.responses]
    ids, positions, segments, predicting, offset = [], [], [], [], 0
    for prompt, response in sequences:
        length = len(prompt) + len(response) - 1  # p + r - 1
        ids += [prompt, response[:-1]]
        positions.append(np.arange(length))  # from 0 in each sequence
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
            positions.append(len(tree.prompt) + np.arange(len(response) - 1))  # each response goes on after the prompt
            if end > start:
                segments.append(Segment(start, end, offset, prompt_end))
            # The prompt's last token predicts the first one of every response: [r]
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
    """`predicting`: for each sequence [r]; `sequences`: (prompt [p], response [r]); the others as in `TokenBatch`."""
    import torch

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


def _scored(row: Mapping[str, Any], objective: Objective) -> list[tuple[Any, tuple[Any, ...]]]:
    """(prompt, responses) of each tree of a pair; of ids or of lengths, whichever the columns of `row` hold."""
    prompt, chosen = row["prompt_token_ids"], row["chosen_token_ids"]
    if objective == "sft":
        return [(prompt, (chosen,))]
    responses = (chosen, *row["rejected_token_ids"])
    if objective != "sami":
        return [(prompt, responses)]
    return [(one, responses) for one in (prompt, *row["mismatched_prompt_token_ids"])]


def _id_columns(objective: Objective) -> list[str]:
    return [name for name in pair_columns(objective) if name != "pair_id"]


def _token_ids(row: Mapping[str, Any], column: str) -> Any:
    """[tokens] int64, or a list of K of them on the rejected side."""
    is_list = column in REJECTED_SIDE
    found = [np.asarray(values, dtype=np.int64) for values in (row[column] if is_list else [row[column]])]
    if not all(map(len, found)):
        raise ValueError(f"pair {row['pair_id']!r}, {column}: expected at least one token, found none")
    return found if is_list else found[0]
