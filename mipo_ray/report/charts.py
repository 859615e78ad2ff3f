"""The report's drawings, laid out in the units of their SVG view box; `report.html.j2` only writes them down."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mipo_ray.evaluation.intervals import Estimate
from mipo_ray.measures import HELD_OUT, format_value
from mipo_ray.storage.entries import Entry, Results
from mipo_ray.storage.pair_statistics import PairStatistics
from mipo_ray.storage.results import rounds_of

_WIDTH, _HEIGHT = 360.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 10.0, 12.0, 38.0


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Bar:
    """A measured value with its interval, in view box units."""

    x: float
    y: float
    low: float
    high: float
    label: str


@dataclass(frozen=True)
class Area:
    """A histogram's outline; the label names its colour and is empty where there is only one."""

    path: str
    label: str


@dataclass(frozen=True)
class Part:
    """A part of a stacked bar: its name and figure for people, its share of the whole, and the style's class for it."""

    name: str
    figure: str
    percent: float
    tone: str


@dataclass(frozen=True)
class Chart:
    """One drawing: a line, interval bars with a trend, or histograms; ticks, dotted separators, a dashed level line."""

    title: str
    x_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    line: str = ""
    trend: str = ""
    bars: list[Bar] = field(default_factory=list)
    areas: list[Area] = field(default_factory=list)
    separators: list[float] = field(default_factory=list)
    level: Tick | None = None
    width: float = _WIDTH
    height: float = _HEIGHT
    left: float = _LEFT
    right: float = _WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = _HEIGHT - _BOTTOM


def training_charts(steps: Sequence[dict[str, Any]]) -> list[Chart]:
    """Curves of the metrics that training logged, over the steps of all rounds."""
    positions, separators = _global_steps(steps)
    if not positions:
        return []
    charts = []
    for name, title, level in (
        ("loss", "training loss, nats", (math.log(2), "ln 2, where DPO starts")),
        ("reward_margin", "reward margin, nats", (0.0, "0")),
        ("reward_accuracy", "reward accuracy, share", (0.5, "chance")),
        ("gradient_norm", "gradient norm", None),
        ("learning_rate", "learning rate", None),
    ):
        logged = [(x, event[name]) for x, event in positions if event.get(name) is not None]
        points = [(x, float(value)) for x, value in logged if math.isfinite(value)]
        if points:
            charts.append(_line_chart(title, points, separators, level))
    return charts


def _global_steps(steps: Sequence[dict[str, Any]]) -> tuple[list[tuple[int, dict[str, Any]]], list[float]]:
    """Events by step over all rounds, the last event of a step that was logged twice, and where rounds begin."""
    events = {(int(event["round"]), int(event["step"])): event for event in steps}
    positions: list[tuple[int, dict[str, Any]]] = []
    separators: list[float] = []
    offset = 0
    for number in sorted({number for number, _ in events}):
        inside = sorted(step for of_round, step in events if of_round == number)
        if positions:
            separators.append(offset + min(inside[0], 1) - 0.5)
        positions += [(offset + step, events[number, step]) for step in inside]
        offset += inside[-1] + (1 if inside[0] == 0 else 0)
    return positions, separators


def _line_chart(
    title: str, points: Sequence[tuple[float, float]], separators: Sequence[float], level: tuple[float, str] | None
) -> Chart:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    to_x, x_ticks = scale_and_ticks(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT, widen=False, whole=True)
    reach = [*ys, level[0]] if level else ys
    to_y, y_ticks = scale_and_ticks(min(reach), max(reach), _HEIGHT - _BOTTOM, _TOP)
    path = " ".join(f"{'L' if i else 'M'}{to_x(x):.1f},{to_y(y):.1f}" for i, (x, y) in enumerate(points))
    return Chart(
        title=title,
        x_label="step, over all rounds" if separators else "step",
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        line=path if len(points) > 1 else path + "h0.01",  # a line of no length would not show its round cap
        separators=[to_x(x) for x in separators],
        level=Tick(to_y(level[0]), level[1]) if level else None,
    )


def score_charts(results: Results) -> list[Chart]:
    """What the method should raise, of the base and each round, with intervals."""
    return _interval_charts(results, "context_pmi_initial", "pmi_initial", "infonce_initial", "reward_accuracy")


def drift_charts(results: Results) -> list[Chart]:
    """Length, diversity and copying, of the base and each round, with intervals where there are any."""
    return _interval_charts(
        results,
        "response_tokens",
        "truncated",
        "distinct_1",
        "distinct_2",
        "corpus_distinct_2",
        "self_bleu",
        "copy_rate",
        "refusals",
        "kl_per_token",
    )


def _interval_charts(results: Results, *names: str) -> list[Chart]:
    charts = []
    for name in names:
        keys = [key for key in ("base", *rounds_of(results)) if name in results.get(key, {})]
        if keys:
            title = HELD_OUT[name].drawing or HELD_OUT[name].heading
            charts.append(interval_chart(title, keys, [results[key][name] for key in keys]))
    return charts


def interval_chart(title: str, keys: Sequence[str], entries: Sequence[Entry]) -> Chart:
    """One entry of results.json or evaluation.json for each of `keys`; a figure without an interval is a dot alone."""
    ceiling = entries[0].ceiling
    estimates = [Estimate.of_value(entry) for entry in entries]
    reach = [bound for one in estimates for bound in (one.value, one.low, one.high)]
    reach += [ceiling] if ceiling else []
    to_y, y_ticks = scale_and_ticks(min(reach), max(reach), _HEIGHT - _BOTTOM, _TOP)
    step = (_WIDTH - _LEFT - _RIGHT) / len(keys)
    bars = [
        Bar(
            x=_LEFT + (index + 0.5) * step,
            y=to_y(one.value),
            low=to_y(one.low),
            high=to_y(one.high),
            label=format_value(one.value, entry.unit),
        )
        for index, (entry, one) in enumerate(zip(entries, estimates, strict=True))
    ]
    every = math.ceil(len(keys) / 8)
    x_ticks = [Tick(bar.x, key) for index, (bar, key) in enumerate(zip(bars, keys, strict=True)) if index % every == 0]
    level = Tick(to_y(ceiling), "ceiling ln(K + 1)") if ceiling else Tick(bars[0].y, "")
    trend = " ".join(f"{'L' if index else 'M'}{bar.x:.1f},{bar.y:.1f}" for index, bar in enumerate(bars))
    return Chart(
        title=title,
        x_label="base, then rounds",
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        trend=trend if len(bars) > 1 else "",
        bars=bars,
        level=level,
    )


def pair_charts(statistics: Mapping[int, PairStatistics]) -> list[Chart]:
    """Histograms of response lengths and PMI for each round; those without anything to count are left out."""
    charts = []
    for number, of_round in statistics.items():
        if of_round.histograms is None:
            continue
        lengths, pmi = of_round.histograms.tokens, of_round.histograms.pmi
        if any(lengths.chosen):
            series = {"chosen": lengths.chosen, "rejected": lengths.rejected}
            title = f"round {number}: response lengths, % of responses"
            charts.append(_histogram_chart(title, "tokens", lengths.edges, series))
        if any(pmi.counts):
            title = f"round {number}: PMI, % of scored pairs"
            charts.append(_histogram_chart(title, "nats", pmi.edges, {"": pmi.counts}))
    return charts


def _histogram_chart(title: str, unit: str, edges: Sequence[float], series: Mapping[str, Sequence[int]]) -> Chart:
    """Outlines of histograms over the same edges, each as percentages of its own sum; zero is marked inside."""
    to_x, x_ticks = scale_and_ticks(edges[0], edges[-1], _LEFT, _WIDTH - _RIGHT, widen=False)
    percentages = {
        label: [100 * count / total for count in counts] for label, counts in series.items() if (total := sum(counts))
    }
    highest = max(max(values) for values in percentages.values())
    to_y, y_ticks = scale_and_ticks(0.0, highest, _HEIGHT - _BOTTOM, _TOP, widen=False, whole=True)
    areas = []
    for label, values in percentages.items():
        steps = "".join(f"V{to_y(value):.1f}H{to_x(edge):.1f}" for value, edge in zip(values, edges[1:], strict=True))
        areas.append(Area(f"M{to_x(edges[0]):.1f},{to_y(0):.1f}{steps}V{to_y(0):.1f}", label))
    return Chart(
        title=title,
        x_label=unit,
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        areas=areas,
        separators=[to_x(0.0)] if edges[0] < 0 < edges[-1] else [],
    )


def scale_and_ticks(
    low: float, high: float, start: float, end: float, *, widen: bool = True, whole: bool = False
) -> tuple[Callable[[float], float], list[Tick]]:
    """A linear scale from [low, high] to [start, end] in the view box, and about five ticks.

    `widen` leaves a margin at both ends; `whole` puts ticks on whole numbers only.
    """
    if low == high:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    elif widen:
        low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    spacing = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    if whole:
        spacing = max(1.0, round(spacing))

    def scale(value: float) -> float:
        return start + (value - low) / (high - low) * (end - start)

    values = [index * spacing for index in range(math.ceil(low / spacing), math.floor(high / spacing) + 1)]
    decimals = max(0, -math.floor(math.log10(spacing)))
    labels = [f"{value:.{decimals}f}" if decimals < 5 else f"{value:.0e}" for value in values]
    return scale, [Tick(scale(value), label) for value, label in zip(values, labels, strict=True)]
