"""The report's heat maps: which answers depend on which conditioning, before and after, on one colour scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mipo_ray.evaluation.held_out.mutual_information import pmi_matrix
from mipo_ray.evaluation.intervals import BOOTSTRAP_SAMPLES, Estimate, bootstrap_mean
from mipo_ray.evaluation.resampling import Clusters
from mipo_ray.storage.manifests import Matrices
from mipo_ray.storage.results import rounds_of

WIDTH, LEFT, TOP = 360.0, 30.0, 34.0
_MOST_WITH_NUMBERS = 12  # beyond, a cell is too small for its number
_LEGEND_STEPS = 11

_PARTS = {
    "contexts": (
        "Answers under each user's context",
        "Row i is the answer to question i with user i's context; column j is the same question with user j's context.",
        "user",
    ),
    "prompts": (
        "Answers under each prompt",
        "Row i is the answer to prompt i; column j is prompt j as a whole.",
        "prompt",
    ),
}


@dataclass(frozen=True)
class Cell:
    """One square in view box units; tone is "cool" above zero and "warm" below, opacity its strength in [0, 1]."""

    x: float
    y: float
    tone: str
    opacity: float
    number: str
    title: str


@dataclass(frozen=True)
class HeatMap:
    """One policy's matrix in one judge's eyes; `side` is a cell's, in view box units of width 360."""

    title: str
    summary: str
    side: float
    height: float
    font: float
    cells: list[Cell]
    numbers: list[float]  # middle of each row or column, counted from the first


@dataclass(frozen=True)
class HeatMaps:
    """One part of the matrix over the run, with the legend of the common scale: (tone, opacity) and its ends, nats."""

    name: str
    title: str
    note: str
    column: str
    maps: list[HeatMap]
    legend: list[tuple[str, float]]
    reach: str
    labels: Sequence[str]


def heat_maps(matrices: Mapping[str, Matrices], clusters: Clusters | None = None) -> list[HeatMaps]:
    """Both parts of the matrix: the base, and the newest round in the eyes of the initial model and in its own.

    `matrices`: by policy ("base", "0", ...). Parts that no policy has are left out. clusters: of the held-out prompts.
    """
    return [maps for part in _PARTS if (maps := _maps(part, matrices, clusters)) is not None]


def _maps(part: str, matrices: Mapping[str, Matrices], clusters: Clusters | None) -> HeatMaps | None:
    shown: list[tuple[str, Any]] = []
    labels: Sequence[str] = ()
    prompts: list[str] = []
    if part in matrices.get("base", {}):
        shown.append(("base", matrices["base"][part].initial))
        labels, prompts = matrices["base"][part].labels, matrices["base"][part].prompt_ids
    if rounds := [key for key in rounds_of(matrices) if part in matrices[key]]:
        last = matrices[rounds[-1]][part]
        shown.append((f"round {rounds[-1]}, judged by the initial model", last.initial))
        shown.append((f"round {rounds[-1]}, judged by itself", last.policy))
        labels, prompts = last.labels, last.prompt_ids
    if not shown:
        return None
    title, note, column = _PARTS[part]
    tables = [(name, pmi_matrix(logprobs)) for name, logprobs in shown]
    reach = max(float(np.abs(table).max()) for _, table in tables) or 1.0
    steps = np.linspace(-reach, reach, _LEGEND_STEPS)
    return HeatMaps(
        name=part,
        title=title,
        note=note,
        column=column,
        maps=[_map(name, table, reach, column, _own(table, prompts, clusters)) for name, table in tables],
        legend=[_shade(float(value), reach) for value in steps],
        reach=_figure(reach, reach),
        labels=labels,
    )


def _own(table: Any, prompts: Sequence[str], clusters: Clusters | None) -> Estimate:
    """The mean over the answers under their own conditionings, in nats; the users and questions of the answers are
    resampled, what they are compared with is not."""
    return bootstrap_mean(np.diag(table), prompts, samples=BOOTSTRAP_SAMPLES, seed=0, clusters=clusters)


def _map(name: str, table: Any, reach: float, column: str, of_own: Estimate) -> HeatMap:
    size = len(table)
    side = (WIDTH - LEFT) / size
    own = np.eye(size, dtype=bool)
    likeliest = int((table.argmax(axis=1) == np.arange(size)).sum())
    cells = []
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            tone, opacity = _shade(float(value), reach)
            number = _figure(float(value), reach) if size <= _MOST_WITH_NUMBERS else ""
            title = f"answer {i + 1}, {column} {j + 1}: {_figure(float(value), reach)} nats"
            cells.append(Cell(LEFT + j * side, TOP + i * side, tone, opacity, number, title))
    return HeatMap(
        title=name,
        summary=f"own {column}: {_figure(of_own.value, reach)} [{_figure(of_own.low, reach)}, "
        f"{_figure(of_own.high, reach)}] nats on average; others: "
        f"{_figure(float(table[~own].mean()), reach)}; {likeliest} of {size} answers are likeliest under their own",
        side=side,
        height=TOP + size * side,
        font=min(13.0, side / 2.9),
        cells=cells,
        numbers=[(index + 0.5) * side for index in range(size)],
    )


def _shade(value: float, reach: float) -> tuple[str, float]:
    return ("cool" if value >= 0 else "warm"), round(abs(value) / reach, 3)


def _figure(value: float, reach: float) -> str:
    """With a minus sign, and one decimal where the scale is short."""
    return f"{value:z.{0 if reach >= 20 else 1 if reach >= 2 else 2}f}".replace("-", "\u2212")
