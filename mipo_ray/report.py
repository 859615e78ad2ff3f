"""The run's report: one self-contained HTML file with the results, the curves and answers to read.

Nothing in it is fetched: style and drawings are inline, there is no script, and every text is escaped by Jinja2.
Drawings are laid out here, in the units of their SVG view box; `report.html.j2` only writes them down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2

from mipo_ray.evaluation.intervals import describe_change
from mipo_ray.evaluation.results import UNITS, change_of, format_change, format_value, rounds_of

Results = dict[str, dict[str, Any]]

_WIDTH, _HEIGHT = 360.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 10.0, 12.0, 38.0
_LENGTH_TOLERANCE = 0.2  # a change of mean response length beyond this share of the base is pointed out
_SHOWN_EXAMPLES = 12


@dataclass(frozen=True)
class ReportData:
    """What a report shows. Texts may hold anything a model says; they are escaped.

    results: results.json. train_steps: the metrics.jsonl events of training, each with `round`, `step` (counted
    within its round) and any of loss, reward_margin (nats), reward_accuracy (share), gradient_norm, learning_rate.
    stages: {round, stage, seconds, counts: {label: number}}; the base's evaluation has the round "base".
    pair_statistics: one dict per round, label -> value (the round among them), or label -> {reason: count}.
    example_pairs: {prompt, context, mismatched, chosen, rejected}. answers: {prompt, context, base_answer, base_pmi,
    final_answer, final_pmi}, PMI in nats per response. Context, mismatched and PMI may be None or absent.
    """

    title: str
    config_yaml: str
    results: Results
    train_steps: Sequence[dict[str, Any]]
    stages: Sequence[dict[str, Any]]
    pair_statistics: Sequence[dict[str, Any]]
    example_pairs: Sequence[dict[str, Any]]
    answers: Sequence[dict[str, Any]]
    versions: dict[str, str]


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
class Chart:
    """One drawing: the path of a line or interval bars, ticks, round separators and a dashed level line."""

    title: str
    x_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    line: str = ""
    bars: list[Bar] = field(default_factory=list)
    separators: list[float] = field(default_factory=list)
    level: Tick | None = None
    width: float = _WIDTH
    height: float = _HEIGHT
    left: float = _LEFT
    right: float = _WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = _HEIGHT - _BOTTOM


def render_report(run: ReportData) -> str:
    """The report as one HTML document. Characters that UTF-8 cannot hold are replaced by question marks."""
    template = resources.files("mipo_ray").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.from_string(template).render(
        run=run,
        summary=summary_sentences(run.results),
        table=_table(run.results),
        rounds=rounds_of(run.results),
        training_charts=_training_charts(run.train_steps),
        result_charts=_result_charts(run.results),
        example_pairs=run.example_pairs[:_SHOWN_EXAMPLES],
        answers=run.answers[:_SHOWN_EXAMPLES],
        duration=_duration,
        nats=lambda value: format_value(value, "nats"),
    )
    return html.encode("utf-8", "replace").decode("utf-8")


def summary_sentences(results: Results) -> list[str]:
    """What changed from the base to the last round, in plain words; first the finding, then what it may rest on."""
    rounds = rounds_of(results)
    if "base" not in results:
        return ["Nothing was measured on held-out prompts."]
    if not rounds:
        return ["Only the initial model has been measured so far."]
    base, final = results["base"], results[rounds[-1]]
    subject, name = "answer and prompt", "pmi_initial"
    if "context_pmi_initial" in final:
        subject, name = "answer and user context", "context_pmi_initial"
    when = "one round" if len(rounds) == 1 else f"{len(rounds)} rounds"
    finding = f"After {when}, the mutual information between {subject}, judged by the frozen initial model, "
    finding += _change_in_words(base, final, name, "nats per response")
    if "reward_accuracy" in final:
        finding += "; reward accuracy on held-out pairs " + _change_in_words(base, final, "reward_accuracy", "")
    return [finding + ".", *_caveats(base, final, name)]


def _change_in_words(base: Results, final: Results, name: str, unit: str) -> str:
    entry, change = final[name], change_of(final[name])
    before = format_value(base[name]["value"], entry["unit"]) if name in base else "an unmeasured value"
    move = f"from {before} to {format_value(entry['value'], entry['unit'])} {unit}".rstrip()
    word = describe_change(change) if change else "went"
    if word == "not distinguishable":
        return f"is not distinguishable from the base ({move}; change {format_change(entry)})"
    return f"{word} {move} (change {format_change(entry)})"


def _caveats(base: Results, final: Results, name: str) -> list[str]:
    caveats = []
    relative = final["response_tokens"]["value"] / max(base["response_tokens"]["value"], 1e-9) - 1.0
    if abs(relative) > _LENGTH_TOLERANCE:
        caveats.append(f"answers became {abs(relative):.0%} {'shorter' if relative < 0 else 'longer'}")
    for metric, text in (
        ("copy_rate", "more of their text repeats the prompt"),
        ("only_copies", "more of them do nothing but repeat the prompt"),
        ("truncated", "more of them were cut at the length limit"),
    ):
        change = change_of(final[metric])
        if change is not None and describe_change(change) == "rose":
            caveats.append(f"{text} ({format_change(final[metric])})")
    distinct = change_of(final["distinct_2"])
    if distinct is not None and describe_change(distinct) == "fell":
        caveats.append(f"they repeat themselves more (distinct 2-grams {format_change(final['distinct_2'])})")
    if not caveats:
        return ["Length, copying, truncation and repetition give no warning."]
    change = change_of(final[name])
    rose = change is not None and describe_change(change) == "rose"
    reading = " The rise may be bought by this: read the answers below." if rose else ""
    return [f"But note: {'; '.join(caveats)}.{reading}"]


def _table(results: Results) -> list[dict[str, Any]]:
    """One dict per metric: name, unit, base figure, and the figure, change and word of each round."""
    rows = []
    for name, unit in UNITS.items():
        base = results.get("base", {}).get(name)
        cells = []
        for key in rounds_of(results):
            entry = results[key].get(name)
            change = change_of(entry) if entry else None
            word = describe_change(change) if change else ""
            value = format_value(entry["value"], unit) if entry else ""
            cells.append({"value": value, "change": format_change(entry) if entry else "", "word": word})
        if base or any(cell["value"] for cell in cells):
            ceiling = base.get("ceiling") if base else None
            unit_text = unit if ceiling is None else f"{unit}, at most {format_value(ceiling, unit)}"
            figure = format_value(base["value"], unit) if base else ""
            rows.append({"name": name, "unit": unit_text, "base": figure, "rounds": cells})
    return rows


def _training_charts(steps: Sequence[dict[str, Any]]) -> list[Chart]:
    positions, separators = _global_steps(steps)
    if not positions:
        return []
    charts = []
    for name, title, level in (
        ("loss", "DPO loss, nats", (math.log(2), "ln 2")),
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
    to_x, x_ticks = _axis(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT, whole=True)
    reach = [*ys, level[0]] if level else ys
    to_y, y_ticks = _axis(min(reach), max(reach), _HEIGHT - _BOTTOM, _TOP)
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


def _result_charts(results: Results) -> list[Chart]:
    charts = []
    for name, title in (
        ("context_pmi_initial", "answer-context PMI, nats per response"),
        ("pmi_initial", "answer-prompt PMI, nats per response"),
        ("infonce_initial", "InfoNCE on per-token log-probs, nats"),
        ("reward_accuracy", "reward accuracy, share"),
        ("response_tokens", "response length, tokens"),
        ("copy_rate", "copy rate, share"),
    ):
        keys = [key for key in ("base", *rounds_of(results)) if name in results.get(key, {})]
        if keys:
            charts.append(_interval_chart(title, keys, [results[key][name] for key in keys]))
    return charts


def _interval_chart(title: str, keys: Sequence[str], entries: Sequence[dict[str, Any]]) -> Chart:
    ceiling = entries[0].get("ceiling")
    reach = [entry[bound] for entry in entries for bound in ("low", "high", "value")]
    to_y, y_ticks = _axis(min(reach), max([*reach, *([ceiling] if ceiling else [])]), _HEIGHT - _BOTTOM, _TOP)
    step = (_WIDTH - _LEFT - _RIGHT) / len(keys)
    bars = [
        Bar(
            x=_LEFT + (index + 0.5) * step,
            y=to_y(entry["value"]),
            low=to_y(entry["low"]),
            high=to_y(entry["high"]),
            label=format_value(entry["value"], entry["unit"]),
        )
        for index, entry in enumerate(entries)
    ]
    every = math.ceil(len(keys) / 8)
    x_ticks = [Tick(bar.x, key) for index, (bar, key) in enumerate(zip(bars, keys, strict=True)) if index % every == 0]
    level = Tick(to_y(ceiling), "ceiling ln(K + 1)") if ceiling else Tick(bars[0].y, "")
    return Chart(title=title, x_label="base, then rounds", x_ticks=x_ticks, y_ticks=y_ticks, bars=bars, level=level)


def _axis(
    low: float, high: float, start: float, end: float, whole: bool = False
) -> tuple[Callable[[float], float], list[Tick]]:
    """A linear scale from [low, high], widened a little, to [start, end] in the view box, and about five ticks."""
    if low == high:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    elif not whole:
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


def _duration(seconds: float) -> str:
    """Seconds as "0 min 48 s", "12 min 05 s" or "3 h 07 min"."""
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
