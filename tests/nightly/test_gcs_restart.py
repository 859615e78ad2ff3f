"""Ray's control service (GCS) ends and starts again: what a cluster keeps with Redis (`long-lived/`), and without.

python -m pytest tests/nightly/test_gcs_restart.py

The half with Redis needs `redis-server` on PATH (Debian's package redis-server). No pod is involved: that KubeRay makes
a new head, and that the driver went with the old one, is not shown here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# A head, one node, and an actor on it; the control service is away for 5 seconds.
PROGRAM = """
import time

import ray
from ray.cluster_utils import Cluster

cluster = Cluster()
head = cluster.add_node(num_cpus=0, include_dashboard=False)
worker = cluster.add_node(num_cpus=2)
cluster.wait_for_nodes()
print("pids", *(p.process.pid for node in (head, worker) for ps in node.all_processes.values() for p in ps), flush=True)
ray.init(address=cluster.address, namespace="restart", log_to_driver=False)

@ray.remote(num_cpus=1)
class Counter:
    def __init__(self):
        self.count = 0
    def next(self):
        self.count += 1
        return self.count

counter = Counter.options(name="counter", lifetime="detached").remote()
print("counted", ray.get(counter.next.remote()), flush=True)
head.kill_gcs_server()
time.sleep(5)
head.start_gcs_server()
print("back", flush=True)
print("counted", ray.get(ray.get_actor("counter").next.remote(), timeout=60), flush=True)
print("nodes", sum(node["Alive"] for node in ray.nodes()), flush=True)
print("new", ray.get(ray.remote(num_cpus=1)(lambda: "task").remote(), timeout=60), flush=True)
"""


@contextlib.contextmanager
def redis() -> Iterator[str]:
    """A Redis of the test's own that keeps nothing on disk; its address."""
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("redis-server is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([server, "--port", str(port), "--save", ""], stdout=subprocess.DEVNULL)
    try:
        time.sleep(1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def run(variables: dict[str, str]) -> tuple[list[str], int]:
    """What the program printed, and its exit code; nothing that it started outlives this call."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as files:
        environment = {**os.environ, "RAY_TMPDIR": files, "RAY_AUTH_MODE": "disabled", **variables}
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, env=environment)
        lines = done.stdout.splitlines()
        pids = [int(pid) for line in lines if line.startswith("pids ") for pid in line.split()[1:]]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                # Only what has this cluster's folder on its command line: a number may be another process's by now.
                if files in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)
        return [line for line in lines if not line.startswith("pids ")], done.returncode


def test_with_redis_nodes_and_actors_are_kept():
    with redis() as address:
        lines, code = run({"RAY_REDIS_ADDRESS": address})
    assert lines == ["counted 1", "back", "counted 2", "nodes 2", "new task"]
    assert code == 0


def test_without_it_a_new_control_service_knows_nothing_and_its_driver_ends():
    """Why a RayJob's submitter submits again: the driver dies at its first question."""
    lines, code = run({})
    assert lines == ["counted 1", "back"]
    assert code != 0
