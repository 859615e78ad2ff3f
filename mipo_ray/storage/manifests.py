"""The manifests of finished stages: what is the same of all, and the facts of each kind of stage, as frozen records.

A manifest is one JSON object: stage, finished, seed, config_hash, round, seconds, then the facts, the files, and last
the checksum of all that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Generic, TypeVar

from mipo_ray.storage.entries import Entries, Evaluated
from mipo_ray.storage.gains import Gains
from mipo_ray.storage.pair_statistics import PairStatistics
from mipo_ray.storage.records import RecordError, optional, read_record, to_json

MANIFEST = "manifest.json"
CHECKSUM = "checksum"  # of a manifest, SHA-256
NOTES = "checkpoint"  # of a stage that Ray Data writes row by row: what is written, so that it can be gone on with


@dataclass(frozen=True, kw_only=True)
class GenerateFacts:
    """Of a generate stage: the pairs of a round."""

    pairs: list[str]
    """The Parquet files with the pairs, below the stage; they alone make it up."""
    statistics: PairStatistics
    policy: str | None = optional()
    """The model that the pairs were sampled from; of pairs that existed, the one by whose tokens they are written."""
    policy_commit: str | None = optional()
    """The commit of that model, where it is of the Hub."""
    prompts_commit: str | None = optional()
    """The commit of the prompts, or of the pairs that existed, where they are of the Hub."""
    rows_per_block: int | None = optional()
    """Rows of a block, in which mismatched prompts are drawn."""
    chosen_by: str | None = optional()
    """What chose between the responses to a prompt, where it was a reward and not what they were sampled under."""
    gpus: float | None = optional()
    """How many GPUs the stage reserved at most."""
    quarantined: int | None = optional()
    """How many prompts were set aside because engines died of them; quarantine.jsonl beside the pairs names them."""


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """What a round of training came to, over all workers."""

    steps: int
    """Optimizer steps."""
    pairs: int
    """Distinct pairs trained on, in each of the epochs."""
    tokens: int
    """Of all sequences (prompt and one response) trained on, without padding, in all epochs."""
    first_loss: float
    """Before the first step; in the unit of the objective's loss, which is nats for all but ipo."""
    last_loss: float
    """Of the last step."""
    seconds: float
    """From the loading of the models to the finished export, since the last start."""
    probe_logprobs: list[float] | None = optional()
    """What the policy gives for the probe sequences (`models.probes`), nats: by these an engine proves that it holds
    it."""


@dataclass(frozen=True, kw_only=True)
class TrainFacts:
    """Of a train stage: how a policy was made of the pairs; it lies in `policy` below the stage."""

    summary: TrainSummary
    reference: str | None = None
    """The frozen model that the policy was compared with; None for objectives without one."""
    gpus: float | None = optional()
    """How many GPUs the stage reserved at most."""
    order: str | None = optional()
    """In which the pairs were trained on: "pair_id", a seeded shuffle of all, or "prompts", block by block as they were
    conditioned, and inside a block by pair_id."""
    pair_set: str | None = optional()
    """Which pairs it was trained on, where those were not all (`training.stage.pair_set_hash`)."""
    learning_rate: float | None = optional()
    """At its peak: that of the configuration, halved for each bad round before this one (`guard.when_bad`)."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One part of the held-out mutual-information matrix: M answers, each scored under M conditionings."""

    prompt_ids: list[str]
    """[M], of the rows and of the columns."""
    labels: list[str]
    """[M], what the conditionings say, for people."""
    initial: list[list[float]]
    """[M][M], sums of log-probs in nats by the frozen initial model; rows are answers, columns conditionings."""
    policy: list[list[float]] | None = optional()
    """[M][M], the same by the policy itself; None for the base, of which the two are one."""


Matrices = dict[str, Matrix]  # by part: "prompts", "contexts"


@dataclass(frozen=True, kw_only=True)
class EvaluateFacts:
    """Of an evaluate stage: what a policy said on the held-out prompts, and what was measured of it."""

    policy: str | None = optional()
    """The model that was measured."""
    policy_commit: str | None = optional()
    """The commit of that model, where it is of the Hub."""
    prompts_commit: str | None = optional()
    """The commit of the held-out prompts, where they are of the Hub."""
    responses: int | None = optional()
    """Held-out answers."""
    generated_tokens: int | None = optional()
    """Tokens that were sampled: answers and, for the base, the rejected responses of the held-out pairs."""
    matrix: Matrices = field(default_factory=dict)
    """The parts of the mutual-information matrix that there are enough rows for."""
    results: Entries
    """By measure, as in results.json."""
    gains: Gains | None = optional()
    """Where a round's PMI gained or lost; None of the base."""
    gpus: float | None = optional()
    """How many GPUs the stage reserved at most."""


@dataclass(frozen=True, kw_only=True)
class TaskDefinition:
    """What a task's result was measured by; results of different definitions are not compared.

    A field that an earlier version did not record is None.
    """

    kind: str
    """ "generative", "likelihood" or "choice"."""
    version: int | None = None
    """Of the task's file."""
    prompt_hash: str | None = None
    """12 hex digits of what is asked beside the items."""
    data: str | None = None
    """The path of the items, without a revision of the Hub: what they are, `items_hash` says."""
    limit: int | None = None
    """How many of the first items are measured; None: all."""
    items: int | None = None
    """How many items that are."""
    items_hash: str | None = None
    """12 hex digits of what they ask and what is right, in order."""
    sampling: dict[str, Any] | None = None
    """The fields of `SamplingConfig`; None for a task that samples nothing."""
    extraction: str | None = None
    """How the final answer is read of a response, with the number of the rules; None where none is sampled."""
    metric: str | None = None
    """The metric that a comparison is about."""


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """Of an accuracy task of one policy; its examples lie in `examples` below the stage."""

    policy: str | None = optional()
    """The model that was measured."""
    policy_commit: str | None = optional()
    """The commit of that model, where it is of the Hub."""
    data_commit: str | None = optional()
    """The commit of the items, where they are of the Hub."""
    definition: TaskDefinition
    name: str
    """The task's, by which evaluation.json has it."""
    evaluation: Evaluated
    """What evaluation.json has of it."""


@dataclass(frozen=True, kw_only=True)
class JudgeDefinition:
    """What decides about judgements beside the answers themselves; where the judge runs is no part of it.

    A field that an earlier version did not record is None.
    """

    protocol: str | None = None
    """ "pairwise" or "pointwise"."""
    version: int | None = None
    """Of the protocol."""
    model: str | None = None
    """The judge."""
    prompt_hash: str | None = None
    """12 hex digits of `prompt`."""
    prompt: str | None = None
    """The template of what the judge is asked."""
    temperature: float | None = None
    """That the judge samples at."""
    max_tokens: int | None = None
    """Of a judgement."""
    answers: dict[str, str | None] | None = None
    """When the judged answers were finished, by "base" and "policy", so that answers made again are judged again."""
    reference_column: str | None = optional()
    """The column with the answer that is shown beside a rated one; pointwise alone."""


@dataclass(frozen=True, kw_only=True)
class JudgeFacts(JudgeDefinition):
    """Of the judgement of one policy by one protocol; the judgements lie in the stage's Parquet files."""

    name: str
    """judge_PROTOCOL, by which evaluation.json has it."""
    endpoint: str | None = None
    """Where the judge ran; None: in engines of the run."""
    judgements: int | None = None
    """How many."""
    evaluation: Evaluated
    """What evaluation.json has of it."""


@dataclass(frozen=True, kw_only=True)
class BrokenBound:
    """A figure of a round's policy that is beyond a bound of the guard's."""

    measure: str
    """Of results.json, or "TASK.METRIC" of evaluation.json."""
    value: float
    """What was found, in the measure's unit, as are the others."""
    side: str
    """What was expected: "at least" or "at most" `bound`."""
    bound: float
    """Beyond which the value is."""
    against: str
    """The key of the policy that the bound comes from: "base", or a round's number."""
    theirs: float
    """That policy's figure."""


@dataclass(frozen=True, kw_only=True)
class GuardFacts:
    """Of the guard's verdict on a round."""

    compared: int
    """How many bounds there were."""
    broken: list[BrokenBound]
    """Those that the round's policy broke."""

    @property
    def is_bad(self) -> bool:
        """Whether no round may start from the policy."""
        return bool(self.broken)


Facts = GenerateFacts | TrainFacts | EvaluateFacts | TaskFacts | JudgeFacts | GuardFacts
AnyFacts = TypeVar("AnyFacts", bound=Facts)


@dataclass(frozen=True)
class Work(Generic[AnyFacts]):
    """What a stage hands over to be committed."""

    round: int | None
    """The number of the round; None for the base."""
    seconds: float
    """From the stage's start to its commit; tasks that shared engines all have the same start."""
    facts: AnyFacts
    files: Sequence[str] | None = None
    """The files that make it up, below the stage; None: all that lie there."""


@dataclass(frozen=True)
class Manifest(Generic[AnyFacts]):
    """The manifest of a finished stage."""

    stage: str
    """The stage's directory below the run directory."""
    finished: str
    """When it was committed: UTC, as 2026-01-31T12:00:00Z."""
    seed: int
    """Of the run."""
    config_hash: str
    """Of what in the configuration decides results."""
    round: int | None
    """The number of the round; None for the base."""
    seconds: float
    """From the stage's start to its commit; tasks that shared engines all have the same start."""
    facts: AnyFacts
    """What this kind of stage says of itself; in the file its fields stand among the others."""
    files: dict[str, int]
    """The files that make up the stage, below it: name -> bytes."""

    def to_json(self) -> dict[str, Any]:
        """As the file has it, without the checksum."""
        head = {name: value for name, value in vars(self).items() if name not in ("facts", "files")}
        return {**head, **to_json(self.facts), "files": self.files}

    def to_text(self) -> str:
        """The text of the file: with the checksum of all else last."""
        content = self.to_json()
        return json.dumps({**content, CHECKSUM: _checksum(content)}, indent=2)


@dataclass(frozen=True)
class _Common:
    """The fields of a manifest that are not its facts."""

    stage: str
    finished: str
    seed: int
    config_hash: str
    round: int | None
    seconds: float
    files: dict[str, int]


def read_manifest(kind: type[AnyFacts], text: str, file: str) -> Manifest[AnyFacts]:
    """The manifest of a file's text; raises RecordError, naming the file and the field, where it is no such one, and
    where it is not as it was written. One of an earlier version, which has no checksum, is taken as it is."""
    common = read_record(_Common, text, file)
    facts = read_record(kind, text, file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # in what no field reads
        raise RecordError(f"{file}: expected JSON, found: {error}") from None
    if (noted := content.pop(CHECKSUM, None)) is not None and noted != (found := _checksum(content)):
        raise RecordError(
            f"{file}: expected what was written, with the checksum {str(noted)[:12]}..., found other content, "
            f"with {found[:12]}..."
        )
    return Manifest(**vars(common), facts=facts)


def _checksum(content: dict[str, Any]) -> str:
    """SHA-256 of what a manifest holds, whatever the order of its fields and the space between them."""
    as_read = json.loads(json.dumps(content))
    return sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def kind_of(stage: str) -> type[Facts]:
    """Which facts the manifest of a stage holds, from where the stage lies; raises KeyError for no stage."""
    found: type[Facts] = _KINDS[stage.removeprefix("rounds/").split("/")[1]]
    return found


_KINDS: dict[str, Any] = {
    "generate": GenerateFacts,
    "train": TrainFacts,
    "evaluate": EvaluateFacts,
    "tasks": TaskFacts,
    "judge": JudgeFacts,
    "guard": GuardFacts,
}
