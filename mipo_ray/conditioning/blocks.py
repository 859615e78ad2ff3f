"""Conditioning of whole blocks: which strategy each row gets, what becomes of rows to which it does not apply. Pure."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mipo_ray.conditioning.strategies import (
    NO_CONTEXT,
    NO_NEIGHBOUR,
    STRATEGIES,
    Block,
    Conditioning,
    Draw,
    nearest_similarities,
)
from mipo_ray.config.conditioning import ConditioningConfig
from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.errors import UserError
from mipo_ray.prompts.rows import with_context
from mipo_ray.seeds import stable_seed

# The strategy of rows whose pairs a reward chooses: nothing about their prompts is mismatched.
BY_REWARD = "reward"


def condition_block(
    table: pa.Table,
    conditioning: ConditioningConfig,
    prompts: PromptsConfig,
    *,
    seed: int,
    round_index: int,
    negatives: int = 1,
) -> pa.Table:
    """The block with the columns of its conditioning appended, in the order of its rows.

    mismatched_messages (list of conversations), mismatched_prompt_id (list<string>): the K = `negatives` mismatched
        prompts of `Conditioning`.
    strategy (string): the strategy that the row got, of a mixture or as the fallback.
    block_id (string): hash of the block's prompt_ids in order, 16 hex digits.
    partner_index (list<int32>): `Conditioning.partners`.
    dropped (string): "" or the reason why the row gives no pair.

    A column `embedding`, which similar_prompt reads, is left out of the result.

    The draw depends on run seed, round and the block's prompt_ids only, so it is the same on any cluster (that of
    similar_prompt also on the embeddings, which another processor may round otherwise). Which strategy of a mixture a
    row gets depends on run seed, round and its own prompt_id only. Raises UserError for rows that lack what their
    strategy needs of them, where no fallback says what to do.
    """
    embeddings = {}
    if "embedding" in table.column_names:  # large, and of use here only
        embeddings["embedding"] = np.stack(table["embedding"].to_numpy()).astype(np.float32)
        table = table.drop_columns(["embedding"])
    block: dict[str, Any] = {**table.to_pydict(), **embeddings}
    block_id = block_hash(block["prompt_id"])
    draw = Draw(
        seed=stable_seed("conditioning", seed, round_index, block_id),
        negatives=negatives,
        join=functools.partial(with_context, prompts=prompts),
        similar=conditioning.similar,
    )
    drawn: dict[str, Conditioning] = {}

    def condition(name: str) -> Conditioning:
        if name not in drawn:
            drawn[name] = STRATEGIES[name].condition(block, draw)
        return drawn[name]

    assigned = assign_strategies(conditioning, block["prompt_id"], seed=seed, round_index=round_index)
    dropped = [""] * table.num_rows
    for row, name in enumerate(assigned):
        if condition(name).mismatched_messages[row]:
            continue
        dropped[row] = _why_not(name, block, row)
        if conditioning.fallback is None:
            _refuse(dropped[row], block, row, conditioning, negatives)
        elif conditioning.fallback != "drop":
            assigned[row] = conditioning.fallback
            possible = condition(conditioning.fallback).mismatched_messages[row]
            dropped[row] = "" if possible else _why_not(conditioning.fallback, block, row)
    columns = [drawn[name] for name in assigned]
    # Types are given, not inferred: a block whose rows are all dropped must have the schema of every other block.
    added = {
        "mismatched_messages": pa.array(
            [column.mismatched_messages[row] for row, column in enumerate(columns)],
            pa.list_(table.schema.field("messages").type),
        ),
        "mismatched_prompt_id": pa.array(
            [column.mismatched_prompt_ids[row] for row, column in enumerate(columns)], pa.list_(pa.string())
        ),
        "strategy": pa.array(assigned, pa.string()),
        "block_id": pa.array([block_id] * table.num_rows, pa.string()),
        "partner_index": pa.array([column.partners[row] for row, column in enumerate(columns)], pa.list_(pa.int32())),
        "dropped": pa.array(dropped, pa.string()),
    }
    for name, values in added.items():
        table = table.append_column(name, values)
    return table


def assign_strategies(
    conditioning: ConditioningConfig, prompt_ids: Sequence[str], *, seed: int, round_index: int
) -> list[str]:
    """The single strategy of each row: the run's, or one drawn from the mixture by its weights."""
    if conditioning.strategy != "mixture":
        return [conditioning.strategy] * len(prompt_ids)
    names = sorted(conditioning.mixture)  # whatever the order in the recipe
    weights = np.array([conditioning.mixture[name] for name in names])
    edges = np.cumsum(weights / weights.sum())
    draws = [stable_seed("mixture", seed, round_index, prompt_id) / 2**63 for prompt_id in prompt_ids]
    return [names[min(int(index), len(names) - 1)] for index in np.searchsorted(edges, draws, side="right")]


def rows_per_block(rows: int, block_size: int) -> int:
    """How many rows each conditioning block gets: at least `block_size`, and no small block at the end.

    All rows when there are fewer than 2 * block_size; otherwise the smallest size from block_size on that leaves no
    remainder or one of at least half a block, because few rows leave few mismatches to draw from.
    """
    if rows < 2 * block_size:
        return rows
    return next(size for size in range(block_size, rows + 1) if rows % size == 0 or 2 * (rows % size) >= size)


def own_prompts(table: pa.Table) -> pa.Table:
    """A block with the columns that `condition_block` appends, in which no row has a mismatched prompt and none is
    dropped: for pairs of responses to one prompt, which a reward chooses."""
    none: list[list[Any]] = [[]] * table.num_rows
    added = {
        "mismatched_messages": pa.array(none, pa.list_(table.schema.field("messages").type)),
        "mismatched_prompt_id": pa.array(none, pa.list_(pa.string())),
        "strategy": pa.array([BY_REWARD] * table.num_rows, pa.string()),
        "block_id": pa.array([block_hash(table["prompt_id"].to_pylist())] * table.num_rows, pa.string()),
        "partner_index": pa.array(none, pa.list_(pa.int32())),
        "dropped": pa.array([""] * table.num_rows, pa.string()),
    }
    for name, values in added.items():
        table = table.append_column(name, values)
    return table


def block_hash(prompt_ids: Sequence[str]) -> str:
    """16 hex digits that name a block by its prompt_ids in order."""
    return hashlib.sha256(json.dumps(list(prompt_ids)).encode()).hexdigest()[:16]


def _why_not(name: str, block: Block, row: int) -> str:
    strategy = STRATEGIES[name]
    return NO_CONTEXT if strategy.needs_context and not block["context"][row] else strategy.impossible


def _refuse(reason: str, block: Block, row: int, conditioning: ConditioningConfig, negatives: int) -> None:
    """Raises UserError where a row that cannot be conditioned is a mistake in data or recipe."""
    prompt_id = block["prompt_id"][row]
    hint = "set conditioning.fallback to drop or to another strategy"
    if reason == NO_CONTEXT:
        raise UserError(f"prompt {prompt_id!r}: expected a context, found none; {hint}")
    if reason == NO_NEIGHBOUR:
        band = conditioning.similar
        nearest = ", ".join(f"{value:.3f}" for value in nearest_similarities(block, row)) or "none"
        raise UserError(
            f"prompt {prompt_id!r}: expected at least {negatives} other prompts of its block with a cosine similarity "
            f"from {band.min_similarity:g} to {band.max_similarity:g} (conditioning.similar), found as the largest: "
            f"{nearest}; widen the band, raise conditioning.block_size, or {hint}"
        )
