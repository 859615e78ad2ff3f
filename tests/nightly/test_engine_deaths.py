"""A living engine that dies, or stands still: Ray starts it again, and what it was sampling is sampled again.

python -m pytest tests/nightly/test_engine_deaths.py
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import ray.data

from mipo_ray.config.generation import SamplingConfig
from mipo_ray.config.recipe import load_config
from mipo_ray.generation.engine import DEFAULT_SAMPLING, REQUESTS, Sampling
from mipo_ray.generation.living_engine import engines_of_run
from mipo_ray.generation.sampler import policy_engines, sample_responses
from mipo_ray.monitoring.events import recording
from mipo_ray.ray_cluster.resources import Resources
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import open_run
from tests.helpers.engine_processes import engine_processes, wait_until_nothing_is_left
from tests.helpers.runs import events

ROWS = 60  # many more than are under way when the first are answered
GREEDY = Sampling({DEFAULT_SAMPLING: SamplingConfig(temperature=0.0, max_tokens=60)})


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_engines_that_die_are_replaced_and_their_rows_sampled_again(
    ray_cluster: None, tiny_model: Path, tmp_path: Path, fault: signal.Signals
) -> None:
    config = load_config(None, [f"model.path={tiny_model}", "model.max_model_len=128", "generation.stall_minutes=0.1"])
    resources = Resources(on_gpu=False, dtype="float32", gpus_per_engine=0.0, gpus_per_worker=0.0)
    asked = [[{"prompt_token_ids": list(range(20 + row, 60 + row)), "seed": row}] for row in range(ROWS)]
    table = pa.table({"row": list(range(ROWS)), "requests": pa.array(asked, REQUESTS)})
    rows = ray.data.from_arrow([table.slice(row, 2) for row in range(0, ROWS, 2)])
    marker = tmp_path / "killed"

    def kill_once(block: pa.Table) -> pa.Table:
        """Behind the engines: the first block that comes out takes the engine with it, or makes it stand still."""
        if not marker.exists():
            marker.write_text("")
            for process in engine_processes():
                os.kill(process, fault)
        return block

    with recording(open_run(str(tmp_path / "run"))) as writer, engines_of_run(config, resources, most=1) as living:
        heard = writer.at(Round(0), "generate")
        engines = replace(policy_engines(config, str(tiny_model), resources), living=living)
        sampled = sample_responses(rows, engines, GREEDY, heard)
        found = sampled.map_batches(kill_once, batch_format="pyarrow", batch_size=None).take_all()
        again = sample_responses(rows, engines, GREEDY, heard).take_all()
    assert sorted(row["row"] for row in found) == list(range(ROWS))
    answers = {row["row"]: list(row["responses"][0]["token_ids"]) for row in found}
    assert answers == {row["row"]: list(row["responses"][0]["token_ids"]) for row in again}
    assert sum(event["event"] == "engine_start" for event in events(tmp_path / "run")) == 2
    (death,) = [event for event in events(tmp_path / "run") if event["event"] == "engine_death"]
    assert ("did no step for 0.1 minutes" in death["error"]) == (fault == signal.SIGSTOP)
    wait_until_nothing_is_left()
