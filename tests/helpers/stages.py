"""Finished stages for tests that need no more than that they are finished, and what they say of themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mipo_ray.config.schema import Config
from mipo_ray.storage.entries import Evaluated
from mipo_ray.storage.manifests import (
    EvaluateFacts,
    Facts,
    GenerateFacts,
    GuardFacts,
    JudgeFacts,
    Manifest,
    TaskDefinition,
    TaskFacts,
    TrainFacts,
    TrainSummary,
    Work,
    kind_of,
)
from mipo_ray.storage.pair_statistics import PairStatistics
from mipo_ray.storage.run_directory import RunDirectory

NOTHING = Evaluated(kind="generative", metrics={})
SUMMARY = TrainSummary(steps=1, pairs=4, tokens=40, first_loss=0.6931, last_loss=0.6, seconds=1.0)
FACTS: dict[type[Facts], Facts] = {
    GenerateFacts: GenerateFacts(pairs=[], statistics=PairStatistics(rows=0, kept=0, dropped={})),
    TrainFacts: TrainFacts(summary=SUMMARY),
    EvaluateFacts: EvaluateFacts(results={}),
    TaskFacts: TaskFacts(definition=TaskDefinition(kind="generative"), name="task", evaluation=NOTHING),
    JudgeFacts: JudgeFacts(name="judge_pairwise", evaluation=NOTHING),
    GuardFacts: GuardFacts(compared=9, broken=[]),
}


def commit(
    run: RunDirectory,
    stage: str,
    config: Config,
    *,
    seconds: float = 1.0,
    files: Sequence[str] | None = None,
    **facts: Any,
) -> Manifest[Facts]:
    """Commits a stage, with these fields of its facts and some values in the others."""
    number = None if stage.startswith("base/") else int(stage.split("/")[1])
    return run.commit(stage, config, Work(number, seconds, replace(FACTS[kind_of(stage)], **facts), files))


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a manifest in place, which then has no checksum, as those of earlier versions have none."""
    values = json.loads(path.read_text())
    values.pop("checksum", None)
    change(values)
    path.write_text(json.dumps(values))
