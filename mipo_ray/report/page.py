"""The run's report: one self-contained HTML file with the results, the curves and answers to read.

Nothing in it is fetched: style and drawings are inline, there is no script, and every text is escaped by Jinja2. The
templates lie beside this module: `report.html.j2` is the page, the others are its parts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2

from mipo_ray.evaluation.figures import format_change
from mipo_ray.evaluation.intervals import NOT_DISTINGUISHABLE, Estimate, describe_change, word_against
from mipo_ray.measures import HELD_OUT, format_value
from mipo_ray.report.charts import drift_charts, pair_charts, score_charts, training_charts
from mipo_ray.report.cost import ShownStage, run_cost
from mipo_ray.report.flow import flows
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
from mipo_ray.storage.entries import Entries, Evaluation, Results
from mipo_ray.storage.manifests import Matrices
from mipo_ray.storage.pair_statistics import PairStatistics
from mipo_ray.storage.results import rounds_of

_LENGTH_TOLERANCE = 0.2  # a change of mean response length beyond this share of the base is pointed out
_SHOWN_EXAMPLES = 12


@dataclass(frozen=True)
class ReportData:
    """What a report shows. Texts may hold anything a model says; they are escaped.

    results: results.json. train_steps: the metrics.jsonl events of training, each with `round`, `step` (counted
    within its round) and any of loss, reward_margin (nats), reward_accuracy (share), gradient_norm, learning_rate.
    pair_statistics: by the number of the round.
    example_pairs: {prompt, context, chosen, rejected}, rejected being a list of
    {text, mismatched}. answers: {prompt, context, base_answer, base_pmi, final_answer, final_pmi}, PMI in nats per
    response. Context, mismatched and PMI may be None or absent. matrices: by policy ("base", "0", ...). evaluation:
    evaluation.json, of tasks and judge.
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


def render_report(run: ReportData) -> str:
    """The report as one HTML document. Characters that UTF-8 cannot hold are replaced by question marks."""
    compared = comparisons(run.evaluation)
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            headline=headline(compared),
            comparisons=compared,
            summary=summary_sentences(run.results),
            flows=flows(run.stages, run.pair_statistics),
            task_rows=task_rows(run.evaluation),
            policies=policies(run.evaluation),
            definitions=definitions(run.evaluation),
            task_charts=task_charts(run.evaluation),
            judgings=judgings(run.evaluation),
            heat_maps=heat_maps(run.matrices),
            score_charts=score_charts(run.results),
            drift_charts=drift_charts(run.results),
            table=_table(run.results),
            rounds=rounds_of(run.results),
            training_charts=training_charts(run.train_steps),
            pair_tables=pair_tables(run.pair_statistics),
            pair_charts=pair_charts(run.pair_statistics),
            example_pairs=run.example_pairs[:_SHOWN_EXAMPLES],
            answers=run.answers[:_SHOWN_EXAMPLES],
            cost=run_cost(run.stages),
            nats=lambda value: format_value(value, "nats"),
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


def _change_in_words(base: Entries, final: Entries, name: str, unit: str) -> str:
    entry, change = final[name], Estimate.of_change(final[name])
    before = format_value(base[name].value, entry.unit) if name in base else "an unmeasured value"
    move = f"from {before} to {format_value(entry.value, entry.unit)} {unit}".rstrip()
    word = describe_change(change) if change else "went"
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
        change = Estimate.of_change(final[metric])
        if change is not None and describe_change(change) == "rose":
            caveats.append(f"{text} ({format_change(final[metric])})")
    distinct = Estimate.of_change(final["distinct_2"])
    if distinct is not None and describe_change(distinct) == "fell":
        caveats.append(f"they repeat themselves more (distinct 2-grams {format_change(final['distinct_2'])})")
    if not caveats:
        return ["Length, copying, truncation and repetition give no warning."]
    change = Estimate.of_change(final[name])
    rose = change is not None and describe_change(change) == "rose"
    reading = " The rise may be bought by this: read the answers below." if rose else ""
    return [f"But note: {'; '.join(caveats)}.{reading}"]


def _table(results: Results) -> list[dict[str, Any]]:
    """One dict per metric: name, unit, base figure, and the figure, change and word of each round."""
    rows = []
    for name, measure in HELD_OUT.items():
        unit = measure.unit
        base = results.get("base", {}).get(name)
        cells = []
        for key in rounds_of(results):
            entry = results[key].get(name)
            change = Estimate.of_change(entry) if entry else None
            word = describe_change(change) if change else ""
            value = format_value(entry.value, unit) if entry else ""
            cells.append({"value": value, "change": format_change(entry) if entry else "", "word": word})
        if base or any(cell["value"] for cell in cells):
            ceiling = base.ceiling if base else None
            unit_text = unit if ceiling is None else f"{unit}, at most {format_value(ceiling, unit)}"
            figure = format_value(base.value, unit) if base else ""
            rows.append({"name": name, "unit": unit_text, "base": figure, "rounds": cells})
    return rows
