"""The generate stage of a run on pairs that exist: texts through the model's chat template, counted and committed.

    rows of the files -> token ids -> filters -> Parquet

What is written has the schema of sampled pairs, so that training and the report read it as such. A response is whole:
it ends with the token that ends an answer of this model. No sampler has log-probs of it.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pyarrow as pa

from mipo_ray.config.prompts import ChatSettings
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.generation.rendering import DROP_HINT, load_tokenizer, render_answer
from mipo_ray.generation.stage import count_pairs
from mipo_ray.generation.turn_tokens import TurnTokens, turn_tokens
from mipo_ray.models.hub import model_commit
from mipo_ray.models.source import local_model_directory
from mipo_ray.pairs.assemble import pair_id
from mipo_ray.pairs.filters import drop_reason
from mipo_ray.pairs.given import GIVEN_SCHEMA, PairSummary, given_tables
from mipo_ray.pairs.schema import GIVEN, write_form
from mipo_ray.prompts.dataset import CheckedFiles, blocks_of, read_source
from mipo_ray.ray_cluster.blocks import map_blocks, named, resumed_context
from mipo_ray.ray_cluster.tables import write_rows
from mipo_ray.session import Session, Stage
from mipo_ray.storage.manifests import NOTES, GenerateFacts, Manifest
from mipo_ray.storage.rounds import Round

TOO_LONG = "too_long"
READ = "read.txt"  # below the stage: the content of the rows that are being written
_ROUND = 0  # the only one
_ROWS_PER_BLOCK = 512  # of a file, which is also the grain of resume


def take_pairs(session: Session, round: Round, pairs: PairSummary) -> Manifest[GenerateFacts]:
    """The generate stage on pairs that exist, `pairs`, which are checked. Returns the stage's manifest.

    A stage that was interrupted goes on with the rows that are not written yet, unless the files changed since. Raises
    UserError, naming file and row, for a pair that is too long or that the chat template does not take, and
    TooManyDroppedError when more than `filters.max_dropped_share` of the rows are dropped.
    """
    stage = session.stage(round, "generate")
    if (manifest := stage.finished_before(GenerateFacts)) is not None:
        return manifest
    with stage.reported(f": {pairs.rows:,} pairs of {session.config.pairs.path}") as report:
        _keep_work_on(stage, " ".join(pairs.file_hashes))
        _write_pairs(stage, pairs)
        files, statistics = count_pairs(stage, pairs.rows, pairs.fingerprint)
        policy = session.policy(session.start(round))
        facts = GenerateFacts(
            pairs=files,
            statistics=statistics,
            policy=policy,
            policy_commit=model_commit(policy),
            prompts_commit=pairs.commit,
            gpus=0.0,
        )
        manifest = report.commit(stage, facts, files=files)
        dropped = "".join(f", {count:,} {reason}" for reason, count in statistics.dropped.items())
        report.closing = f": {statistics.kept:,} pairs kept of {statistics.rows:,}{dropped}"
    return manifest


def _keep_work_on(stage: Stage, content: str) -> None:
    """Leaves what an interruption left where it was made of the same rows, and removes it else."""
    name = f"{stage.directory}/{READ}"
    if stage.run.read_text(name) != content:
        stage.run.remove(stage.directory)
        stage.run.write_text(name, content)


def _write_pairs(stage: Stage, pairs: PairSummary) -> None:
    config, filesystem = stage.config, stage.run.arrow_filesystem()
    policy = stage.session.policy(stage.session.start(stage.round))
    with resumed_context(stage.path(NOTES), filesystem, id_column="prompt_id"):
        read = functools.partial(given_tables, config.pairs, pairs.format)
        rows = read_source(CheckedFiles("Given pairs", pairs.files, read, GIVEN_SCHEMA))
        blocks = blocks_of(rows, min(_ROWS_PER_BLOCK, pairs.rows))
        done = map_blocks(blocks, token_pairs, config=config, policy=policy, rejected=pairs.rejected)
        write_rows(named(done, f"{stage.round.name}_pairs"), stage.path(), filesystem)


def token_pairs(block: pa.Table, *, config: Config, policy: str, rejected: int) -> pa.Table:
    """Pairs as a file holds them (`schema.write_form`) of a block with GIVEN_SCHEMA, for the model `policy`.

    rejected: the rejected responses of each.

    Raises UserError, naming file and row, for a pair that does not fit the context window, where those are not dropped.
    """
    chat, tokenizer = config.prompts.chat, load_tokenizer(policy, config.model.trust_remote_code)
    directory = local_model_directory(policy, config.model.trust_remote_code)
    ends = turn_tokens(tokenizer, directory, chat)
    pairs = []
    for row in block.to_pylist():
        own = ChatSettings({**chat.arguments, **json.loads(row["template_arguments"])}, chat.control_tokens)
        try:
            sides = [render_answer(tokenizer, row["messages"], text, own) for text in (row["chosen"], *row["rejected"])]
        except UserError as error:
            raise UserError(f"{row['where']}: {error}") from None
        prompt = sides[0][0]
        answers = [whole_answer(token_ids, ends, tokenizer) for _, token_ids in sides]
        pair = _pair(row, prompt, answers) | {"pair_id": pair_id(config.seed, _ROUND, row["prompt_id"], 0)}
        longest = len(prompt) + max(map(len, answers))
        if longest > config.model.max_model_len and not config.filters.drop_too_long:
            raise UserError(
                f"{row['where']}: expected at most {config.model.max_model_len} tokens (model.max_model_len) of the "
                f"prompt and its longer response, found {longest}. Shorten it or raise model.max_model_len{DROP_HINT}."
            )
        is_too_long = longest > config.model.max_model_len
        pair["dropped"] = TOO_LONG if is_too_long else drop_reason(pair, config.filters, with_pmi=False)
        pairs.append(pair)
    return write_form(pairs, rejected)


def whole_answer(token_ids: list[int], ends: TurnTokens, tokenizer: Any) -> list[int]:
    """The tokens of an answer's turn up to the one that ends it, as an engine would have stopped there.

    What the template writes behind that (a line end) belongs to no answer. Where it writes no end, the tokenizer's own
    end token follows. Raises UserError for a model without any.
    """
    for position, token in enumerate(token_ids):
        if token in ends.ends:
            return token_ids[: position + 1]
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{tokenizer.name_or_path}: expected a token that ends an answer, in the chat template or as eos_token of "
            "the tokenizer; found none"
        )
    return [*token_ids, int(tokenizer.eos_token_id)]


def _pair(row: dict[str, Any], prompt: list[int], answers: list[list[int]]) -> dict[str, Any]:
    """A pair in the form of version 2, but for its id and whether it is dropped; `answers`: the chosen one first."""
    chosen, *rejected = answers
    return {
        "prompt_id": row["prompt_id"],
        "messages": row["messages"],
        "context": "",
        "strategy": GIVEN,
        "mismatched_messages": [[] for _ in rejected],
        "mismatched_prompt_id": [""] * len(rejected),
        "prompt_token_ids": prompt,
        "mismatched_prompt_token_ids": [[] for _ in rejected],
        "chosen_token_ids": chosen,
        "rejected_token_ids": rejected,
        "chosen": row["chosen"],
        "rejected": row["rejected"],
        "chosen_finish_reason": "stop",
        "rejected_finish_reason": ["stop"] * len(rejected),
        "chosen_logprob": None,
        "rejected_logprob": [None] * len(rejected),
        "pmi": None,
        "round": _ROUND,
        "sample": 0,
        "generated_tokens": 0,
        "engine_prompt_tokens": 0,
        "cached_prompt_tokens": 0,
        "control_tokens": 0,
        "extra": "{}",
    }
