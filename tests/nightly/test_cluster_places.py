"""SkyPilot's and Anyscale's own packages read the files for them: every field, as at the command line of a user.

They are installed into an environment of the test's own, since what they depend on does not go with what a run needs.
Nothing is started, and no account is asked. Three minutes on two busy cores, most of them for the packages.

python -m pytest tests/nightly/test_cluster_places.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGES = ("skypilot==0.14.1", "anyscale==0.26.112")

_SKYPILOT = """
import json, sys, sky
given = json.loads(sys.argv[2])
overrides = {"env_overrides": given["envs"], "secrets_overrides": given["secrets"]}
task = sky.Task.from_yaml_config(json.loads(sys.argv[1]), **overrides)
(resources,) = task.resources
print(json.dumps([task.name, task.num_nodes, resources.accelerators, task.envs["RUN_DIR"]]))
"""
_ANYSCALE = """
import json, sys
from anyscale.job.models import JobConfig
job = JobConfig.from_dict(json.loads(sys.argv[1]))
workers = job.compute_config.worker_nodes[0]
print(json.dumps([job.name, job.max_retries, workers.max_nodes, job.compute_config.head_node.resources["CPU"]]))
"""
GIVEN = {"envs": [["RUN_DIR", "s3://bucket/run"]], "secrets": [["RAY_AUTH_TOKEN", "token"]]}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with both packages."""
    place = tmp_path_factory.mktemp("places") / "venv"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    install = [place / "bin" / "pip", "install", "--quiet", *PACKAGES]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{', '.join(PACKAGES)} could not be installed here: {done.stderr[-500:]}")
    return place / "bin" / "python"


def read(python: Path, code: str, *values: Any) -> tuple[list[Any], str]:
    """What the code printed as JSON, or nothing and its last words."""
    home = str(python.parents[2])  # both write to it
    words = [str(python), "-c", code, *map(json.dumps, values)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "HOME": home})
    return ([] if done.returncode else json.loads(done.stdout.splitlines()[-1])), done.stderr


def test_skypilot_reads_its_file(python: Path) -> None:
    task = yaml.safe_load((ROOT / "cluster" / "skypilot.yaml").read_text())
    found, problem = read(python, _SKYPILOT, task, GIVEN)
    assert found == ["mipo-ray", 2, {"H100": 8}, "s3://bucket/run"], problem
    found, problem = read(python, _SKYPILOT, task, {**GIVEN, "envs": []})
    assert "RUN_DIR" in problem
    found, problem = read(python, _SKYPILOT, {**task, "node_count": 2}, GIVEN)
    assert not found
    assert "node_count" in problem


def test_anyscale_reads_its_file(python: Path) -> None:
    job = yaml.safe_load((ROOT / "cluster" / "anyscale.yaml").read_text())
    found, problem = read(python, _ANYSCALE, job)
    assert found == ["mipo-ray", 2, 2, 0], problem
    found, problem = read(python, _ANYSCALE, {**job, "retries": 2})
    assert not found
    assert "retries" in problem
