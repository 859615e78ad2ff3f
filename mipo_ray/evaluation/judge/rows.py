"""What there is to judge: held-out answers joined with their prompts, one row per judgement; and by which definition.

Nothing here starts an engine.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.dataset

from mipo_ray.config.judge import JudgeConfig, Protocol
from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.judge.prompts import (
    ORDERS,
    VERSIONS,
    JudgePrompt,
    judge_prompt,
    pairwise_prompt,
    pointwise_prompt,
)
from mipo_ray.models.source import check_model, check_sampled_model
from mipo_ray.pairs.filters import prompt_text
from mipo_ray.prompts.check import PromptSummary
from mipo_ray.prompts.public_sets import row_reader
from mipo_ray.prompts.rows import PromptRow, checked_rows
from mipo_ray.storage.manifests import EvaluateFacts, JudgeDefinition, JudgeFacts
from mipo_ray.storage.rounds import BASE, Round, base_and_rounds
from mipo_ray.storage.run_directory import RunDirectory, StorageError
from mipo_ray.tables.parquet import open_table
from mipo_ray.text.thoughts import answer_of

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


def definition(config: Config, run: RunDirectory, round: Round, protocol: Protocol) -> JudgeDefinition:
    """What decides about the judgements of a policy, beside the answers themselves."""
    judge = config.evaluate.judge
    prompt = judge_prompt(judge, protocol)
    policies = {"policy": round} if protocol == "pointwise" else {"base": BASE, "policy": round}
    manifests = {name: run.read_manifest(run.stage(one, "evaluate"), EvaluateFacts) for name, one in policies.items()}
    return JudgeDefinition(
        protocol=protocol,
        version=VERSIONS[protocol],
        model=judge.model,
        prompt_hash=prompt.hash,
        prompt=prompt.text,
        temperature=judge.temperature,
        max_tokens=judge.max_tokens,
        answers={name: None if found is None else found.finished for name, found in manifests.items()},
        reference_column=None if protocol == "pairwise" else config.evaluate.prompts.reference_column,
    )


def refuse_other_definition(config: Config, run: RunDirectory, round: Round, protocol: Protocol) -> None:
    """Raises StorageError, with the difference, when the policy was judged by another definition before."""
    stage = run.stage(round, f"judge/{protocol}")
    manifest = run.read_manifest(stage, JudgeFacts)
    if manifest is None:
        return
    there, now = vars(manifest.facts), vars(definition(config, run, round, protocol))
    changes = [
        f"  {name}: {'not recorded' if there[name] is None else repr(there[name])} there, {value!r} now"
        for name, value in now.items()
        if name != "prompt" and there[name] != value  # its hash tells
    ]
    if changes:
        raise StorageError(
            f"{run.path(stage)}: was judged by another definition. Remove it to judge again (every policy that it is "
            "to be compared with too), or set these back:\n" + "\n".join(changes)
        )


def refuse_other_references(config: Config, run: RunDirectory, held_out: PromptSummary) -> None:
    """Raises UserError, naming file and prompt, where a policy was rated beside other references than those of the
    checked held-out prompts: ratings beside different references are not compared."""
    judge, prompts = config.evaluate.judge, config.evaluate.prompts
    stages = [run.stage(round, "judge/pointwise") for round in base_and_rounds(range(config.rounds))]
    rated = [stage for stage in stages if run.is_finished(stage)]
    if not rated or not judge.is_on or "pointwise" not in judge.protocols:
        return
    rows = held_out_rows(prompts, held_out)
    for stage in rated:
        files = [run.path(stage, name) for name in run.list_parquet(stage)]
        columns = ["prompt_id", "reference"]
        judgements = open_table(files, run.arrow_filesystem(), columns)
        for judgement in judgements.to_table(columns=columns).to_pylist():
            prompt_id, before = judgement["prompt_id"], judgement["reference"]
            now = rows[prompt_id]["reference"] if prompt_id in rows else None
            if now != before:
                found = "no such prompt" if now is None else repr(now)
                raise UserError(
                    f"{prompts.path}, prompt {prompt_id!r}, field {prompts.reference_column!r}: expected the reference "
                    f"that answers were rated beside ({before!r}), found {found}; the held-out file changed since: "
                    f"bring it back, or remove {run.path(stage)} and the ratings of the other policies to rate again"
                )


def judgement_rows(
    config: Config, run: RunDirectory, round: Round, prompt: JudgePrompt, held_out: PromptSummary
) -> pa.Table:
    """One row per judgement: the columns of JUDGEMENT_SCHEMA that are known before the judge is asked.

    `held_out` are the checked held-out prompts. Raises UserError when the held-out file is not what was checked, or
    not the one whose prompts were answered.
    """
    rows = held_out_rows(config.evaluate.prompts, held_out)
    answers = _answers(run, round)
    base = _answers(run, BASE) if prompt.protocol == "pairwise" else {}
    made: list[dict[str, Any]] = []
    for (prompt_id, sample), (source, answer) in answers.items():
        row = _row_of(rows, prompt_id, source, config.evaluate.prompts)
        common = {"prompt_id": prompt_id, "sample": sample}
        if prompt.protocol == "pointwise":
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


def held_out_rows(prompts: PromptsConfig, held_out: PromptSummary) -> dict[str, PromptRow]:
    """The checked held-out prompt rows by id, read from their files; a held-out set is small.

    Raises UserError, naming the file, where one is not what was checked.
    """
    read_rows = row_reader(prompts, "evaluate.prompts")
    return {
        row["prompt_id"]: row
        for file in held_out.files_to_read(prompts)
        for row in checked_rows(file, read_rows(file.source), prompts)
    }


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
    """(prompt, sample) -> (prompt text, answer without thoughts) of a policy, in the order of prompts and samples."""
    columns = ["prompt_id", "sample", "source", "response"]
    path = run.path(run.stage(round, "evaluate"), "responses")
    responses = open_table(path, run.arrow_filesystem(), [*columns, "kind"])
    table = responses.to_table(columns=columns, filter=pyarrow.dataset.field("kind") == "answer")
    rows = table.sort_by([("prompt_id", "ascending"), ("sample", "ascending")]).to_pylist()
    return {(row["prompt_id"], row["sample"]): (row["source"], answer_of(row["response"])) for row in rows}
