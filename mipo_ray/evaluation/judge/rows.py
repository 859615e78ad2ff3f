"""What there is to judge: held-out answers joined with their prompts, one row per judgement; and by which definition.

Nothing here starts an engine.
"""

from __future__ import annotations

from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.dataset

from mipo_ray.config.judge import JudgeConfig, Protocol
from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.evaluation.judge.prompts import (
    ORDERS,
    VERSIONS,
    JudgePrompt,
    judge_prompt,
    pairwise_prompt,
    pointwise_prompt,
)
from mipo_ray.models.source import check_model, check_sampled_model
from mipo_ray.pairs.filters import prompt_text
from mipo_ray.prompts.files import find_files
from mipo_ray.prompts.public_sets import row_reader
from mipo_ray.prompts.rows import PromptRow, normalize_row
from mipo_ray.storage.rounds import BASE, Round, base_and_rounds
from mipo_ray.storage.run_directory import RunDirectory, StorageError

JUDGEMENT_SCHEMA = pa.schema(
    [
        ("judgement_id", pa.string()),  # prompt, sample and order
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),  # which of the prompt's answers
        ("order", pa.string()),  # base_first or policy_first; "" for pointwise
        ("answers", pa.list_(pa.string())),  # in the order in which the judge saw them
        ("reference", pa.string()),  # "" for pairwise
        ("prompt", pa.string()),  # the whole text that the judge was sent
        ("judgement", pa.string()),  # what it said
        ("finish_reason", pa.string()),
        ("tokens", pa.int32()),
        ("parsed", pa.string()),  # first, second or tie; "1" to "5"; null: unreadable
    ]
)
_ASKED = ("judgement_id", "prompt_id", "sample", "order", "answers", "reference", "prompt")


def judged_protocols(judge: JudgeConfig, round: Round) -> tuple[Protocol, ...]:
    """The protocols by which a policy is judged: the base is not compared with itself."""
    if not judge.is_on:
        return ()
    return tuple(protocol for protocol in judge.protocols if protocol == "pointwise" or not round.is_base)


def check_judge(config: Config, run: RunDirectory) -> None:
    """Raises UserError for a judge or a template that cannot be used, and where finished work had another definition.

    References are checked with the held-out prompts (`needs.check_held_out`).
    """
    judge = config.evaluate.judge
    for protocol in judge.protocols if judge.is_on else ():
        judge_prompt(judge, protocol)
    if judge.has_own_engines:
        try:
            check_model(str(judge.model))
            check_sampled_model(str(judge.model), {"evaluate.judge.max_model_len": judge.max_model_len})
        except UserError as error:
            raise UserError(str(error).replace("model.path", "evaluate.judge.model", 1)) from None
    for round in base_and_rounds(range(config.rounds)):
        for protocol in judged_protocols(judge, round):
            refuse_other_definition(config, run, round, protocol)


def definition(config: Config, run: RunDirectory, round: Round, protocol: Protocol) -> dict[str, Any]:
    """What decides about a judgement beside the answers themselves; where the judge runs is no part of it.

    answers: when the judged answers were finished, by policy, so that answers made again are judged again.
    """
    judge = config.evaluate.judge
    prompt = judge_prompt(judge, protocol)
    policies = {"policy": round} if protocol == "pointwise" else {"base": BASE, "policy": round}
    manifests = {name: run.read_manifest(run.stage(policy, "evaluate")) for name, policy in policies.items()}
    facts = {
        "protocol": protocol,
        "version": VERSIONS[protocol],
        "model": judge.model,
        "prompt_hash": prompt.hash,
        "prompt": prompt.text,
        "temperature": judge.temperature,
        "max_tokens": judge.max_tokens,
        "answers": {name: None if found is None else found["finished"] for name, found in manifests.items()},
    }
    return facts if protocol == "pairwise" else facts | {"reference_column": config.evaluate.prompts.reference_column}


def refuse_other_definition(config: Config, run: RunDirectory, round: Round, protocol: Protocol) -> None:
    """Raises StorageError, with the difference, when the policy was judged by another definition before."""
    stage = run.stage(round, f"judge/{protocol}")
    manifest = run.read_manifest(stage)
    if manifest is None:
        return
    changes = [
        f"  {name}: {manifest.get(name, 'absent')!r} there, {value!r} now"
        for name, value in definition(config, run, round, protocol).items()
        if name != "prompt" and manifest.get(name) != value  # its hash tells
    ]
    if changes:
        raise StorageError(
            f"{run.path(stage)}: was judged by another definition. Remove it to judge again (every policy that it is "
            "to be compared with too), or set these back:\n" + "\n".join(changes)
        )


def judgement_rows(config: Config, run: RunDirectory, round: Round, prompt: JudgePrompt) -> pa.Table:
    """One row per judgement: the columns of JUDGEMENT_SCHEMA that are known before the judge is asked.

    Raises UserError when the held-out file is not the one whose prompts were answered, or lacks a reference.
    """
    rows = held_out_rows(config.evaluate.prompts)
    answers = _answers(run, round)
    base = _answers(run, BASE) if prompt.protocol == "pairwise" else {}
    made: list[dict[str, Any]] = []
    for (prompt_id, sample), (source, answer) in answers.items():
        row = _row_of(rows, prompt_id, source, config.evaluate.prompts)
        common = {"prompt_id": prompt_id, "sample": sample}
        if prompt.protocol == "pointwise":
            if not row["reference"]:
                raise UserError(
                    f"{config.evaluate.prompts.path}, prompt {prompt_id!r}, field "
                    f"{config.evaluate.prompts.reference_column!r}: expected a reference answer, found none"
                )
            text = pointwise_prompt(prompt, row, answer)
            shown = {"order": "", "answers": [answer], "reference": row["reference"], "prompt": text}
            made.append({"judgement_id": f"{prompt_id}/{sample}", **common, **shown})
            continue
        for order in ORDERS:
            pair = [base[prompt_id, sample][1], answer]
            pair = pair if order == "base_first" else pair[::-1]
            shown = {"order": order, "answers": pair, "reference": "", "prompt": pairwise_prompt(prompt, row, pair)}
            made.append({"judgement_id": f"{prompt_id}/{sample}/{order}", **common, **shown})
    return pa.Table.from_pylist(made, schema=pa.schema([JUDGEMENT_SCHEMA.field(name) for name in _ASKED]))


def held_out_rows(prompts: PromptsConfig) -> dict[str, PromptRow]:
    """The held-out prompt rows by id, read from their files; a held-out set is small."""
    read_rows = row_reader(prompts, "evaluate.prompts")
    sources = chain.from_iterable(map(read_rows, find_files(prompts.path, "evaluate.prompts.path")))
    rows = (normalize_row(source, prompts) for source in islice(sources, prompts.limit))
    return {row["prompt_id"]: row for row in rows}


def _row_of(rows: dict[str, PromptRow], prompt_id: str, source: str, prompts: PromptsConfig) -> PromptRow:
    """The row of a prompt; refused where it is not what the policies answered (`source`)."""
    row = rows.get(prompt_id)
    if row is None or prompt_text(row["messages"], row["context"]) != source:
        found = "no such prompt" if row is None else "other text"
        raise UserError(
            f"{prompts.path}, prompt {prompt_id!r}: expected what the policies answered, found {found}; the held-out "
            "file changed since: bring it back, or evaluate in a new run_dir"
        )
    return row


def _answers(run: RunDirectory, round: Round) -> dict[tuple[str, int], tuple[str, str]]:
    """(prompt, sample) -> (prompt text, answer) of a policy, in the order of prompts and samples."""
    responses = pyarrow.dataset.dataset(
        run.path(run.stage(round, "evaluate"), "responses"), filesystem=run.arrow_filesystem(), format="parquet"
    )
    table = responses.to_table(
        columns=["prompt_id", "sample", "source", "response"], filter=pyarrow.dataset.field("kind") == "answer"
    )
    rows = table.sort_by([("prompt_id", "ascending"), ("sample", "ascending")]).to_pylist()
    return {(row["prompt_id"], row["sample"]): (row["source"], row["response"]) for row in rows}
