"""Attention of a packed or shared row in one call of torch's varlen kernel, for GPUs and 16-bit precision.

The kernel takes sequences of queries and sequences of keys, each laid end to end, and lets a sequence's last query see
its last key: query i of q sees key j of k where j <= i + k - q. So a segment is a sequence whose queries are its own
tokens and whose keys are those of its prefix and then its own; a prompt's keys are there once for itself and once for
each response that follows it. Nothing is computed across segments, and no masks are made.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mipo_ray.training.layout import Segment

LARGEST_HEAD = 256  # of the kernel


@dataclass(frozen=True)
class VarlenRow:
    """A row's segments as the kernel takes them.

    query_ends       [segments + 1] int32: where in the row each segment begins, and where the last one ends
    key_ends         [segments + 1] int32: the same in the keys, prefixes counted for each segment that sees them
    longest_query    tokens of the longest segment
    longest_key      tokens of the longest segment with its prefix
    sources          [keys] int64: the row's token that each key is of; None where keys and tokens are the same
    uses             [tokens, most keys of a token] int64: the keys that are of each token, filled up with the number of
                     keys, which is none of them; None with `sources`
    """

    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int
    sources: Tensor | None
    uses: Tensor | None


def has_varlen_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes these: [..., heads, tokens, head size], all heads of one size."""
    size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and size == value.shape[-1]
        and size % 8 == 0
        and size <= LARGEST_HEAD
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def varlen_row(segments: Sequence[Segment], device: torch.device) -> VarlenRow:
    """The segments of a packed or shared row, which cover it in its order."""
    lengths = np.array([segment.end - segment.start for segment in segments])
    prefixes = np.array([segment.prefix_end - segment.prefix_start for segment in segments])
    sources = uses = None
    if prefixes.any():
        places = np.concatenate(
            [
                np.r_[segment.prefix_start : segment.prefix_end, segment.start : segment.end]  # prefix, then its own
                for segment in segments
            ]
        )
        sources = torch.from_numpy(places).to(device)
        uses = torch.from_numpy(_uses(places, int(lengths.sum()))).to(device)
    return VarlenRow(
        query_ends=_ends(lengths, device),
        key_ends=_ends(prefixes + lengths, device),
        longest_query=int(lengths.max()),
        longest_key=int((prefixes + lengths).max()),
        sources=sources,
        uses=uses,
    )


def varlen_attention(
    states: tuple[Tensor, Tensor, Tensor], row: VarlenRow, window: int | None, scale: float | None
) -> Tensor:
    """[1, tokens, heads, head size] of query, key and value: [1, heads, tokens, head size] each, of keys fewer heads.

    `window`: the keys that a query sees at most, itself counted, in layers with sliding attention.
    """
    query, key, value = (of.squeeze(0).transpose(0, 1) for of in states)  # [tokens, heads, head size]
    if row.sources is not None:
        key, value = (_Repeated.apply(of, row.sources, row.uses) for of in (key, value))
    window_size = (-1 if window is None else window - 1, 0)
    ends = (row.query_ends, row.key_ends, row.longest_query, row.longest_key)
    attended = _kernel()(query, key, value, *ends, scale=scale, window_size=window_size)
    assert isinstance(attended, Tensor)  # and no log-sum-exp beside it, which was not asked for
    return attended.unsqueeze(0)


@functools.cache
def _kernel() -> Callable[..., Any]:
    """torch's varlen_attn, whose import takes a second: of CPUs, which have no use for it, nobody waits for that."""
    from torch.nn.attention.varlen import varlen_attn

    # Before torch 2.12 the kernel took fewer key heads than query heads without being told.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return functools.partial(varlen_attn, **grouped)


class _Repeated(torch.autograd.Function):
    """states[sources]: [keys, heads, head size] of [tokens, heads, head size].

    Backward adds up what a token's keys got, always in the same order, where an index_add would add as threads come.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, sources: Tensor, uses: Tensor) -> Tensor:
        ctx.save_for_backward(uses)
        return states[sources]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (uses,) = ctx.saved_tensors
        padded = torch.cat([gradient, gradient.new_zeros(1, *gradient.shape[1:])])  # what fills `uses` up adds nothing
        return padded[uses].sum(dim=1), None, None  # [tokens, most keys of a token, ...] to [tokens, ...]


def _ends(lengths: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)).to(device)


def _uses(sources: np.ndarray, tokens: int) -> np.ndarray:
    """[tokens, most keys of a token] int64; see `VarlenRow`."""
    order = np.argsort(sources, kind="stable")  # keys, token after token
    counts = np.bincount(sources, minlength=tokens)
    number = np.arange(len(sources)) - np.repeat(counts.cumsum() - counts, counts)  # of a key among its token's
    uses = np.full((tokens, counts.max()), len(sources), dtype=np.int64)
    uses[sources[order], number] = order
    return uses
