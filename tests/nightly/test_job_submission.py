"""`ray job submit` from the first call to the finished run: Ray's own command line, a cluster that asks for a token.

python -m pytest tests/nightly/test_job_submission.py

The environment is that of cluster/base/environment.env; what runs is the repository as `--working-dir` packs it. One
Ray node: of two on one machine the second unpacks the job's files anew, and the folder that the driver is in is gone.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import requests

from tests.helpers.labelled_cluster import LabelledCluster, labelled_cluster

REPOSITORY = Path(__file__).resolve().parents[2]
NODES = [{"num_cpus": 4}]
TOKEN = secrets.token_hex(32)
ROWS = 320  # so many that generation lasts several times as long as it takes to call `ray job stop`


@pytest.fixture(scope="module")
def cluster(test_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelledCluster]:
    of_the_pods = dict(
        line.split("=", 1) for line in (REPOSITORY / "cluster/base/environment.env").read_text().splitlines()
    )
    variables = {
        **of_the_pods,
        "HF_HOME": str(tmp_path_factory.mktemp("huggingface")),
        "MIPO_RAY_CACHE": os.environ["MIPO_RAY_CACHE"],
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        # `python` and `ray` are those of the tests; the package comes with the job.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONDONTWRITEBYTECODE": "",
    }
    with labelled_cluster(NODES, variables) as started:
        yield started


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A recipe of one round, of the tiny model and its own prompts, where every node sees it."""
    directory = tmp_path_factory.mktemp("volume")
    rows = [
        {"prompt_id": f"row-{i}", "prompt": f"Question {i}?", "context": f"I am user {i}.", "group": f"user-{i}"}
        for i in range(ROWS)
    ]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "run_dir": str(directory / "run"),
        "rounds": 1,
        "model": {"path": str(tiny_model), "max_model_len": 256},
        "prompts": {"path": str(directory / "train.jsonl")},
        "conditioning": {"block_size": 8},
        "generation": {"sampling": {"max_tokens": 64, "min_tokens": 48}, "pool": {"batches_in_flight": 1}},
        "train": {"checkpoint_steps": 10},
        "evaluate": {"enabled": False},
    }
    (directory / "recipe.yaml").write_text(json.dumps(settings))  # which is YAML, too
    return directory / "recipe.yaml"


def ray(cluster: LabelledCluster, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Ray's command line, whose output is one text, with the cluster's environment and these variables."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("ray")), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        env={**cluster.environment, "RAY_API_SERVER_ADDRESS": cluster.dashboard, **variables},
    )


def submit(cluster: LabelledCluster, job: str, options: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Submits the command with the repository as its working directory, as cluster/README.md does."""
    command = ["python", "-m", "mipo_ray.run", *arguments]
    return ray(
        cluster, "job", "submit", "--submission-id", job, "--working-dir", str(REPOSITORY), *options, "--", *command
    )


def status(cluster: LabelledCluster, job: str) -> str:
    """What the job API says of a job: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    answer = requests.get(f"{cluster.dashboard}/api/jobs/{job}", headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["status"])


def stop_when(cluster: LabelledCluster, job: str, condition: Callable[[], bool]) -> str:
    """`ray job stop` at the first moment that `condition` holds; returns the job's logs."""
    deadline = time.monotonic() + 300
    while not condition():
        waits = time.monotonic() < deadline and status(cluster, job) in ("PENDING", "RUNNING")
        assert waits, ray(cluster, "job", "logs", job).stdout
        time.sleep(0.2)
    stopped = ray(cluster, "job", "stop", job)
    assert stopped.returncode == 0, stopped.stdout
    assert f"Job '{job}' was stopped" in ray(cluster, "job", "status", job).stdout
    assert status(cluster, job) == "STOPPED"
    logs = ray(cluster, "job", "logs", job).stdout
    assert "stopped by SIGTERM: the same command resumes this run" in logs
    return logs


def listed(cluster: LabelledCluster, kind: str, condition: str) -> list[dict[str, Any]]:
    """What the state API lists: `kind` is actors or placement-groups, `condition` such as state!=DEAD."""
    found = ray(cluster, "list", kind, "--format", "json", "--filter", condition, "--limit", "1000", "--detail")
    assert found.returncode == 0, found.stdout
    lines = [line for line in found.stdout.splitlines() if line.startswith("[")]
    assert lines or "No resource in the cluster" in found.stdout, found.stdout
    return list(json.loads(lines[-1])) if lines else []


def left_over(cluster: LabelledCluster) -> list[dict[str, Any]]:
    """The living actors and the placement groups that jobs left behind; what has still to end gets a minute.

    Detached actors are Ray Data's own, without CPUs: one of each kind serves the cluster, whichever job made it.
    """
    deadline = time.monotonic() + 60
    while True:
        actors = [actor for actor in listed(cluster, "actors", "state!=DEAD") if not actor["is_detached"]]
        found = actors + listed(cluster, "placement-groups", "state!=REMOVED")
        if not found or time.monotonic() > deadline:
            return found


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and modification time."""
    return {
        str(path.relative_to(directory)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_without_the_token_nobody_gets_in(cluster):
    none, wrong = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}, {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for variables, answer in ((none, "Missing authentication token"), (wrong, "Invalid authentication token")):
        for command in (["job", "submit", "--no-wait", "--", "true"], ["job", "list"]):
            refused = ray(cluster, *command, **variables)
            assert refused.returncode != 0, refused.stdout
            assert answer in refused.stdout
    assert requests.post(f"{cluster.dashboard}/api/jobs/", json={"entrypoint": "true"}).status_code == 401
    jobs = ray(cluster, "job", "list")
    assert jobs.returncode == 0, jobs.stdout
    assert "submission_id" not in jobs.stdout


def test_a_configuration_that_is_refused_fails_the_job(cluster, recipe):
    refused = submit(cluster, "refused", [], str(recipe), "train.beta=-1")
    assert refused.returncode != 0, refused.stdout
    assert "error: train.beta" in refused.stdout
    assert "Job 'refused' failed" in ray(cluster, "job", "status", "refused").stdout
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize(("code", "end"), [(0, "SUCCEEDED"), (3, "FAILED")])
def test_the_submitter_pods_program_follows_a_job_to_its_end(cluster, code, end):
    """Run as KubeRay runs it; the second time, as after an evicted pod, it submits nothing and prints the log again."""
    job = f"followed-{code}"
    entrypoint = f"sh -c 'for i in 1 2 3; do echo line $i; sleep 1; done; exit {code}'"
    variables = {
        **cluster.environment,
        "RAY_DASHBOARD_ADDRESS": cluster.dashboard.removeprefix("http://"),
        "RAY_JOB_SUBMISSION_ID": job,
    }
    command = [sys.executable, str(REPOSITORY / "cluster/base/submit.py"), entrypoint]
    for times in (1, 2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables)
        assert done.returncode == 0, done.stderr
        assert [line for line in done.stdout.splitlines() if line.startswith("line")] == ["line 1", "line 2", "line 3"]
        assert f"{job} ended: {end}" in done.stderr
        assert (f"submitting {job}" in done.stderr) == (times == 1)
    assert status(cluster, job) == end


def test_a_stopped_job_ends_in_order_and_the_same_command_goes_on(cluster, recipe):
    run_dir = recipe.parent / "run"
    generate, train = run_dir / "rounds/000/generate", run_dir / "rounds/000/train"
    logs = []

    assert submit(cluster, "first", ["--no-wait"], str(recipe)).returncode == 0
    logs.append(stop_when(cluster, "first", lambda: len(list(generate.glob("*.parquet"))) > 1))
    assert "round 0  generate  started" in logs[-1]
    assert "round 0  generate  done" not in logs[-1]
    assert not (generate / "manifest.json").exists()
    assert not (run_dir / "lock.json").exists()
    assert left_over(cluster) == []

    assert submit(cluster, "second", ["--no-wait"], str(recipe)).returncode == 0
    logs.append(stop_when(cluster, "second", (train / "ray_train").exists))
    assert "round 0  generate  done in" in logs[-1]
    assert f"of {ROWS}, " in logs[-1]
    assert "round 0  train     started" in logs[-1]
    assert not (train / "manifest.json").exists()
    assert not (run_dir / "lock.json").exists()
    assert left_over(cluster) == []
    finished = snapshot(generate)

    done = submit(cluster, "third", [], str(recipe))
    logs.append(done.stdout)
    assert done.returncode == 0, done.stdout
    assert "round 0  generate  finished before" in done.stdout
    assert "round 0  train     done in" in done.stdout
    assert "Job 'third' succeeded" in ray(cluster, "job", "status", "third").stdout
    assert left_over(cluster) == []
    assert snapshot(generate) == finished
    # A run's own files are read without an actor for their footers (ray_cluster/tables.py).
    assert listed(cluster, "actors", "class_name=FooterReader") == []

    manifest = json.loads((generate / "manifest.json").read_text())
    pairs = pyarrow.parquet.ParquetDataset([generate / name for name in manifest["files"]]).read(["prompt_id"])
    assert Counter(pairs["prompt_id"].to_pylist()) == Counter(f"row-{index}" for index in range(ROWS))
    assert (train / "policy/model.safetensors").exists()

    # The code was the one that travelled: Python left what it compiled beside it.
    packages = cluster.files.glob("*/session_*/runtime_resources/working_dir_files/*/mipo_ray/__pycache__/loop.*.pyc")
    assert list(packages)
    for text in logs:
        assert TOKEN not in text
    for path in run_dir.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
