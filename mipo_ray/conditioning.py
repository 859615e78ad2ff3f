"""What the mismatched response y- is sampled under: one pure function per strategy, over one block of prompt rows.

A strategy reads a block as a table of columns (column name -> one list per column, all of the same length) with at
least `prompt_id`, `messages`, `question_messages`, `context`, `group` and `text` (see `prompts.PROMPT_SCHEMA`). DPO
against the sampling policy as reference fits beta * log(pi_theta / pi_ref) to the log-ratio of the density that chosen
responses come from to the density that rejected responses come from. The strategy decides the second density, and with
it which mutual information is maximised (Nam, Li, Jaques, arXiv 2603.19294).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from mipo_ray.seeds import stable_seed

Block = Mapping[str, list[Any]]
Message = dict[str, str]

NO_CONTEXT = "no_context"
NO_MISMATCHED_PROMPT = "no_mismatched_prompt"


@dataclass(frozen=True)
class Conditioning:
    """The mismatched side of every row of a block; all fields have one entry per row.

    mismatched_messages: what y- is sampled under; [] where `possible` is False.
    mismatched_prompt_id: the row that the mismatched prompt comes from; "" where it is no other row's.
    partner: int64 [rows], index inside the block of the row whose *matched* response is reused as y-; -1 where y- is
        sampled afresh.
    possible: False where the strategy has no mismatched prompt for the row.
    """

    mismatched_messages: list[list[Message]]
    mismatched_prompt_id: list[str]
    partner: np.ndarray
    possible: list[bool]


def missing_context(block: Block, seed: int) -> Conditioning:
    """y- ~ pi(. | x): the same question x without the user's context c.

    The pointwise quantity that DPO fits is log pi_ref(y | x, c) - log pi_ref(y | x), whose mean is the conditional
    mutual information I(Y; C | X): the model learns to say what depends on the user. Rows without a context have no
    mismatched prompt. Nothing is drawn, so `seed` is not used.
    """
    possible = [
        context != "" and question != messages
        for context, question, messages in zip(
            block["context"], block["question_messages"], block["messages"], strict=True
        )
    ]
    return Conditioning(
        mismatched_messages=[
            question if usable else [] for question, usable in zip(block["question_messages"], possible, strict=True)
        ],
        mismatched_prompt_id=[""] * len(possible),
        partner=np.full(len(possible), -1, dtype=np.int64),
        possible=possible,
    )


def random_prompt(block: Block, seed: int) -> Conditioning:
    """y- ~ pi(. | x'), sampled afresh, where x' is another prompt of the block.

    Over the random choice of x' this is a draw from the marginal pi(y), so DPO fits log pi_ref(y | x) - log pi_ref(y),
    whose mean is the mutual information I(Y; X) between response and whole prompt (context included, where there is
    one).
    """
    drawn = swapped_response(block, seed)
    return replace(drawn, partner=np.full(len(drawn.partner), -1, dtype=np.int64))


def swapped_response(block: Block, seed: int) -> Conditioning:
    """y- is the matched response of another prompt x' of the block, reused: half the generation of `random_prompt`.

    A matched response of x' is a draw from pi(. | x'), so the rejected density is the same marginal pi(y) and DPO
    maximises the same I(Y; X). The difference is that the draws are shared: each response is chosen once and rejected
    once, under another prompt.
    """
    partner = derangement(block["text"], block["group"], seed)
    return Conditioning(
        mismatched_messages=[block["messages"][other] if other >= 0 else [] for other in partner],
        mismatched_prompt_id=[block["prompt_id"][other] if other >= 0 else "" for other in partner],
        partner=partner,
        possible=[bool(other >= 0) for other in partner],
    )


@dataclass(frozen=True)
class ConditioningStrategy:
    """A strategy, what it needs of the prompt rows, and why it leaves out a row that does not have it."""

    condition: Callable[[Block, int], Conditioning]
    needs_context: bool
    needs_mismatch: bool
    impossible: str


STRATEGIES: dict[str, ConditioningStrategy] = {
    "missing_context": ConditioningStrategy(missing_context, True, False, NO_CONTEXT),
    "random_prompt": ConditioningStrategy(random_prompt, False, True, NO_MISMATCHED_PROMPT),
    "swapped_response": ConditioningStrategy(swapped_response, False, True, NO_MISMATCHED_PROMPT),
}


def condition_block(table: pa.Table, strategy: str, seed: int, round_index: int) -> pa.Table:
    """The block with the columns of its conditioning appended, in the order of its rows.

    mismatched_messages, mismatched_prompt_id: as in `Conditioning`, with the types of `messages` and `prompt_id`.
    strategy (string): the strategy's name.
    block_id (string): hash of the block's prompt_ids in order, 16 hex digits.
    partner_index (int32): `Conditioning.partner`.
    dropped (string): "" or the reason why the row gives no pair: "no_context" or "no_mismatched_prompt".

    The draw depends on run seed, round and the block's prompt_ids only, so it is the same on any cluster.
    """
    block = table.to_pydict()
    block_id = block_hash(block["prompt_id"])
    chosen = STRATEGIES[strategy]
    conditioning = chosen.condition(block, stable_seed("conditioning", seed, round_index, block_id))
    dropped = ["" if possible else chosen.impossible for possible in conditioning.possible]
    rows = table.num_rows
    # Types are given, not inferred: a block whose rows are all dropped must have the schema of every other block.
    added = {
        "mismatched_messages": pa.array(conditioning.mismatched_messages, table.schema.field("messages").type),
        "mismatched_prompt_id": pa.array(conditioning.mismatched_prompt_id, pa.string()),
        "strategy": pa.array([strategy] * rows, pa.string()),
        "block_id": pa.array([block_id] * rows, pa.string()),
        "partner_index": pa.array(conditioning.partner, pa.int32()),
        "dropped": pa.array(dropped, pa.string()),
    }
    for name, column in added.items():
        table = table.append_column(name, column)
    return table


def rows_per_block(rows: int, block_size: int) -> int:
    """How many rows each conditioning block gets: at least `block_size`, and no small block at the end.

    All rows when there are fewer than 2 * block_size; otherwise the smallest size from block_size on that leaves no
    remainder or one of at least half a block, because few rows leave few mismatches to draw from.
    """
    if rows < 2 * block_size:
        return rows
    return next(size for size in range(block_size, rows + 1) if rows % size == 0 or 2 * (rows % size) >= size)


def block_hash(prompt_ids: Sequence[str]) -> str:
    """16 hex digits that name a block by its prompt_ids in order."""
    return hashlib.sha256(json.dumps(list(prompt_ids)).encode()).hexdigest()[:16]


def derangement(texts: Sequence[str], groups: Sequence[str], seed: int) -> np.ndarray:
    """For each row a seeded random partner row: int64 [rows], -1 where no admissible partner exists.

    Row j is admissible for row i when their texts differ and they do not share a non-empty group; so no row is its own
    partner. As many rows as possible get a partner that no other row has: the result is a permutation whenever the
    rows admit one at all. A row left over then reuses a random admissible partner.

    A random permutation is kept where it is admissible and completed to a maximum bipartite matching by shortest
    augmenting paths (Berge 1957), in O(rows) memory. The draw is random but not exactly uniform over derangements.
    """
    if len(texts) != len(groups):
        raise ValueError(f"expected one group per text, found {len(texts)} texts and {len(groups)} groups")
    rows = len(texts)
    random = np.random.default_rng(seed)
    text_class = _classes(texts)
    group_class = _classes(groups)
    grouped = np.array([group != "" for group in groups], dtype=bool)

    def admissible(row: int) -> np.ndarray:
        other_group = (group_class != group_class[row]) | ~grouped
        return (text_class != text_class[row]) & other_group

    shuffled = random.permutation(rows)
    kept = (text_class[shuffled] != text_class) & ((group_class[shuffled] != group_class) | ~grouped)
    partner = np.where(kept, shuffled, -1)
    holder = np.full(rows, -1, dtype=np.int64)  # holder[j]: the row whose partner is j
    holder[shuffled[kept]] = np.flatnonzero(kept)

    # Partners that a failed search reached lie on no augmenting path of any later search either.
    exhausted = np.zeros(rows, dtype=bool)
    for row in random.permutation(np.flatnonzero(partner < 0)):
        _augment(int(row), admissible, partner, holder, exhausted, random)
    for row in np.flatnonzero(partner < 0):
        choices = np.flatnonzero(admissible(int(row)))
        if len(choices):
            partner[row] = random.choice(choices)
    return partner


def _augment(
    start: int,
    admissible: Callable[[int], np.ndarray],
    partner: np.ndarray,
    holder: np.ndarray,
    exhausted: np.ndarray,
    random: np.random.Generator,
) -> None:
    """Gives `start` an unused partner by moving other rows to new partners along a shortest augmenting path.

    Breadth first from `start`: a row reaches its admissible partners, a used partner reaches the row that holds it.
    Changes `partner` and `holder` on success, `exhausted` on failure.
    """
    reached = exhausted.copy()
    reached_from = np.full(len(partner), -1, dtype=np.int64)
    frontier = [start]
    while frontier:
        following: list[int] = []
        for row in frontier:
            fresh = random.permutation(np.flatnonzero(admissible(row) & ~reached))
            reached[fresh] = True
            reached_from[fresh] = row
            unused = fresh[holder[fresh] < 0]
            if len(unused):
                _move_partners(int(unused[0]), start, partner, holder, reached_from)
                return
            following.extend(int(other) for other in holder[fresh])
        frontier = following
    exhausted |= reached


def _move_partners(free: int, start: int, partner: np.ndarray, holder: np.ndarray, reached_from: np.ndarray) -> None:
    while True:
        row = int(reached_from[free])
        released = int(partner[row])
        partner[row], holder[free] = free, row
        if row == start:
            return
        free = released


def _classes(values: Sequence[str]) -> np.ndarray:
    """int64 [rows]: equal numbers for equal values."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)
