"""What a judge is asked: written once for a stage, kept when it goes on, and written anew for another judge."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pyarrow as pa
import ray.data

from mipo_ray.config.judge import JudgeConfig, Protocol
from mipo_ray.config.prompts import ChatSettings
from mipo_ray.errors import UserError
from mipo_ray.evaluation.judge.rows import definition, judgement_rows
from mipo_ray.generation.engine import REQUESTS
from mipo_ray.generation.rendering import fits, load_tokenizer, render_prompts
from mipo_ray.judge.prompts import judge_chat, judge_prompt
from mipo_ray.prompts.check import PromptSummary
from mipo_ray.ray_cluster.blocks import map_blocks, named, ordered_context
from mipo_ray.ray_cluster.tables import write_rows
from mipo_ray.seeds import stable_seed
from mipo_ray.session import Stage
from mipo_ray.storage.manifests import JudgeDefinition
from mipo_ray.storage.records import optional, read_record, to_json
from mipo_ray.storage.run_directory import RunDirectory

NOTED = "requests.json"


@dataclass(frozen=True)
class Noted:
    """What requests.json says of the requests of a stage."""

    definition: JudgeDefinition
    judgements: int
    """How many the requests ask for."""
    own_engines: bool | None = None
    """Whether they were written for engines of the run, and not for an endpoint; None: for neither yet."""
    held_out: list[str] | None = optional()
    """Hashes of the held-out files whose references stand in the requests; pointwise alone."""


@dataclass(frozen=True)
class Judged:
    """One protocol over one policy: its stage, the checked held-out prompts, and what decides about its judgements."""

    stage: Stage
    protocol: Protocol
    held_out: PromptSummary

    @property
    def judge(self) -> JudgeConfig:
        return self.stage.config.evaluate.judge

    @property
    def definition(self) -> JudgeDefinition:
        return definition(self.stage.config, self.stage.run, self.stage.round, self.protocol)

    @property
    def asked_by(self) -> Noted:
        """What decides about the requests: the references too, so that those of an edited file are asked for anew."""
        hashes = list(self.held_out.file_hashes) if self.protocol == "pointwise" else None
        return Noted(self.definition, 0, self.judge.has_own_engines, hashes)


def write_requests(judged: Judged) -> int:
    """Writes requests/, what the judge is to be asked, once; returns how many judgements there are to be."""
    stage, judge, asked_by = judged.stage, judged.judge, judged.asked_by
    config, run = stage.config, stage.run
    stored = stored_requests(run, stage.directory, asked_by)
    if stored is not None:
        return stored
    table = judgement_rows(config, run, stage.round, judge_prompt(judge, judged.protocol), judged.held_out)
    with ordered_context():
        rows: ray.data.Dataset = ray.data.from_arrow(table)
        if judge.has_own_engines:
            rows = map_blocks(rows, _add_requests, judge=judge, chat=judge_chat(config), seed=config.seed)
        rows = named(rows, f"{stage.directory.replace('/', '_')}_requests")
        write_rows(rows, stage.path("requests"), run.arrow_filesystem())
    note_requests(run, stage.directory, replace(asked_by, judgements=table.num_rows))
    return table.num_rows


def stored_requests(run: RunDirectory, stage: str, asked_by: Noted) -> int | None:
    """How many judgements the stored requests ask for; None where they are to be written.

    Requests and judgements of another definition, of a stage that was never finished, are removed. Those of a judge
    that ran elsewhere are its own: only engines of this run need token ids, so that its requests alone are removed.
    """
    name = f"{stage}/{NOTED}"
    text = run.read_text(name)
    before = None if text is None else read_record(Noted, text, run.path(name))
    if before is None or (before.definition, before.held_out) != (asked_by.definition, asked_by.held_out):
        run.remove(stage)
        return None
    if before.own_engines is asked_by.own_engines:
        return before.judgements
    # First that they are no longer whole: a kill may come before they are written again.
    note_requests(run, stage, replace(before, own_engines=None))
    run.remove(f"{stage}/requests")
    return None


def note_requests(run: RunDirectory, stage: str, noted: Noted) -> None:
    """Notes by which definition requests/ was written, and whether for engines of this run; None: for neither yet."""
    run.write_text(f"{stage}/{NOTED}", json.dumps(to_json(noted)))


def _add_requests(block: pa.Table, *, judge: JudgeConfig, chat: ChatSettings, seed: int) -> pa.Table:
    """Adds `requests` (sampler.REQUESTS). Raises UserError for a prompt that leaves no room for the judgement."""
    tokenizer = load_tokenizer(str(judge.model), judge.trust_remote_code)
    conversations = [[{"role": "user", "content": text}] for text in block["prompt"].to_pylist()]
    requests = []
    rows = block.select(["judgement_id", "prompt_id"]).to_pylist()
    for row, ids in zip(rows, render_prompts(tokenizer, conversations, chat), strict=True):
        if not fits(ids, max_tokens=judge.max_tokens, max_model_len=judge.max_model_len):
            raise UserError(
                f"prompt {row['prompt_id']!r}: {len(ids)} tokens of the judge's prompt and a judgement of up to "
                f"{judge.max_tokens} do not fit the judge's window: expected at most "
                f"{judge.max_model_len - judge.max_tokens} prompt tokens (evaluate.judge.max_model_len "
                f"{judge.max_model_len} - evaluate.judge.max_tokens {judge.max_tokens}). Raise max_model_len, or lower "
                "max_tokens."
            )
        seed_of_row = stable_seed("judge", seed, row["judgement_id"]) % 2**31
        requests.append([{"prompt_token_ids": ids, "seed": seed_of_row}])
    return block.append_column("requests", pa.array(requests, REQUESTS))
