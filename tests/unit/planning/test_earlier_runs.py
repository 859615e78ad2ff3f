"""Speeds of earlier rounds, read from metrics.jsonl: what counts, what does not, and why.

python -m pytest tests/unit/planning/test_earlier_runs.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mipo_ray.config.recipe import load_config, to_yaml
from mipo_ray.config.schema import Config
from mipo_ray.planning.earlier_runs import EarlierRuns, Measured, measured_rounds, read_earlier_runs
from mipo_ray.storage.run_directory import StorageError, open_run


def stage(number: int, name: str, *events: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    """The events of one attempt that was committed."""
    inner = [{"event": "stage_start"}, *events, {"event": "stage", "stage_seconds": seconds}]
    return [{"time": 0.0, "round": number, "stage": name, **event} for event in inner]


def generated(tokens: int, engine: str = "a", **more: float) -> dict[str, Any]:
    return {"event": "generated", "generated_tokens": tokens, "engine": engine, **more}


def round_of(number: int, *, idle: bool = False) -> list[dict[str, Any]]:
    """Two engines, 100 rows, 3,000 tokens in 50 s; 40 kept pairs in two epochs, 8,000 tokens in 20 s."""
    more = {"idle_gpu_seconds": 0.0} if idle else {}
    pairs = {"event": "pairs", "rows": 100, "kept": 40, "generated_tokens": 3000}
    steps = [{"event": "train_step", "pairs": 40, "forward_tokens": 4000, **more} for _ in range(2)]
    sampled = [generated(1000, "a", **more), generated(2000, "b", **more)]
    return [*stage(number, "generate", *sampled, pairs, seconds=50.0), *stage(number, "train", *steps, seconds=20.0)]


def config_of(*overrides: str) -> Config:
    return load_config(None, ["train.epochs=2", "train.num_workers=4", *overrides])


def write_run(place: Path, config: Config, events: list[dict[str, Any]]) -> Path:
    place.mkdir()
    (place / "config.yaml").write_text(to_yaml(config))
    (place / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return place


def read(config: Config, own: Path, *named: Path) -> EarlierRuns:
    overrides = config.model_copy(
        update={"cost": config.cost.model_copy(update={"earlier_runs": tuple(map(str, named))})}
    )
    return read_earlier_runs(overrides, open_run(str(own)))


def test_a_round_by_hand() -> None:
    (found,) = measured_rounds(config_of(), round_of(0))
    assert found == Measured(
        rounds=1,
        on_gpu=False,
        rows=100,
        kept=40,
        generated_tokens=3000,
        generate_seconds=2 * 50.0,
        trained_tokens=4000,
        train_seconds=4 * 20.0 / 2,
    )
    # 10 rows of three epochs.
    assert found.tokens(10, 3) == (300, 1200)
    assert found.seconds(10, 3) == (10, 12)


def test_gpus_are_those_of_an_engine_and_of_a_worker() -> None:
    config = config_of("generation.pool.tensor_parallel_size=2", "train.gpus_per_worker=0.5")
    (found,) = measured_rounds(config, round_of(0, idle=True))
    assert found.on_gpu
    assert (found.generate_seconds, found.train_seconds) == (2 * 50 * 2, 4 * 20 * 0.5 / 2)
    (own,) = measured_rounds(config_of("generation.pool.gpus_per_engine=3"), round_of(0, idle=True))
    assert own.generate_seconds == 2 * 50 * 3


def test_of_an_interrupted_stage_the_last_attempt_counts_where_it_did_the_whole() -> None:
    """The first attempt sampled 1,000 tokens, which were sampled again: they are not counted twice. An attempt that
    went on with the files of another one has too few tokens for its pairs, and does not count."""
    start = {"time": 0.0, "round": 0, "stage": "generate", "event": "stage_start"}
    lost = {**start, **generated(1000)}
    again = [start, lost, *round_of(0)]
    assert measured_rounds(config_of(), again) == measured_rounds(config_of(), round_of(0))
    resumed = [event for event in round_of(0) if event.get("generated_tokens") != 1000]
    assert measured_rounds(config_of(), resumed) == []


def test_an_unfinished_round_does_not_count() -> None:
    unfinished = [event for event in round_of(1) if not (event["stage"] == "train" and event["event"] == "stage")]
    assert len(measured_rounds(config_of(), [*round_of(0), *unfinished])) == 1


def test_the_runs_own_rounds_and_those_of_named_runs_are_added(tmp_path: Path) -> None:
    config = config_of()
    own = write_run(tmp_path / "own", config, round_of(0))
    other = write_run(tmp_path / "other", config, [*round_of(0), *round_of(1)])
    found = read(config, own, other)
    assert (found.places(on_gpu=False), found.not_used(on_gpu=False)) == ((str(own), str(other)), [])
    measured = found.measured(on_gpu=False)
    assert measured is not None
    assert (measured.rounds, measured.rows, measured.generated_tokens) == (3, 300, 9000)
    assert found.measured(on_gpu=True) is None
    assert found.not_used(on_gpu=True) == [f"{place}: CPUs there, GPUs here" for place in (other, own)]
    assert read(config, tmp_path / "nothing yet").rounds == ()


def test_a_run_that_is_not_like_this_one_is_left_out_with_the_reason(tmp_path: Path) -> None:
    """The number of engines may differ; the length of answers must not. A run that the user did not name is not
    mentioned."""
    own, config = tmp_path / "own", config_of()
    alike = write_run(tmp_path / "alike", config_of("generation.pool.max_size=7"), round_of(0))
    longer = write_run(tmp_path / "longer", config_of("generation.sampling.max_tokens=300"), round_of(0))
    found = read(config, own, alike, longer)
    assert found.places(on_gpu=False) == (str(alike),)
    assert found.left_out == (f"{longer}: generation.sampling.max_tokens is 300 there, 48 here",)
    empty = write_run(tmp_path / "empty", config, [])
    assert read(config, own, empty).left_out == (f"{empty}: no finished round in its metrics.jsonl",)
    assert read(config, longer).left_out == ()
    other = write_run(tmp_path / "other", config, [{"event": "pairs", "round": 0, "stage": "generate"}, *round_of(0)])
    with (other / "metrics.jsonl").open("a") as file:
        file.write("5\n")
    (reason,) = read(config, own, other).left_out
    assert "its metrics.jsonl is not one of this version" in reason


def test_a_place_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cost\.earlier_runs: .*expected a run directory, found no config\.yaml"):
        read(config_of(), tmp_path / "own", tmp_path / "no run")
