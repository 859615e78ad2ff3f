"""From token ids to padded tensors. The ids are the sampler's own: nothing here knows a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The columns of a pair row that training reads; a pair is one row of them, ids as a list or array.
PAIR_COLUMNS = ["prompt_token_ids", "chosen_token_ids", "rejected_token_ids"]

Pair = Mapping[str, Any]


@dataclass(frozen=True)
class SequenceBatch:
    """Prompts with their responses, padded on the right; every tensor is [sequences, tokens].

    `input_ids` (int64) is prompt, response, padding. `attention_mask` (int64) is 1 on prompt and response.
    `response_mask` (bool) is true on response tokens only.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor

    def to(self, device: torch.device | str) -> SequenceBatch:
        """The same batch on another device."""
        return SequenceBatch(
            self.input_ids.to(device, non_blocking=True),
            self.attention_mask.to(device, non_blocking=True),
            self.response_mask.to(device, non_blocking=True),
        )

    @property
    def token_count(self) -> int:
        """Tokens of all prompts and responses, without padding."""
        return int(self.attention_mask.sum())


@dataclass(frozen=True)
class PaddedBatch(SequenceBatch):
    """Pairs as one batch of [2 * pairs, tokens]: row i is chosen response i, row pairs + i is rejected response i."""

    @property
    def pair_count(self) -> int:
        return self.input_ids.shape[0] // 2


def pad_sequences(sequences: Sequence[tuple[Iterable[int], Iterable[int]]], pad_token_id: int) -> SequenceBatch:
    """Lays (prompt ids, response ids) out as one batch, padded on the right to its longest sequence.

    Padding on the right leaves every real token at its own position, so that no position ids are needed. What
    `pad_token_id` is has no influence: padding is masked by position, never by comparing ids.

    Raises ValueError, naming the sequence, for an empty prompt (its first response token would have nothing to be
    predicted from) or an empty response, and for an empty batch.
    """
    if not sequences:
        raise ValueError("expected at least one sequence, found an empty batch")
    rows = [(_ids(prompt), _ids(response)) for prompt, response in sequences]
    for index, (prompt, response) in enumerate(rows):
        if not len(prompt):
            raise ValueError(f"sequence {index}: expected at least one prompt token, found none")
        if not len(response):
            raise ValueError(f"sequence {index}: expected at least one response token, found none")
    shape = (len(rows), max(len(prompt) + len(response) for prompt, response in rows))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    response_mask = torch.zeros(shape, dtype=torch.bool)
    for index, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        input_ids[index, : len(prompt)] = torch.from_numpy(prompt)
        input_ids[index, len(prompt) : end] = torch.from_numpy(response)
        attention_mask[index, :end] = 1
        response_mask[index, len(prompt) : end] = True
    return SequenceBatch(input_ids, attention_mask, response_mask)


def pair_rows(batches: Iterable[Mapping[str, Any]]) -> Iterator[Pair]:
    """The pairs of batches of columns, as Ray Data hands them out, in their order."""
    for batch in batches:
        for row in zip(*(batch[name] for name in PAIR_COLUMNS), strict=True):
            yield dict(zip(PAIR_COLUMNS, row, strict=True))


def padded_batch(pairs: Sequence[Pair], pad_token_id: int) -> PaddedBatch:
    """Lays pairs (`prompt_token_ids`, `chosen_token_ids`, `rejected_token_ids`) out as one batch, chosen rows first.

    Raises ValueError as `pad_sequences` does, where sequence i is chosen response i, and sequence pairs + i is
    rejected response i.
    """
    chosen = [(pair["prompt_token_ids"], pair["chosen_token_ids"]) for pair in pairs]
    rejected = [(pair["prompt_token_ids"], pair["rejected_token_ids"]) for pair in pairs]
    batch = pad_sequences(chosen + rejected, pad_token_id)
    return PaddedBatch(batch.input_ids, batch.attention_mask, batch.response_mask)


def _ids(values: Iterable[int]) -> np.ndarray:
    """[tokens] int64, a copy: Arrow hands out read-only arrays, which torch refuses to share."""
    return np.array(values if isinstance(values, np.ndarray) else list(values), dtype=np.int64)
