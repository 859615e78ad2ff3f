"""What an evaluation counts as its own, where it has the engines to itself and where generation works with them too.

python -m pytest tests/unit/evaluation/test_evaluate_stage.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mipo_ray.config.recipe import load_config
from mipo_ray.evaluation import stage as evaluation
from mipo_ray.generation import sampler
from mipo_ray.monitoring.events import NO_EVENTS
from mipo_ray.ray_cluster.resources import engine_request, resolve
from mipo_ray.session import Session
from mipo_ray.storage.rounds import BASE
from mipo_ray.storage.run_directory import open_run


@pytest.fixture
def session(tmp_path: Path) -> Session:
    config = load_config(None, ["generation.pool.max_size=4", "evaluate.scorers=1"])
    return Session(config, open_run(str(tmp_path)), resolve(config, {"CPU": 8.0, "GPU": 8.0}), NO_EVENTS)


def test_of_shared_engines_an_evaluation_counts_neither_gpus_nor_idle_time(session, monkeypatch) -> None:
    asked: list[sampler.EngineUse] = []
    monkeypatch.setattr(sampler, "watch_actors", lambda *_: None)
    monkeypatch.setattr(sampler, "map_clients", lambda rows, actor, arguments, pool: asked.append(arguments[0]))
    living: Any = SimpleNamespace(
        request=engine_request(session.config, session.resources), class_name="", lease=object
    )
    for shares in (False, True):
        engines = sampler.round_engines(replace(session, living_engines=living, shares_engines=shares), BASE)
        rows: Any = None
        sampler.sample_responses(rows, engines, {}, NO_EVENTS)
    assert [use.gpus for use in asked] == [1.0, 0.0]


def test_of_shared_engines_an_evaluation_notes_the_gpus_of_its_scorers_alone(session, monkeypatch) -> None:
    for name in ("measure_policy", "matrix_of", "read_matrix_rows"):
        monkeypatch.setattr(evaluation, name, lambda *_: {})
    monkeypatch.setattr(evaluation, "measured_rows", lambda *_: SimpleNamespace(prompt_ids=["a"]))
    monkeypatch.setattr(evaluation, "measure", lambda *_, **__: {})
    monkeypatch.setattr(evaluation, "sampled_tokens", lambda *_: 1)
    monkeypatch.setattr(evaluation, "model_commit", lambda _: None)
    monkeypatch.setattr(type(NO_EVENTS), "emit", lambda *_: None)
    held_out: Any = SimpleNamespace(commit=None)
    gpus = [
        evaluation._measure_held_out(replace(session, shares_engines=shares).stage(BASE, "evaluate"), held_out).gpus
        for shares in (False, True)
    ]
    assert gpus == [4.0, 1.0]
