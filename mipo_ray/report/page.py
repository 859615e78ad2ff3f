"""The run's report: one self-contained HTML file with the results, the curves and answers to read.

Nothing in it is fetched: style and drawings are inline, there is no script, and every text is escaped by Jinja2. The
templates lie beside this module: `report.html.j2` is the page, the others are its parts.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2

from mipo_ray.evaluation.figures import format_change
from mipo_ray.evaluation.intervals import (
    NOT_DISTINGUISHABLE,
    Estimate,
    change_word,
    clusters_behind,
    describe_change,
    word_against,
)
from mipo_ray.evaluation.resampling import Clusters
from mipo_ray.evaluation.summary import few_text, power_text, primary_of
from mipo_ray.measures import HELD_OUT, format_value, measure_of
from mipo_ray.report.charts import drift_charts, pair_charts, score_charts, training_charts
from mipo_ray.report.cost import ShownStage, run_cost
from mipo_ray.report.effects import effect_rows
from mipo_ray.report.flow import flows
from mipo_ray.report.gains import gain_subject, gain_tables
from mipo_ray.report.guard import Verdicts, bad_keys, guard_rows, guard_sentences
from mipo_ray.report.heatmaps import heat_maps
from mipo_ray.report.pair_samples import pair_tables
from mipo_ray.report.tasks_and_judge import (
    comparisons,
    definitions,
    headline,
    judgings,
    policies,
    task_charts,
    task_rows,
)
from mipo_ray.storage.entries import Entries, Entry, Evaluation, Results
from mipo_ray.storage.gains import Gains
from mipo_ray.storage.manifests import Matrices
from mipo_ray.storage.pair_statistics import PairStatistics
from mipo_ray.storage.results import rounds_of

_LENGTH_TOLERANCE = 0.2  # a change of mean response length beyond this share of the base is pointed out
_SHOWN_EXAMPLES = 12
_JUDGED = "judged by the frozen initial model,"
_SUBJECTS = {
    "context_pmi_initial": f"the mutual information between answer and user context, {_JUDGED}",
    "pmi_initial": f"the mutual information between answer and prompt, {_JUDGED}",
}


@dataclass(frozen=True)
class ReportData:
    """What a report shows. Texts may hold anything a model says; they are escaped.

    results: results.json. train_steps: the metrics.jsonl events of training, each with `round`, `step` (counted
    within its round) and any of loss, reward_margin (nats), reward_accuracy (share), gradient_norm, learning_rate.
    pair_statistics: by the number of the round.
    example_pairs: {prompt, context, chosen, rejected}, rejected being a list of
    {text, mismatched}. answers: {prompt, context, base_answer, base_pmi, final_answer, final_pmi}, PMI in nats per
    response. Context, mismatched and PMI may be None or absent. matrices: by policy ("base", "0", ...). evaluation:
    evaluation.json, of tasks and judge. clusters: the users and questions of the held-out prompts; None: not known.
    verdicts: the guard's, by policy. gains: of the newest round; None where it was not measured. most_moved: answers of
    base and newest round whose PMI rose most and fell most (`gains.most_moved`).
    """

    title: str
    config_yaml: str
    results: Results
    train_steps: Sequence[dict[str, Any]]
    stages: Sequence[ShownStage]
    pair_statistics: Mapping[int, PairStatistics]
    example_pairs: Sequence[dict[str, Any]]
    answers: Sequence[dict[str, Any]]
    versions: dict[str, str]
    matrices: Mapping[str, Matrices] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=dict)
    clusters: Clusters | None = None
    verdicts: Verdicts = field(default_factory=dict)
    gains: Gains | None = None
    most_moved: Sequence[Sequence[dict[str, Any]]] = ((), ())


def render_report(run: ReportData) -> str:
    """The report as one HTML document. Characters that UTF-8 cannot hold are replaced by question marks."""
    bad = bad_keys(run.verdicts)
    compared = comparisons({key: each for key, each in run.evaluation.items() if key not in bad})
    finding, *others = summary_sentences(run.results, bad)
    newest = rounds_of(run.results)[-1:]
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            headline=headline(compared),
            comparisons=compared,
            summary=[finding, *guard_sentences(run.verdicts, run.results), *others],
            bad=bad,
            guard_rows=guard_rows(run.verdicts),
            newest=f"round {newest[0]}, not promoted" if newest and newest[0] in bad else "final",
            flows=flows(run.stages, run.pair_statistics),
            task_rows=task_rows(run.evaluation),
            policies=policies(run.evaluation),
            definitions=definitions(run.evaluation),
            task_charts=task_charts(run.evaluation),
            judgings=judgings(run.evaluation),
            heat_maps=heat_maps(run.matrices, run.clusters),
            score_charts=score_charts(run.results),
            drift_charts=drift_charts(run.results),
            table=_table(run.results),
            effect_rows=effect_rows(run.results),
            shows_gains=run.gains is not None or any(run.most_moved),
            gain_subject=gain_subject(run.gains) if run.gains else "",
            gain_tables=gain_tables(run.gains) if run.gains else [],
            behind=_behind(run.results),
            rounds=rounds_of(run.results),
            training_charts=training_charts(run.train_steps),
            pair_tables=pair_tables(run.pair_statistics),
            pair_charts=pair_charts(run.pair_statistics),
            example_pairs=run.example_pairs[:_SHOWN_EXAMPLES],
            answers=run.answers[:_SHOWN_EXAMPLES],
            cost=run_cost(run.stages),
            nats=lambda value: format_value(value, "nats"),
            moved=lambda value: format_value(value, "nats", signed=True),
        )
    )
    return html.encode("utf-8", "replace").decode("utf-8")


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _template(name: str) -> str:
    return resources.files("mipo_ray.report").joinpath(name).read_text(encoding="utf-8")


def summary_sentences(results: Results, bad: Collection[str] = ()) -> list[str]:
    """What changed from the base to the last round that is not `bad`, in plain words; first the finding, then what it
    may rest on."""
    rounds = [key for key in rounds_of(results) if key not in bad]
    if "base" not in results:
        return ["Nothing was measured on held-out prompts."]
    base = results["base"]
    power = power_text(base)
    could = [f"What the held-out prompts could show: {power}."] if power else []
    could += [f"{few.capitalize()}."] if (few := few_text(base)) else []
    if not rounds:
        so_far = "No round was promoted." if bad else "Only the initial model has been measured so far."
        return [so_far, *could]
    final = results[rounds[-1]]
    name = primary_of(final)
    if name is None:
        return ["The primary measure was not measured."]
    when = "one round" if len(rounds) == 1 else f"{len(rounds)} rounds"
    subject = _SUBJECTS.get(name, measure_of(name).title)
    finding = f"After {when}, {subject} {_change_in_words(base, final, name)}."
    return [finding, *could, *_others(final), *_caveats(base, final, name)]


def _others(final: Entries) -> list[str]:
    """What every other change from the base is."""
    exploratory = sum(entry.holm_p_value is not None for entry in final.values())
    if not exploratory:  # an earlier version measured it
        return []
    return [
        f"That is the measure which the run named beforehand. All others are exploratory: the verdicts on their "
        f"{exploratory} changes are corrected for their number (Holm), their intervals are not."
    ]


def _change_in_words(base: Entries, final: Entries, name: str) -> str:
    entry = final[name]
    before = format_value(base[name].value, entry.unit) if name in base else "an unmeasured value"
    unit = "" if entry.unit == "share" else entry.unit
    move = f"from {before} to {format_value(entry.value, entry.unit)} {unit}".rstrip()
    word = change_word(entry) or "went"
    if word == NOT_DISTINGUISHABLE:
        return f"is {word_against(word, 'the base')} ({move}; change {format_change(entry)})"
    return f"{word} {move} (change {format_change(entry)})"


def _caveats(base: Entries, final: Entries, name: str) -> list[str]:
    caveats = []
    relative = final["response_tokens"].value / max(base["response_tokens"].value, 1e-9) - 1.0
    if abs(relative) > _LENGTH_TOLERANCE:
        caveats.append(f"answers became {abs(relative):.0%} {'shorter' if relative < 0 else 'longer'}")
    for metric, text in (
        ("copy_rate", "more of their text repeats the prompt"),
        ("only_copies", "more of them do nothing but repeat the prompt"),
        ("truncated", "more of them were cut at the length limit"),
    ):
        if metric != name and _moved(final[metric]) == "rose":
            caveats.append(f"{text} ({format_change(final[metric])})")
    if name != "distinct_2" and _moved(final["distinct_2"]) == "fell":
        caveats.append(f"they repeat themselves more (distinct 2-grams {format_change(final['distinct_2'])})")
    if not caveats:
        return ["Length, copying, truncation and repetition give no warning."]
    reading = " The rise may be bought by this: read the answers below." if change_word(final[name]) == "rose" else ""
    return [f"But note: {'; '.join(caveats)}.{reading}"]


def _moved(entry: Entry) -> str:
    """What a change says for itself: a warning does not wait until it stands among twenty."""
    change = Estimate.of_change(entry)
    return describe_change(change) if change is not None else ""


def _behind(results: Results) -> str:
    """How many users and questions the intervals rest on; "" where nobody knows."""
    entries = [entry for policy in results.values() for entry in policy.values() if entry.questions is not None]
    return clusters_behind(entries[0]) if entries else ""


def _table(results: Results) -> list[dict[str, Any]]:
    """One dict per metric: name, unit, base figure, and the figure, change and word of each round."""
    rows = []
    for name, measure in HELD_OUT.items():
        unit = measure.unit
        base = results.get("base", {}).get(name)
        cells = []
        for key in rounds_of(results):
            entry = results[key].get(name)
            word = change_word(entry) if entry else ""
            value = format_value(entry.value, unit) if entry else ""
            cells.append({"value": value, "change": format_change(entry) if entry else "", "word": word})
        if base or any(cell["value"] for cell in cells):
            ceiling = base.ceiling if base else None
            unit_text = unit if ceiling is None else f"{unit}, at most {format_value(ceiling, unit)}"
            figure = format_value(base.value, unit) if base else ""
            rows.append({"name": name, "unit": unit_text, "base": figure, "rounds": cells})
    return rows
