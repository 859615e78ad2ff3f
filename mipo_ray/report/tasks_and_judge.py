"""The report's part about tasks and the judge: evaluation.json as sentences, tables, charts and bars.

Any part may be missing; what is there is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mipo_ray.evaluation.figures import format_change
from mipo_ray.evaluation.intervals import NOT_DISTINGUISHABLE, Estimate, describe_change, word_against
from mipo_ray.evaluation.significance import sentence
from mipo_ray.measures import JUDGED, format_value
from mipo_ray.report.charts import Chart, Part, interval_chart
from mipo_ray.storage.entries import Entries, Entry, Evaluated, Evaluation
from mipo_ray.storage.results import rounds_of

PAIRWISE, POINTWISE = "judge_pairwise", "judge_pointwise"
_OUTCOMES = ("win", "tie", "loss")
_DEFINITION = ("kind", "version", "prompt_hash", "data", "limit", "judge")


@dataclass(frozen=True)
class Comparison:
    """The newest round that was measured so against the base: what, the verdict, figures for people and a sentence."""

    round: str
    what: str
    word: str
    before: str
    after: str
    change: str
    sentence: str


@dataclass(frozen=True)
class Score:
    """One policy's figure in the table of tasks; empty texts where there is none."""

    value: str
    interval: str
    change: str
    word: str
    test: str  # McNemar's counts and p-value


@dataclass(frozen=True)
class TaskRow:
    task: str
    metric: str
    n: str
    scores: list[Score]


@dataclass(frozen=True)
class JudgedPolicy:
    """One policy in the judge's eyes: in pairs against the base, or alone, with no outcomes then."""

    policy: str
    outcomes: list[Part]
    net: str
    word: str
    checks: list[tuple[str, str]]  # rating, position bias and so on: name, figure with its interval


@dataclass(frozen=True)
class Judging:
    """A judging protocol: who judged, with which prompt, and its figures of each policy."""

    name: str
    judge: str
    prompt: str
    prompt_hash: str
    policies: list[JudgedPolicy]


def comparisons(evaluation: Evaluation) -> list[Comparison]:
    """What tasks and judge say of the newest round that they measured, each against the base.

    A pair of results that were not made the same way (version, prompt, data or judge) is left out.
    """
    rounds = rounds_of(evaluation)
    found = []
    for name in _names(evaluation):
        measured = [key for key in rounds if name in evaluation[key]]
        if not measured:
            continue
        key = measured[-1]
        result, base = evaluation[key][name], evaluation.get("base", {}).get(name)
        if name == PAIRWISE and "net_win" in result.metrics:
            found.append(_pairwise(key, result))
        elif base is not None and all(getattr(base, field) == getattr(result, field) for field in _DEFINITION):
            metric = main_metric(result)
            entry, before = result.metrics.get(metric), base.metrics.get(metric)
            if entry and before and (change := Estimate.of_change(entry)) is not None:
                what = "the judge's rating" if name == POINTWISE else f"{name} {metric}"
                found.append(_compared(key, what, before, entry, change))
    return found


def headline(found: Sequence[Comparison]) -> str:
    """One plain sentence over all comparisons: where which round is better, worse or not distinguishable. What the
    newest of them was not measured in is said of the round that was."""
    parts = []
    for key in sorted({comparison.round for comparison in found}, key=int, reverse=True):
        of_round = [comparison for comparison in found if comparison.round == key]
        said = []
        for word in ("better", "worse", NOT_DISTINGUISHABLE):
            names = [comparison.what for comparison in of_round if comparison.word == word]
            if names:
                said.append(f"{word} in {', '.join(names)}")
        parts.append(f"round {key} is {'; '.join(said)}")
    return f"Against the base, {'; '.join(parts)}." if parts else ""


def main_metric(result: Evaluated) -> str:
    """The metric that a comparison is about: what the result calls its `metric`, or else its first one."""
    return result.metric or next(iter(result.metrics), "")


def task_rows(evaluation: Evaluation) -> list[TaskRow]:
    """Every metric of every task and of the pointwise judge; a score for the base and for each round."""
    keys = policies(evaluation)
    rows = []
    for name in _names(evaluation):
        if name == PAIRWISE:
            continue
        results = [evaluation[key].get(name) for key in keys]
        metrics = dict.fromkeys(metric for result in results if result for metric in result.metrics)
        for metric in metrics:
            entries = [result.metrics.get(metric) if result else None for result in results]
            counts = dict.fromkeys(f"{entry.n:,}" for entry in entries if entry)
            rows.append(TaskRow(name, metric, ", ".join(counts), [_score(entry) for entry in entries]))
    return rows


def policies(evaluation: Evaluation) -> list[str]:
    """The base, where it was measured, and the rounds in order."""
    return [key for key in ("base", *rounds_of(evaluation)) if key in evaluation]


def definitions(evaluation: Evaluation) -> list[tuple[str, str]]:
    """For each task, how it was measured: name and a line of text, one for each way that was used."""
    lines: dict[tuple[str, str], None] = {}
    for name in _names(evaluation):
        for key in policies(evaluation):
            result = evaluation[key].get(name)
            if result is not None:
                facts = [
                    f"{field.replace('_', ' ')} {value}"
                    for field in _DEFINITION
                    if (value := getattr(result, field)) is not None
                ]
                lines[name, ", ".join(facts)] = None
    return list(lines)


def task_charts(evaluation: Evaluation) -> list[Chart]:
    """The main figure of each task, and the judge's rating, with intervals, of the base and of each round."""
    charts = []
    for name in _names(evaluation):
        measured = [key for key in policies(evaluation) if name in evaluation[key]]
        metric = main_metric(evaluation[measured[-1]][name]) if measured else ""
        keys = [key for key in measured if metric in evaluation[key][name].metrics]
        if keys and name != PAIRWISE:
            entries = [evaluation[key][name].metrics[metric] for key in keys]
            title = f"{name.replace('judge_pointwise', 'judge')}: {metric}, {entries[0].unit}"
            charts.append(interval_chart(title, keys, entries))
    return charts


def judgings(evaluation: Evaluation) -> list[Judging]:
    """The judging protocols with their prompts; the pairwise one with its bars."""
    found = []
    for name in (PAIRWISE, POINTWISE):
        keys = [key for key in policies(evaluation) if name in evaluation[key]]
        if keys:
            newest = evaluation[keys[-1]][name]
            judged = [_judged(key, evaluation[key][name].metrics) for key in keys]
            judge, prompt, prompt_hash = (one or "" for one in (newest.judge, newest.prompt, newest.prompt_hash))
            found.append(Judging(name, judge, prompt, prompt_hash, judged))
    return found


def _names(evaluation: Evaluation) -> list[str]:
    """Tasks in the order of their first appearance, then the judge's protocols."""
    names = list(dict.fromkeys(name for key in policies(evaluation) for name in evaluation[key]))
    return sorted(names, key=lambda name: name in (PAIRWISE, POINTWISE))


def _compared(key: str, what: str, before: Entry, entry: Entry, change: Estimate) -> Comparison:
    old, new = Estimate.of_value(before), Estimate.of_value(entry)
    said = sentence(what, old, new, change, unit=entry.unit, p_value=entry.p_value)
    return Comparison(
        round=key,
        what=what,
        word=entry.verdict or describe_change(change, "higher", entry.p_value),
        before=format_value(before.value, entry.unit),
        after=format_value(entry.value, entry.unit),
        change=format_change(entry),
        sentence=f"The {said.removeprefix('the ')}" if what.startswith("the ") else said,
    )


def _pairwise(key: str, result: Evaluated) -> Comparison:
    metrics, net = result.metrics, result.metrics["net_win"]
    word = _net_word(net)
    shares = ", ".join(
        f"{metrics[name].value:.0%} {said}"
        for name, said in zip(_OUTCOMES, ("won", "tied", "lost"), strict=True)
        if name in metrics
    )
    return Comparison(
        round=key,
        what="the judge's pairwise verdict",
        word=word,
        before="",
        after=f"{format_value(net.value, net.unit, signed=True)} net",
        change=_interval(net, signed=True),
        sentence=f"Judged in pairs, round {key} is {word_against(word, 'the base')}: {shares} (wins less losses "
        f"{_figure(net, signed=True)}, {net.n} items).",
    )


def _judged(key: str, metrics: Entries) -> JudgedPolicy:
    outcomes = [
        Part(name, f"{metrics[name].value:.0%}", 100 * metrics[name].value, name)
        for name in _OUTCOMES
        if name in metrics
    ]
    net = metrics.get("net_win")
    return JudgedPolicy(
        policy="base" if key == "base" else f"round {key}",
        outcomes=outcomes,
        net=_figure(net, signed=True) if net else "",
        word=_net_word(net) if net else "",
        checks=[
            (name.replace("_", " "), _figure(entry, signed=name == "position_bias"))
            for name, entry in metrics.items()
            if name not in (*_OUTCOMES, "net_win")
        ],
    )


def _net_word(net: Entry) -> str:
    """The verdict of a judging in pairs, also where evaluation.json has none yet."""
    return net.verdict or describe_change(Estimate.of_value(net), JUDGED["net_win"].better)


def _score(entry: Entry | None) -> Score:
    if entry is None:
        return Score("", "", "", "", "")
    test = ""
    if entry.p_value is not None:
        test = f"{entry.fixed} fixed, {entry.broken} broken, p = {entry.p_value:.2g}"
    value = format_value(entry.value, entry.unit)
    return Score(value, _interval(entry), format_change(entry), entry.verdict or "", test)


def _figure(entry: Entry, *, signed: bool) -> str:
    return f"{format_value(entry.value, entry.unit, signed=signed)} {_interval(entry, signed=signed)}".rstrip()


def _interval(entry: Entry, *, signed: bool = False) -> str:
    if entry.low is None or entry.high is None:
        return ""
    low, high = (format_value(bound, entry.unit, signed=signed) for bound in (entry.low, entry.high))
    return f"[{low}, {high}]"
