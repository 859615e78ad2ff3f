"""A comparison for people: its table as Markdown, and as one self-contained HTML page with a plot of each measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2

from mipo_ray.comparison.definition import BASE, Comparison
from mipo_ray.comparison.findings import measures_of
from mipo_ray.comparison.outcome import gather
from mipo_ray.comparison.records import ArmOutcome, Outcome
from mipo_ray.config.recipe import result_fields, to_yaml
from mipo_ray.evaluation.figures import format_change, format_moved
from mipo_ray.evaluation.intervals import FEW, Estimate, clusters_behind, is_on_few
from mipo_ray.measures import Measure, format_value, measure_of
from mipo_ray.report.charts import Tick, scale_and_ticks
from mipo_ray.report.run_report import installed_versions
from mipo_ray.storage.records import to_text
from mipo_ray.storage.run_directory import RunDirectory

_WIDTH, _NAMES, _RIGHT, _ROW, _TOP, _BOTTOM = 360.0, 128.0, 14.0, 22.0, 8.0, 24.0


@dataclass(frozen=True)
class Dot:
    """One arm in a plot, in view box units: its name's height, its value and the ends of its interval."""

    label: str
    y: float
    x: float
    low: float
    high: float
    value: str
    kind: str  # base, control or arm: its colour


@dataclass(frozen=True)
class DotChart:
    """All arms in one measure, one below the other, with a dashed line at the base's value (`level`, where it has
    one)."""

    title: str
    dots: list[Dot]
    x_ticks: list[Tick]
    level: float | None
    height: float
    left: float = _NAMES
    right: float = _WIDTH - _RIGHT
    top: float = _TOP
    width: float = _WIDTH

    @property
    def bottom(self) -> float:
        """Where the axis is."""
        return self.height - _BOTTOM


def write_comparison(comparison: Comparison, root: RunDirectory) -> Outcome:
    """Writes comparison.json, comparison.md and comparison.html from what has been measured; returns the first."""
    found = gather(comparison)
    root.write_text("comparison.json", to_text(found))
    root.write_text("comparison.md", markdown(found))
    root.write_text("comparison.html", render(found, comparison))
    return found


def markdown(found: Outcome) -> str:
    """The findings, the control's first, and the table."""
    columns = measures_of(found.arms)
    head = ["arm", *(one.heading for one in columns.values()), "against the control", "seconds"]
    lines = [*found.control, "", *(f"- {line}" for line in found.findings), ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, arm in found.arms.items():
        cells = ["<br>".join(filter(None, cell(arm, key))) for key in columns]
        seconds = f"{sum(arm.seconds.values()):.0f}"
        lines.append("| " + " | ".join([_row_head(name, arm), *cells, against_control(arm), seconds]) + " |")
    return "\n".join([*lines, "", *notes(found)]) + "\n"


def cell(arm: ArmOutcome, measure: str) -> tuple[str, str, str]:
    """One field of the table: the value with its interval, the change from the base, the verdict; "" where there is
    none."""
    entry = arm.measures.get(measure)
    if entry is None:
        return "", "", ""
    value = format_value(entry.value, entry.unit)
    if entry.low is not None and entry.high is not None:
        low, high = (format_value(bound, entry.unit, scale=abs(entry.value)) for bound in (entry.low, entry.high))
        value += f" [{low}, {high}]"
    return value, format_change(entry), entry.verdict or ""


def against_control(arm: ArmOutcome) -> str:
    """How an arm's headline measure compares with the control's; "" for the base, and without a control."""
    differences = (arm.against_control or {}).values()
    return "; ".join(f"{format_moved(one.estimate, one.unit)} {one.verdict}" for one in differences)


def notes(found: Outcome) -> list[str]:
    """What a reader of the table must know, line by line."""
    equal, arms = found.equal, [name for name in found.arms if name != BASE]
    changed = [one for name in arms for one in found.arms[name].measures.values() if one.change is not None]
    alone = sum(one.holm_p_value is None for one in changed)
    behind = found.arms[BASE].measures[found.headline]
    seeds = ", ".join(map(str, found.seeds))
    pairs, batch, epochs = equal.pairs, equal.batch_size, equal.epochs
    over = "" if len(found.seeds) == 1 else ", over all seeds"
    lines = [
        f"Every arm was trained on pairs of the same {pairs} prompts and samples (those that every arm kept), in "
        f"the same order: {equal.steps} optimizer steps of {batch} pairs, {epochs} epoch(s){over}. Seeds: {seeds}. "
        f"Rounds: {found.rounds}.",
        "Every arm was measured on the same held-out prompts and the same held-out pairs.",
        *(
            f"The control {name} has chosen and rejected swapped in {arm.swapped_pairs} of these pairs."
            for name, arm in found.arms.items()
            if arm.control
        ),
        "Each field: value [95 % interval], change from the base [95 % interval, paired by item], and what the change "
        "says. Figures that have no better direction only rose or fell.",
        f"The comparison is about {measure_of(found.headline).title}. Verdicts on an arm's other held-out measures, "
        "which are exploratory, are corrected for their number in that arm (Holm); intervals, and all that compares "
        f"arms, are not: of {alone} comparisons without a correction about {0.05 * alone:.0f} would look like a "
        "difference if there were none.",
        f"Intervals of held-out measures resample what was drawn, {clusters_behind(behind)}"
        + (", and the seeds" if len(found.seeds) > 1 else "")
        + (f"; with fewer than {FEW} of a kind they are a rough guide." if is_on_few(behind) else "."),
        "PMI is judged by the frozen initial model. It can be raised by repeating the context or by length: read it "
        "together with length, copied 3-grams and distinct 2-grams.",
        "Seconds: generation, training and evaluation of the arm; pairs that another arm generated already cost none.",
    ]
    if found.judged and len(found.seeds) > 1:
        lines.append(
            "The judge's figures are not in this table: they are shown for one seed only. Each run has its own in "
            "evaluation.json and report.html."
        )
    if found.unfinished:
        what = "Not measured yet" if len(found.seeds) == 1 else "Not measured with every seed yet"
        lines.append(f"{what}: {', '.join(found.unfinished)}.")
    return lines


def render(found: Outcome, comparison: Comparison) -> str:
    """The comparison as one HTML document: no script, nothing fetched, every text escaped."""
    columns = measures_of(found.arms)
    template = resources.files("mipo_ray.comparison").joinpath("comparison.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    recipes = {"shared by all arms": to_yaml(comparison.shared), "what each arm sets": _overrides(comparison)}
    html = environment.from_string(template).render(
        title=f"mipo-ray comparison: {comparison.shared.model.source}, {len(comparison.arms)} arms",
        found=found,
        columns=columns,
        cell=cell,
        against_control=against_control,
        charts=[dot_chart(found.arms, name, measure) for name, measure in columns.items()],
        notes=notes(found),
        recipes=recipes,
        versions=installed_versions(),
    )
    return html.encode("utf-8", "replace").decode("utf-8")


def dot_chart(arms: Mapping[str, ArmOutcome], name: str, measure: Measure) -> DotChart:
    """A dot with its interval for every arm that has the measure, the base first."""
    shown = {arm: facts for arm, facts in arms.items() if name in facts.measures}
    entries = {arm: facts.measures[name] for arm, facts in shown.items()}
    base = arms[BASE].measures.get(name)
    level = None if base is None else base.value
    if level is None and name.endswith(".net_win"):
        level = 0.0  # the base judged against itself
    reach = [] if level is None else [level]
    estimates = {arm: Estimate.of_value(entry) for arm, entry in entries.items()}
    reach += [figure for one in estimates.values() for figure in (one.value, one.low, one.high)]
    to_x, x_ticks = scale_and_ticks(min(reach), max(reach), _NAMES, _WIDTH - _RIGHT)
    dots = []
    for row, (arm, facts) in enumerate(shown.items()):
        one = estimates[arm]
        dots.append(
            Dot(
                label=arm,
                y=_TOP + (row + 0.5) * _ROW,
                x=to_x(one.value),
                low=to_x(one.low),
                high=to_x(one.high),
                value=format_value(one.value, entries[arm].unit),
                kind=BASE if arm == BASE else "control" if facts.control else "arm",
            )
        )
    return DotChart(
        title=measure.heading,
        dots=dots,
        x_ticks=_thinned(x_ticks),
        level=None if level is None else to_x(level),
        height=_TOP + len(dots) * _ROW + _BOTTOM,
    )


def _overrides(comparison: Comparison) -> str:
    """What each arm sets otherwise than the rest, a line for each key."""
    shared = result_fields(comparison.shared.model_dump(mode="json"))
    lines = []
    for arm, config in comparison.arms.items():
        own = {
            key: value for key, value in result_fields(config.model_dump(mode="json")).items() if shared[key] != value
        }
        lines.append(f"{arm}: {', '.join(f'{key}={value}' for key, value in own.items()) or '(nothing)'}")
    return "\n".join(lines)


def _thinned(ticks: Sequence[Tick]) -> list[Tick]:
    """Ticks whose labels have room side by side."""
    return list(ticks[:: 1 + len(ticks) // 6])


def _row_head(name: str, arm: ArmOutcome) -> str:
    return f"`{name}`<br>{arm.description}"
