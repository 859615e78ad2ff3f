"""Every measure once: its name in results.json or evaluation.json, its unit, what it is called, which way is better.

The tables of a run, its page, a comparison and the Prometheus metrics all read these tables. How a figure is written
follows from its unit and its size alone (`format_value`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Direction = Literal["higher", "lower", "neither"]

# Decimals of units whose figures stand in one column; all others go by the figure's size.
DECIMALS = {"share": 3, "tokens": 1}


@dataclass(frozen=True)
class Measure:
    """A figure of a policy.

    title: what it is called in sentences and at the head of a column.
    better: which way is better; a measure that is neither only rises or falls.
    drawing: what stands above its drawing on a run's page, where that is longer than `heading`.
    lowest, highest: of a share that is not between 0 and 1.
    """

    name: str
    unit: str
    title: str
    better: Direction = "neither"
    drawing: str = ""
    lowest: float = 0.0
    highest: float = 1.0

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Between which a share lies; None of what is no share."""
        return (self.lowest, self.highest) if self.unit == "share" else None

    @property
    def change_bounds(self) -> tuple[float, float] | None:
        """Between which the change of a share lies."""
        width = self.highest - self.lowest
        return (-width, width) if self.unit == "share" else None

    @property
    def heading(self) -> str:
        """Title and unit, as at the head of a column."""
        return f"{self.title}, {self.unit}"


def _by_name(*measures: Measure) -> dict[str, Measure]:
    return {measure.name: measure for measure in measures}


def _echo(name: str, title: str) -> Measure:
    """A share of a change: above 1 where the rest fell, below 0 where the part did."""
    return Measure(name, "share", title, lowest=-math.inf, highest=math.inf)


# Of results.json, in the order of its table.
HELD_OUT = _by_name(
    Measure("reward_accuracy", "share", "reward accuracy", "higher"),
    Measure("reward_margin", "nats", "reward margin", "higher"),
    Measure(
        "context_pmi_initial",
        "nats per response",
        "context PMI",
        "higher",
        "answer-context PMI, nats per response",
    ),
    Measure("context_pmi_per_token", "nats per token", "context PMI per token", "higher"),
    Measure("context_pmi_matched", "nats per response", "context PMI, lengths matched", "higher"),
    Measure("context_pmi_adjusted", "nats per response", "context PMI at equal length", "higher"),
    Measure("context_pmi_copy_free", "nats per response", "context PMI without copies", "higher"),
    _echo("context_pmi_echo", "echo share of the context PMI's rise"),
    Measure(
        "pmi_initial",
        "nats per response",
        "leave-one-out PMI",
        "higher",
        "answer-prompt PMI, nats per response",
    ),
    Measure("pmi_initial_per_token", "nats per token", "leave-one-out PMI per token", "higher"),
    Measure("pmi_matched", "nats per response", "leave-one-out PMI, lengths matched", "higher"),
    Measure("pmi_adjusted", "nats per response", "leave-one-out PMI at equal length", "higher"),
    Measure("pmi_copy_free", "nats per response", "leave-one-out PMI without copies", "higher"),
    _echo("pmi_echo", "echo share of the leave-one-out PMI's rise"),
    Measure("infonce_initial", "nats", "InfoNCE", "higher", "InfoNCE on per-token log-probs, nats"),
    Measure("retrieval_initial", "share", "retrieval", "higher"),
    Measure("context_pmi_policy", "nats per response", "the policy's context PMI", "higher"),
    Measure("pmi_policy", "nats per response", "the policy's leave-one-out PMI", "higher"),
    Measure("pmi_policy_per_token", "nats per token", "the policy's leave-one-out PMI per token", "higher"),
    Measure("infonce_policy", "nats", "the policy's InfoNCE", "higher"),
    Measure("retrieval_policy", "share", "the policy's retrieval", "higher"),
    Measure("response_tokens", "tokens", "length", drawing="response length, tokens"),
    Measure("truncated", "share", "cut at the limit", drawing="cut at the length limit, share"),
    Measure("copy_rate", "share", "copied 3-grams", drawing="copy rate, share"),
    Measure("only_copies", "share", "only copies"),
    Measure("refusals", "share", "refusals"),
    Measure("distinct_1", "share", "distinct words", drawing="distinct words in an answer, share"),
    Measure("distinct_2", "share", "distinct 2-grams", drawing="distinct 2-grams in an answer, share"),
    Measure("corpus_distinct_2", "share", "distinct 2-grams in all answers"),
    Measure("self_bleu", "share", "self-BLEU", drawing="self-BLEU (high: answers alike)"),
    Measure("kl_per_token", "nats per token", "KL to the base", drawing="KL to the initial model, nats per token"),
)

# Of evaluation.json: of a task, and of the judge's protocols.
TASKS = _by_name(
    Measure("accuracy", "share", "accuracy", "higher"),
    Measure("accuracy_normalized", "share", "accuracy by log-prob per character", "higher"),
    Measure("no_answer", "share", "no answer", "lower"),
    Measure("truncated", "share", "answers cut at the limit", "lower"),
    Measure("response_tokens", "tokens", "length of an answer"),
)
JUDGED = _by_name(
    Measure("net_win", "share", "net win", "higher", lowest=-1.0),
    Measure("rating", "points", "rating", "higher"),
    Measure("win", "share", "win"),
    Measure("tie", "share", "tie"),
    Measure("loss", "share", "loss"),
    Measure("position_bias", "share", "position bias", lowest=-0.5, highest=0.5),
    Measure("self_consistency", "share", "self consistency"),
    Measure("unreadable", "share", "unreadable"),
)


# What a run is about unless it names another measure: the first that its held-out rows have, as those without a context
# have none of context PMI.
PRIMARY = ("context_pmi_initial", "pmi_initial")
# Of a PMI: which share of its rise sits in copied tokens. There is none without a rise, and no change of it.
ECHO_SHARES = {"context_pmi_echo": "context_pmi_initial", "pmi_echo": "pmi_initial"}
# A measure without an interval tells no change from noise.
WITHOUT_INTERVAL = ("corpus_distinct_2",)


def primary_measure(named: str | None, *, with_context: bool) -> str:
    """The measure that a run is about: the one it names (`evaluate.primary`), or else the first of PRIMARY that rows
    with or without a context have."""
    return named or PRIMARY[0 if with_context else 1]


def measure_of(name: str) -> Measure:
    """A held-out measure, or "task.metric" of evaluation.json, whose title then starts with the task."""
    if name in HELD_OUT:
        return HELD_OUT[name]
    task, _, metric = name.rpartition(".")
    measure = (TASKS | JUDGED)[metric]
    return replace(measure, name=name, title=f"{task} {measure.title}")


def format_value(value: float, unit: str, *, signed: bool = False, scale: float | None = None) -> str:
    """A figure for people, at most 7 characters wide: "0.812", "41.30", "0.0031", "2e-05"; signed: "+0.312".

    `scale` is the size that decides the decimals, for figures that stand side by side; None: the value's own.
    """
    sign = "+" if signed else ""
    size = abs(value) if scale is None else scale
    if value == 0:
        return "0"
    if size < 0.00005 or size >= 999_999.5:
        return f"{value:{sign}.0e}"
    if size >= 999.5:
        decimals = 0
    elif unit in DECIMALS and (unit != "share" or size < 10):
        decimals = DECIMALS[unit]
    else:
        decimals = 2 if size >= 10 else 3 if size >= 0.1 else 4
    return f"{value:{sign}z.{decimals}f}"
