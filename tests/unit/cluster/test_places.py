"""The files for Slurm, SkyPilot and Anyscale: their shell, their fields, and the commands in them.

Slurm and Ray are stand-ins here (`tests/helpers/fake_slurm.py`); Slurm's own daemons run the script in
tests/nightly/test_slurm.py. SkyPilot's and Anyscale's own packages read the YAML in
tests/nightly/test_cluster_places.py.

python -m pytest tests/unit/cluster/test_places.py
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mipo_ray.config.recipe import load_config
from tests.helpers.fake_slurm import SCRIPT, FakeSlurm

ROOT = Path(__file__).parents[3]
SKYPILOT = yaml.safe_load((ROOT / "cluster" / "skypilot.yaml").read_text())
ANYSCALE = yaml.safe_load((ROOT / "cluster" / "anyscale.yaml").read_text())
SCRIPTS = {"slurm": SCRIPT.read_text(), "skypilot setup": SKYPILOT["setup"], "skypilot run": SKYPILOT["run"]}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_shell_is_well_formed(name: str) -> None:
    """bash reads it, and shellcheck, where it is installed, has nothing to say."""
    checks = [["bash", "-n", "-"]]
    checks += [["shellcheck", "--shell=bash", "-"]] if shutil.which("shellcheck") else []
    for check in checks:
        done = subprocess.run(check, input=SCRIPTS[name], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), check


# Slurm.


def test_ray_starts_on_every_node_and_the_run_on_the_first(tmp_path: Path) -> None:
    """Three nodes: a head on the script's own node and `ray start` on the two others; what stands behind the script
    goes to the run as it is, and Ray is stopped after it."""
    slurm = FakeSlurm(tmp_path)
    code, output = slurm.run("jobs/instructions.yaml", "run_dir=/shared/a run", "rounds=3")
    assert code == 0, output
    head, others = sorted(
        (line for line in slurm.log.splitlines() if line.startswith("srun --")), key=len, reverse=True
    )
    assert "--nodes=1 --ntasks=1 --nodelist=node-a ray start --head --block --node-ip-address=10.0.0.1" in head
    assert "--port=23456 --num-cpus=16 --num-gpus=8" in head
    assert "--nodes=2 --ntasks=2 --exclude=node-a ray start --block --address=10.0.0.1:23456" in others
    assert "python -m mipo_ray.run jobs/instructions.yaml run_dir=/shared/a run rounds=3" in slurm.log
    assert slurm.log.count("srun stopped") == 2
    assert "Ray runs on 3 nodes with 16 CPUs and 8 GPUs each" in output


def test_one_node_needs_no_others(tmp_path: Path) -> None:
    slurm = FakeSlurm(tmp_path, nodes=1)
    assert slurm.run()[0] == 0
    assert slurm.log.count("ray start") == 1


def test_every_process_has_the_same_token_and_no_command_line_shows_it(tmp_path: Path) -> None:
    """Other users of the nodes see command lines, and whoever has the token runs code as this user."""
    slurm = FakeSlurm(tmp_path)
    _, output = slurm.run()
    tokens = re.findall(r"^token of \w+ (\S+) (.*)$", slurm.log, re.MULTILINE)
    assert len({token for token, _ in tokens}) == 1
    assert re.fullmatch(r"[0-9a-f]{64}", tokens[0][0])
    # The driver joins the cluster; the head must not look for one.
    assert [address for _, address in tokens] == ["no address", "no address", "10.0.0.1:23456"]
    calls = [line for line in slurm.log.splitlines() if not line.startswith("token")]
    assert all(tokens[0][0] not in line for line in [*calls, output])
    other = FakeSlurm(tmp_path / "other")
    other.run()
    assert tokens[0][0] not in other.log


def test_the_jobs_exit_code_is_the_runs(tmp_path: Path) -> None:
    assert FakeSlurm(tmp_path, variables={"FAKE_CODE": "2"}).run()[0] == 2


def test_a_signal_goes_to_the_run_which_ends_in_order_before_ray(tmp_path: Path) -> None:
    """Before the time limit Slurm sends SIGTERM to the batch script alone (`--signal=B:TERM@120`)."""
    slurm = FakeSlurm(tmp_path, variables={"FAKE_DRIVER": "stays"})
    process = slurm.start()
    deadline = time.monotonic() + 30
    while "driver listens" not in slurm.log:
        assert time.monotonic() < deadline, slurm.log
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    last = slurm.log.splitlines()[-3:]
    assert last == ["driver stopped", "srun stopped", "srun stopped"]


def test_ray_that_does_not_start_is_told_at_once(tmp_path: Path) -> None:
    slurm = FakeSlurm(tmp_path, variables={"FAKE_RAY": "dies", "FAKE_JOINED": "0"})
    code, output = slurm.run()
    assert code == 2
    assert "Ray ended while it was starting" in output
    assert "mipo_ray.run" not in slurm.log


def test_nodes_that_do_not_join_are_not_waited_for_for_ever(tmp_path: Path) -> None:
    slurm = FakeSlurm(tmp_path, variables={"FAKE_JOINED": "2", "MIPO_RAY_NODE_SECONDS": "1"})
    code, output = slurm.run()
    assert code == 2
    assert "not all of the 3 nodes joined Ray at 10.0.0.1:23456 in time" in output


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    outside = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert (outside.returncode, "sbatch cluster/slurm/run.sbatch" in outside.stderr) == (2, True)
    code, output = FakeSlurm(tmp_path, variables={"MIPO_RAY_ENVIRONMENT": "/nowhere"}).run()
    assert code == 2
    assert "/nowhere: expected a virtual environment with Ray; make setup makes one" in output


# SkyPilot and Anyscale. Their fields as their documentation has them (July and October 2026):
# https://docs.skypilot.co/en/latest/reference/yaml-spec.html, https://docs.anyscale.com/reference/job-api


def test_skypilots_fields() -> None:
    assert SKYPILOT.keys() <= {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "setup", "run"}
    assert SKYPILOT["resources"].keys() <= {"accelerators", "disk_size", "use_spot", "infra", "cpus", "memory"}
    used = set(re.findall(r"\$\{?([A-Z][A-Z_]*)", SKYPILOT["run"])) - {"PATH", "PWD"}
    given = {"SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE"}
    assert used <= {*given, *SKYPILOT["envs"], "RAY_ADDRESS"}
    # What has no default must be given by the user, or SkyPilot refuses the task.
    assert SKYPILOT["envs"]["RUN_DIR"] is SKYPILOT["secrets"]["RAY_AUTH_TOKEN"] is None
    assert (ROOT / SKYPILOT["envs"]["RECIPE"]).is_file()
    assert "make setup ACCELERATOR=gpu" in SKYPILOT["setup"]
    assert ".PHONY: help setup " in (ROOT / "Makefile").read_text()


_FAKE_RAY = """#!/bin/bash
echo "ray $*" >>log
case "$*" in *--head*) for _ in {1..600}; do sleep 0.05; done ;; esac
"""
_FAKE_PYTHON = """#!/bin/bash
if [ "$1" = -c ]; then
    touch log
    for _ in {1..200}; do grep --quiet head log && break || sleep 0.05; done # the head is there first
    echo 2
    exit
fi
echo "python $* at $RAY_ADDRESS" >>log
exit 7
"""


def run_section(place: Path, rank: int) -> tuple[int, list[str]]:
    """SkyPilot's `run` on one of two nodes, with stand-ins for Ray and the driver: exit code, and what was called."""
    folder = place / str(rank) / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name, text in {"ray": _FAKE_RAY, "python": _FAKE_PYTHON}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    given = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    values = {"RUN_DIR": "s3://bucket/run", "RECIPE": "jobs/instructions.yaml", "OVERRIDES": "rounds=3 seed=1"}
    done = subprocess.run(
        ["bash", "-c", SKYPILOT["run"]],
        cwd=place / str(rank),
        env={"PATH": os.environ["PATH"], "SKYPILOT_NODE_RANK": str(rank), **given, **values},
        timeout=60,
    )
    return done.returncode, (place / str(rank) / "log").read_text().splitlines()


def test_skypilots_first_node_runs_and_the_others_join(tmp_path: Path) -> None:
    """The job's exit code is the run's on the first node; another one ends well when the head is gone."""
    code, calls = run_section(tmp_path, 0)
    assert code == 7
    assert any("--head --block --port 6379 --num-gpus 8" in call for call in calls)
    overrides = "jobs/instructions.yaml run_dir=s3://bucket/run rounds=3 seed=1"
    assert f"python -m mipo_ray.run {overrides} at 10.0.0.1:6379" in calls
    code, calls = run_section(tmp_path, 1)
    assert code == 0
    assert calls[0] == "ray health-check --address 10.0.0.1:6379"
    assert calls[1].startswith("ray start --block --address 10.0.0.1:6379 --num-gpus 8")
    assert len(calls) == 2


def test_anyscales_fields() -> None:
    known = {"name", "image_uri", "compute_config", "working_dir", "excludes", "env_vars", "entrypoint", "max_retries"}
    assert ANYSCALE.keys() <= known
    assert ANYSCALE["compute_config"].keys() == {"head_node", "worker_nodes"}
    for node in [ANYSCALE["compute_config"]["head_node"], *ANYSCALE["compute_config"]["worker_nodes"]]:
        assert node.keys() <= {"name", "instance_type", "resources", "min_nodes", "max_nodes", "market_type"}


def commands() -> dict[str, list[str]]:
    """Every run that the files start or show, as words, with values for their variables."""
    found: dict[str, list[str]] = {"anyscale": shlex.split(ANYSCALE["entrypoint"])}
    (shown,) = re.findall(r"OVERRIDES='(.*)'", (ROOT / "cluster" / "skypilot.yaml").read_text())
    found["skypilot"] = [
        "python",
        "-m",
        "mipo_ray.run",
        SKYPILOT["envs"]["RECIPE"],
        "run_dir=s3://b/run",
        *shown.split(),
    ]
    for name in ("slurm/run.sbatch", "anyscale.yaml"):
        text = (ROOT / "cluster" / name).read_text()
        shown = re.sub(r"\\\n# +", " ", text)
        for line in re.findall(r"^#.*(?:python -m mipo_ray\.run|run\.sbatch) (jobs/.*)", shown, re.MULTILINE):
            found[f"{name}: {line}"] = ["python", "-m", "mipo_ray.run", *shlex.split(line)]
    return found


@pytest.mark.parametrize("name", commands())
def test_the_commands_are_of_this_configuration(name: str) -> None:
    words: Any = commands()[name]
    assert words[:3] == ["python", "-m", "mipo_ray.run"]
    overrides = [word.replace("$ANYSCALE_ARTIFACT_STORAGE", "s3://bucket") for word in words[4:]]
    config = load_config(ROOT / words[3], overrides)
    assert config.run_dir != "runs/demo"
    if "anyscale" in name:
        assert config.ray.autoscaling
        assert (config.generation.pool.gpus_per_engine, config.train.gpus_per_worker) == (1, 1)
