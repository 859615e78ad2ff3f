"""A run that an earlier version began goes on: the version before the modules moved into rooms.

That version's files come from the repository's own history; its command runs with today's packages.

python -m pytest tests/nightly/test_older_run.py
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.helpers.runs import arguments, finish, snapshot, start, write_prompts

BEFORE_THE_ROOMS = "56c6b98"


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it was."""
    command = ["git", "archive", BEFORE_THE_ROOMS, "mipo_ray"]
    archived = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True)
    if archived.returncode != 0:
        pytest.skip(f"no history: {archived.stderr.decode().strip()}")
    directory = tmp_path_factory.mktemp("older")
    with tarfile.open(fileobj=io.BytesIO(archived.stdout)) as archive:
        archive.extractall(directory, filter="data")
    return directory


def test_a_run_of_the_version_before_the_rooms_goes_on(ray_address, tiny_model, older, tmp_path):
    write_prompts(tmp_path / "train.jsonl", "train", 24)
    write_prompts(tmp_path / "held_out.jsonl", "held-out", 6)
    (tmp_path / "recipe.yaml").write_text("{}")
    run_dir = tmp_path / "run"
    options = arguments(run_dir, tiny_model, tmp_path, "generation.sampling.max_tokens=8")

    command = [sys.executable, "-m", "mipo_ray.run", "ray.num_cpus=6", *options, "rounds=1"]
    # A local cluster of its own: the workers of the tests' cluster have this version's package.
    environment = {**os.environ, "PYTHONPATH": str(older)}
    process = subprocess.Popen(
        command, cwd=older, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert "finished in" in finish(process)
    written = snapshot(run_dir)
    results = json.loads((run_dir / "results.json").read_text())

    output = finish(start(ray_address, *options, "rounds=2"))
    for stage in ("base     evaluate", "round 0  generate", "round 0  train   ", "round 0  evaluate"):
        assert f"{stage}  finished before\n" in output
    assert "round 1  evaluate  done in" in output
    after = json.loads((run_dir / "results.json").read_text())
    assert {name: after[name] for name in results} == results
    assert after.keys() == {"base", "0", "1"}
    now = snapshot(run_dir)
    stages = ("base/", "rounds/000/")
    assert {name: now[name] for name in written if name.startswith(stages)} == {
        name: size for name, size in written.items() if name.startswith(stages)
    }
    assert "finished before, nothing to do" in finish(start(ray_address, *options, "rounds=2"))
