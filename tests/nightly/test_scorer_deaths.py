"""A living scorer that dies: Ray starts it again, and what it was scoring is scored again.

python -m pytest tests/nightly/test_scorer_deaths.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import ray.data

from mipo_ray.config.recipe import load_config
from mipo_ray.evaluation.held_out import scorers
from mipo_ray.evaluation.held_out.scorers import LivingScorer, score_blocks, scorers_of_run
from mipo_ray.evaluation.held_out.stage import RESPONSE_SCHEMA
from mipo_ray.monitoring.events import recording
from mipo_ray.ray_cluster.resources import Resources
from mipo_ray.session import Session
from mipo_ray.storage.rounds import BASE
from mipo_ray.storage.run_directory import open_run

ROWS = 12


class MortalScorer(LivingScorer):
    """The fault: its second block takes the process with it, once."""

    blocks = 0

    def score(self, block: pa.Table) -> pa.Table:
        marker = Path(os.environ["MIPO_RAY_CACHE"]) / "scorer-died"
        self.blocks += 1
        if self.blocks == 2 and not marker.exists():
            marker.write_text("")
            os._exit(1)
        return super().score(block)


@pytest.fixture
def session(ray_cluster: None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.setattr(scorers, "LivingScorer", MortalScorer)
    config = load_config(None, [f"model.path={tiny_model}"])
    resources = Resources(on_gpu=False, dtype="float32", gpus_per_engine=0.0, gpus_per_worker=0.0)
    run = open_run(str(tmp_path / "run"))
    with recording(run) as events, scorers_of_run(config, resources, keeps_scorers=True) as living:
        yield Session(config, run, resources, events, living_scorers=living)


def test_a_scorer_that_dies_is_replaced_and_its_rows_scored_again(session: Session) -> None:
    rows = [
        {
            "prompt_id": f"row-{number}",
            "kind": "answer",
            "conditionings": [[11, 12, 13 + number], [14]],
            "response_token_ids": [21, 22],
            "models": ["initial"],
        }
        for number in range(ROWS)
    ]
    table = pa.Table.from_pylist(rows, schema=RESPONSE_SCHEMA)
    blocks = ray.data.from_arrow([table.slice(start, 3) for start in range(0, ROWS, 3)])
    models = {"initial": session.config.model.source}
    stage = session.stage(BASE, "evaluate")
    first, again = (score_blocks(blocks, models, stage).take_all() for _ in range(2))
    assert (Path(os.environ["MIPO_RAY_CACHE"]) / "scorer-died").exists()
    assert sorted(row["prompt_id"] for row in first) == sorted(row["prompt_id"] for row in rows)
    scores = [{row["prompt_id"]: list(row["logprobs_initial"]) for row in found} for found in (first, again)]
    assert scores[0] == scores[1]
