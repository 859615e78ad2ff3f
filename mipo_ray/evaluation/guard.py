"""The guard: a round's figures beside those of the base and of the best policy before it, by bounds. Pure.

A collapse shows in what a PMI is read beside, length, copying, truncation, repetition, answers that become one, the
distance from the initial model, before it shows in the PMI. So each of these is bounded beside the base's figure; what
the run is about, and the tasks, are bounded by the interval of the best policy so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mipo_ray.config.guard import Bound
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.evaluation.intervals import Estimate
from mipo_ray.evaluation.summary import primary_of
from mipo_ray.evaluation.tasks.task_check import CheckedTask
from mipo_ray.measures import measure_of
from mipo_ray.prompts.check import PromptSummary
from mipo_ray.storage.entries import Entries, Evaluated
from mipo_ray.storage.manifests import BrokenBound, GuardFacts
from mipo_ray.storage.rounds import BASE

AT_LEAST, AT_MOST = "at least", "at most"


@dataclass(frozen=True)
class Figures:
    """What was measured of a policy. entries: by measure, those of a task by "TASK.METRIC"; main: which of them must
    not leave the interval of the best policy: the primary measure, and what each task is about."""

    entries: Entries
    main: tuple[str, ...]


def figures_of(held_out: Entries, evaluated: Mapping[str, Evaluated]) -> Figures:
    """The figures of a policy's entries in results.json and evaluation.json, without judgements, which compare with the
    base's answers already."""
    tasks = {name: task for name, task in evaluated.items() if task.kind != "judge"}
    of_tasks = {f"{name}.{metric}": entry for name, task in tasks.items() for metric, entry in task.metrics.items()}
    primary = primary_of(held_out)
    main = [] if primary is None else [primary]
    main += [f"{name}.{task.metric}" for name, task in tasks.items() if task.metric is not None]
    return Figures({**held_out, **of_tasks}, tuple(main))


def verdict(policy: Figures, good: Mapping[str, Figures], bounds: Mapping[str, Bound | None]) -> GuardFacts:
    """Compares a round's policy with `good`: the figures of the base and of every good round before it, by their keys.

    A figure that is on its bound keeps it, and so does one that there is none of, as at equal length where every answer
    grew by as much.
    """
    limits = [*_beside_the_base(policy, good[BASE.key], bounds), *_beside_the_best(policy, good)]
    return GuardFacts(compared=len(limits), broken=[one for one in limits if not _keeps(one)])


def _beside_the_base(policy: Figures, base: Figures, bounds: Mapping[str, Bound | None]) -> Iterator[BrokenBound]:
    """Every limit that a bound of the configuration sets, broken or not."""
    for name, bound in bounds.items():
        if bound is None or name not in policy.entries:
            continue
        value, theirs = policy.entries[name].value, base.entries[name].value
        for kind, amount in bound.items():
            side = AT_LEAST if kind in ("min_ratio", "max_fall") else AT_MOST
            limit = {"max_rise": theirs + amount, "max_fall": theirs - amount}.get(kind, theirs * amount)
            yield BrokenBound(measure=name, value=value, side=side, bound=limit, against=BASE.key, theirs=theirs)


def _beside_the_best(policy: Figures, good: Mapping[str, Figures]) -> Iterator[BrokenBound]:
    """The limits that the intervals of the best policies set, of measures of which more is better, broken or not."""
    for name in policy.main:
        have = {key: figures.entries[name] for key, figures in good.items() if name in figures.entries}
        if measure_of(name).better != "higher" or not have:
            continue
        known = {key: Estimate.of_value(entry) for key, entry in have.items()}
        best = max(known, key=lambda key: known[key].value)
        value, theirs = policy.entries[name].value, known[best]
        yield BrokenBound(measure=name, value=value, side=AT_LEAST, bound=theirs.low, against=best, theirs=theirs.value)


def _keeps(one: BrokenBound) -> bool:
    return one.value >= one.bound if one.side == AT_LEAST else one.value <= one.bound


def check_guard(config: Config, held_out: PromptSummary | None, tasks: Sequence[CheckedTask]) -> None:
    """Raises UserError for a bound over a measure that the run does not compute."""
    if config.guard.when_bad is None or held_out is None:
        return
    metrics = {f"{task.name}.{metric}" for task in tasks for metric in task.task.metrics}
    for name in (name for name, bound in config.guard.bounds.items() if bound is not None):
        if "." in name and name not in metrics:
            raise UserError(
                f"guard.bounds: {name}: expected a metric of the run's tasks (evaluate.tasks): "
                f"{', '.join(sorted(metrics)) or 'it has none'}"
            )
        if name.startswith("context_pmi") and not held_out.rows_with_context:
            raise UserError(
                f"guard.bounds: {name}: expected held-out rows with a context, found none in {held_out.rows} rows of "
                f"{config.evaluate.prompts.path}"
            )


def check_measured(base: Figures, bounds: Mapping[str, Bound | None]) -> None:
    """Raises UserError for a bound over a measure that the base was found to have none of."""
    if missing := [name for name, bound in bounds.items() if bound is not None and name not in base.entries]:
        raise UserError(
            f"guard.bounds: {', '.join(missing)}: expected measures that the held-out prompts have, found none of the "
            "base; take them out of the bounds (NAME: null)"
        )
