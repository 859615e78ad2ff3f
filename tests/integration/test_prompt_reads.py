"""Prompt files are checked once, and read once a round.

python -m pytest tests/integration/test_prompt_reads.py
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from mipo_ray.config import load_config
from mipo_ray.errors import UserError
from mipo_ray.generation.requests import condition_prompts
from mipo_ray.monitoring.events import recording
from mipo_ray.planning.plan import Inputs, check_inputs
from mipo_ray.ray_cluster.resources import resolve
from mipo_ray.session import Session
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import open_run
from tests.helpers.opened_files import count_opens


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"prompt": f"Question {index}?", "context": f"I am user {index}."} for index in range(40)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def inputs(tmp_path: Path, tiny_model: Path, prompts: Path) -> Inputs:
    (tmp_path / "recipe.yaml").write_text("{}")
    overrides = [f"run_dir={tmp_path}/run", f"model.path={tiny_model}", "model.max_model_len=256"]
    overrides += [f"prompts.path={prompts}", "evaluate.enabled=false", "generation.sampling.max_tokens=16"]
    config = load_config(tmp_path / "recipe.yaml", overrides)
    return check_inputs(config, open_run(config.run_dir))


def test_a_prompt_file_is_checked_once_and_read_once_a_round(
    ray_cluster: object, prompts: Path, tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with count_opens(prompts) as opens:
        inputs: Inputs = request.getfixturevalue("inputs")
        assert opens.take() == 1
        shutil.copytree(tiny_model, inputs.run.path("rounds/000/train/policy"))
        with recording(inputs.run) as events:
            session = Session(inputs.config, inputs.run, resolve(inputs.config, {"CPU": 6.0}), events)
            for round in session.rounds:
                assert condition_prompts(session, round, inputs.prompts).rows == 40
                assert opens.take() == 1, round
                condition_prompts(session, round, inputs.prompts)  # as a resumed stage does
                assert opens.take() == 0, round


def test_a_prompt_file_that_is_edited_after_the_check_is_refused(
    ray_cluster: object, inputs: Inputs, prompts: Path
) -> None:
    before = prompts.stat()
    prompts.write_text(prompts.read_text().replace("user 7", "user 8", 1))
    os.utime(prompts, ns=(before.st_atime_ns, before.st_mtime_ns))  # its size and its time stay
    assert prompts.stat().st_size == before.st_size
    with recording(inputs.run) as events:
        session = Session(inputs.config, inputs.run, resolve(inputs.config, {"CPU": 6.0}), events)
        with pytest.raises(UserError, match=f"{prompts}: the 40 rows had content hash"):
            condition_prompts(session, Round(0), inputs.prompts)
