"""A Ray cluster of several labelled nodes on this machine, as a process of its own with ports and files of its own.

python -m tests.helpers.labelled_cluster '[{"num_cpus": 2, "labels": {"mipo.io/role": "head"}}, {"num_cpus": 2}]'

The first node is the head. Prints {"address": ..., "dashboard": ...} when all are there; ends when its input ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LabelledCluster:
    """Where a driver joins, where the dashboard answers, the environment that drivers need, and Ray's own files."""

    address: str
    dashboard: str
    environment: dict[str, str]
    files: Path


@contextlib.contextmanager
def labelled_cluster(
    nodes: list[dict[str, Any]], variables: Mapping[str, str] | None = None
) -> Iterator[LabelledCluster]:
    """Starts the cluster in a process of its own; `nodes` are keyword arguments of `Cluster.add_node`.

    `variables` are added to the environment of all its processes. Without them the cluster asks for no token.
    """
    # Sockets' paths must be short. Ray notes its newest cluster in this folder, which others here must not join.
    with tempfile.TemporaryDirectory(prefix="ray-") as files:
        environment = {**os.environ, "RAY_TMPDIR": files, "RAY_AUTH_MODE": "disabled", **(variables or {})}
        command = [sys.executable, "-m", "tests.helpers.labelled_cluster", json.dumps(nodes)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            started = json.loads(process.stdout.readline())
            yield LabelledCluster(started["address"], started["dashboard"], environment, Path(files))
        finally:
            process.stdin.close()
            process.wait(timeout=60)


def main(nodes: list[dict[str, Any]]) -> None:
    from ray.cluster_utils import Cluster

    head, *others = nodes
    ports = {"dashboard_port": _free_port(), "dashboard_agent_listen_port": _free_port()}
    cluster = Cluster(
        initialize_head=True, head_node_args={**head, **ports, "include_dashboard": True, "dashboard_host": "127.0.0.1"}
    )
    for node in others:
        cluster.add_node(**node)
    started = {"address": cluster.address, "dashboard": f"http://{cluster.webui_url}"}
    print(json.dumps(started), flush=True)
    sys.stdin.read()
    cluster.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
