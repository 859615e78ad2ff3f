"""How the pairs of an optimizer step are shared out to workers, and each worker's share to micro-batches.

Pairs are sorted by length within their step only, so that a step holds the same pairs however many workers share it,
and its gradient, which is normalised by the pairs of all workers, is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from mipo_ray.config.train import Layout
from mipo_ray.training.layout import Pair, TreeLengths, laid_out_tokens


def deal(sizes: Sequence[int], workers: int) -> list[list[int]]:
    """Which pairs of a step each worker gets: indices into `sizes` (tokens), largest first.

    Each worker gets len(sizes) / workers pairs, rounded up or down. They are dealt in decreasing order, there and back
    again (0, 1, 2, 2, 1, 0, ...), so that the sums of tokens are close.
    """
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    shares: list[list[int]] = [[] for _ in range(workers)]
    for position, index in enumerate(order):
        lap, place = divmod(position, workers)
        shares[place if lap % 2 == 0 else workers - 1 - place].append(index)
    return shares


def micro_batches(pairs: Sequence[Pair], *, layout: Layout, most_tokens: int) -> list[list[Pair]]:
    """A worker's pairs of one step in groups of at most `most_tokens` laid-out tokens, padding included.

    Pairs of like length are put together. One larger than `most_tokens` is a group of its own.
    """
    by_length = sorted(pairs, key=lambda pair: laid_out_tokens(pair.lengths, layout))
    groups: list[list[Pair]] = []
    lengths: list[TreeLengths] = []  # of the trees in the last group
    for pair in by_length:
        own = pair.lengths
        if groups and laid_out_tokens(lengths + own, layout) <= most_tokens:
            groups[-1].append(pair)
            lengths += own
        else:
            groups.append([pair])
            lengths = own
    return groups


def in_groups(groups: list[list[Pair]], count: int) -> list[list[Pair]]:
    """The same pairs in `count` groups, at least as many as there are: the largest are halved, then empty ones follow.

    Workers take part in the same collective operations, so that each must run equally many micro-batches.
    """
    groups = list(groups)
    while len(groups) < count:
        largest = max(range(len(groups)), key=lambda index: len(groups[index]), default=None)
        if largest is None or len(groups[largest]) < 2:
            groups.append([])
            continue
        middle = len(groups[largest]) // 2
        groups[largest : largest + 1] = [groups[largest][:middle], groups[largest][middle:]]
    return groups
