"""What the engines are asked: prompts conditioned and rendered, a seed for each request, written before any sampling.

    prompts -> (embeddings) -> conditioning -> requests (token ids, seeds) -> Parquet

Bad prompts fail here, and a resumed stage samples exactly the rows that have no pair yet, under the conditioning they
had. similar_prompt alone starts an engine before, which embeds.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data

from mipo_ray.conditioning.blocks import condition_block, own_prompts, rows_per_block
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.generation.embedder import embed_rows
from mipo_ray.generation.engine import REQUESTS
from mipo_ray.generation.preferences import chosen_by
from mipo_ray.generation.rendering import chat_template_of, check_length, fits, load_tokenizer, render_prompts
from mipo_ray.pairs.schema import TOKEN_IDS
from mipo_ray.pairs.statistics import drop_table, prompt_fingerprint
from mipo_ray.pairs.written import CONDITIONED_ROWS
from mipo_ray.prompts.chat_check import ROWS_RENDERED, ChatCheck
from mipo_ray.prompts.check import PromptSummary
from mipo_ray.prompts.dataset import blocks_of, read_prompts
from mipo_ray.ray_cluster.blocks import map_blocks, named, ordered_context
from mipo_ray.ray_cluster.tables import write_rows
from mipo_ray.seeds import stable_seed
from mipo_ray.session import Session, Stage
from mipo_ray.storage.manifests import GenerateFacts
from mipo_ray.storage.pair_statistics import PairStatistics
from mipo_ray.storage.records import optional, read_record, to_json
from mipo_ray.storage.rounds import Round
from mipo_ray.tables.parquet import open_table

CONDITIONED = "conditioned.json"
EQUAL_PROMPTS = "equal_prompts"  # why a row is dropped whose two prompts are the same token ids


class TooManyDroppedError(UserError):
    """The filters left too few pairs to train on; the message holds the table of reasons."""


@dataclass(frozen=True)
class Conditioned:
    """What conditioned.json says of a round's conditioned rows, which are all there where it is."""

    rows: int
    rows_per_block: int
    """Rows of a block, in which mismatched prompts were drawn."""
    fingerprint: str
    """Of the prompts (`prompt_fingerprint`), 16 hex digits."""
    chosen_by: str | None = optional()
    """What chooses between the responses to a prompt (`preferences.chosen_by`)."""


def condition_prompts(session: Session, round: Round, prompts: PromptSummary) -> Conditioned:
    """Writes the conditioned rows of a round, once: what to sample, under what, with which seed.

    A finished earlier call over the same directory answers at once. Raises RecordError for a damaged
    conditioned.json, TooManyDroppedError when conditioning alone drops more than `filters.max_dropped_share` of the
    rows, and UserError when most matched and mismatched prompts are the same to the model, or when another function or
    judge began to choose this round's pairs.
    """
    config, stage = session.config, session.stage(round, "generate")
    name = f"{stage.directory}/{CONDITIONED}"
    if (text := stage.run.read_text(name)) is not None:
        return _as_begun(read_record(Conditioned, text, stage.run.path(name)), stage)
    stage.run.remove(stage.directory)
    policy, filesystem = session.policy(session.start(round)), stage.run.arrow_filesystem()
    block_rows = rows_per_block(prompts.rows, config.conditioning.block_size)
    with ordered_context():
        rows = blocks_of(read_prompts(config.prompts, prompts), block_rows)
        if config.embeds_prompts:
            rows = embed_rows(rows, config, policy=policy, resources=session.resources)
        rows = _conditioned(rows, config, round)
        rows = map_blocks(rows, add_requests, config=config, policy=policy, round_index=round.number)
        write_rows(named(rows, f"{round.name}_conditioned"), stage.path(CONDITIONED_ROWS), filesystem)
    # Two narrow columns, batch by batch: a pass of Ray Data would cost more than the reading.
    columns = ["prompt_id", "dropped"]
    fingerprint = 0
    dropped: Counter[str] = Counter()
    for batch in open_table(stage.path(CONDITIONED_ROWS), filesystem, columns).to_batches(columns=columns):
        fingerprint += prompt_fingerprint(batch["prompt_id"].to_pylist())
        dropped.update(batch["dropped"].to_pylist())
    kept = dropped.pop("", 0)
    refuse_equal_prompts(dropped[EQUAL_PROMPTS], kept, policy, config)
    check_dropped(
        PairStatistics(rows=prompts.rows, kept=kept, dropped=dict(dropped)),
        f"{stage.directory}, before sampling",
        config,
        "; mismatched prompts are drawn inside blocks of neighbouring rows: shuffle the prompts or raise "
        "conditioning.block_size where groups stand together, or set conditioning.fallback to another strategy",
    )
    conditioned = Conditioned(prompts.rows, block_rows, f"{fingerprint % 2**64:016x}", chosen_by(config))
    stage.run.write_text(name, json.dumps(to_json(conditioned)))
    return conditioned


def condition_unfinished(session: Session, round: Round, prompts: PromptSummary) -> bool:
    """Whether a round's pairs are still to be generated; then its rows are conditioned, as by `condition_prompts`. For
    a round whose stages begin at once: training that streams goes by the order of the conditioned rows."""
    is_unfinished = session.stage(round, "generate").read_manifest(GenerateFacts) is None
    if is_unfinished:
        condition_prompts(session, round, prompts)
    return is_unfinished


def _as_begun(conditioned: Conditioned, stage: Stage) -> Conditioned:
    """The conditioned rows of an earlier call; raises UserError where something else chose between the responses."""
    if (now := chosen_by(stage.config)) != conditioned.chosen_by:
        raise UserError(
            f"{stage.path()}: expected what chose the pairs when this round was begun, {conditioned.chosen_by}; found "
            f"{now}: bring it back, or remove the directory to sample the round again"
        )
    return conditioned


def _conditioned(rows: ray.data.Dataset, config: Config, round: Round) -> ray.data.Dataset:
    """Blocks of prompt rows with what conditioning adds; nothing is mismatched where a function or a judge chooses."""
    if not config.preference.mismatches:
        return map_blocks(rows, own_prompts)
    return map_blocks(
        rows,
        condition_block,
        conditioning=config.conditioning,
        prompts=config.prompts,
        seed=config.seed,
        round_index=round.number,
        negatives=config.generation.negatives_per_prompt,
    )


def refuse_equal_prompts(equal: int, kept: int, policy: str, config: Config) -> None:
    """Raises UserError where most rows that were conditioned have the same token ids on both sides."""
    if equal > kept:
        raise UserError(
            f"{config.prompts.path}: the matched and the mismatched prompt have the same token ids in {equal} of "
            f"{equal + kept} rows: expected different ones, or chosen and rejected responses are samples of one prompt "
            f"and there is nothing to learn. The tokenizer or the chat template of {policy} leaves out what tells them "
            "apart: look at prompts.context_role, prompts.system and prompts.template_arguments, or take another model"
        )


def check_dropped(statistics: PairStatistics, where: str, config: Config, hint: str = "") -> None:
    """Raises TooManyDroppedError, with the table of reasons, when too few rows are left to train on."""
    share = config.filters.max_dropped_share
    if statistics.kept == 0:
        what = "no row was kept"
    elif 1 - statistics.kept / statistics.rows > share:
        what = f"more than filters.max_dropped_share ({share:.0%}) of the rows were dropped"
    else:
        return
    raise TooManyDroppedError(f"{where}: {what}{hint}\n{drop_table(statistics)}")


def add_requests(block: pa.Table, *, config: Config, policy: str, round_index: int) -> pa.Table:
    """Adds `prompt_token_ids`, `mismatched_token_ids` and `requests` (sampler.REQUESTS) to a block of conditioned rows.

    The n matched requests come first; the K mismatched ones are left out where other rows' matched responses serve, and
    where PMI chooses among matched ones. A row whose two sides are the same token ids is dropped, whatever its messages
    say. A row that gives no pair itself is sampled for the rows that reuse its matched responses, and otherwise not at
    all.
    Each request has a seed of its own, made of run seed, round, prompt_id, side and number.
    """
    tokenizer, chat = load_tokenizer(policy, config.model.trust_remote_code), config.prompts.chat
    rows = block.to_pylist()
    # Again, though the plan did it: a model from the Hub may not have been here then.
    check = ChatCheck(chat_template_of(tokenizer, policy), chat, config.prompts)
    for row in rows[:ROWS_RENDERED]:
        check.look(f"prompt {row['prompt_id']!r}", row["messages"], *row["mismatched_messages"])
    matched = render_prompts(tokenizer, [row["messages"] for row in rows], chat)
    mismatched = [render_prompts(tokenizer, row["mismatched_messages"], chat) for row in rows]
    window: dict[str, Any] = {
        "max_tokens": config.generation.sampling.max_tokens,
        "max_model_len": config.model.max_model_len,
    }
    for row, own, others in zip(rows, matched, mismatched, strict=True):
        if not row["dropped"] and own in others:
            row["dropped"] = EQUAL_PROMPTS
        if config.filters.drop_too_long:
            too_long = not all(fits(ids, **window) for ids in (own, *others))
            row["dropped"] = row["dropped"] or ("too_long" if too_long else "")
        else:
            for ids in (own, *others):
                check_length(row["prompt_id"], ids, **window)
    mipo = config.preference.is_mipo
    reused = {index for row in rows if mipo and not row["dropped"] for index in row["partner_index"]}
    requests = []
    for index, (row, own, others) in enumerate(zip(rows, matched, mismatched, strict=True)):
        sampled: list[tuple[str, int, list[int]]] = []
        if not row["dropped"] or (index in reused and fits(own, **window)):
            sampled += [("chosen", sample, own) for sample in range(config.samples_of_prompt)]
        if mipo and not row["dropped"] and not row["partner_index"]:
            sampled += [("rejected", negative, ids) for negative, ids in enumerate(others)]
        requests.append(
            [
                {
                    "prompt_token_ids": ids,
                    "seed": stable_seed(config.seed, round_index, row["prompt_id"], number, side) % 2**31,
                }
                for side, number, ids in sampled
            ]
        )
    dropped = pa.array([row["dropped"] for row in rows], pa.string())
    block = block.set_column(block.schema.get_field_index("dropped"), "dropped", dropped)
    block = block.append_column("prompt_token_ids", pa.array(matched, TOKEN_IDS))
    block = block.append_column("mismatched_token_ids", pa.array(mismatched, pa.list_(TOKEN_IDS)))
    return block.append_column("requests", pa.array(requests, REQUESTS))
