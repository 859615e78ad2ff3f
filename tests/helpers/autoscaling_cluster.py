"""A Ray cluster that grows and shrinks on this machine, and runs of the command on it, apart from all other processes.

python -m tests.helpers.autoscaling_cluster DIRECTORY '{"NAME": ["mipo_ray.run", "key=value", ...]}' (see `run_apart`)

The cluster starts with its head alone. Ray's own autoscaler (version 2) adds and removes nodes through Ray's fake
provider, whose nodes are raylets on this machine (`fake_nodes`). For each of the runs, one after the other,
DIRECTORY gets NAME.log (what the command printed), NAME.exit (its exit code) and, of the cluster during the run and
until its nodes are gone again, NAME.jsonl (`tests.helpers.cluster_watcher`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.cluster_watcher import HEAD, ROLE, nodes_of

ADDRESS = "127.0.0.1:6379"
DASHBOARD = "http://127.0.0.1:8265"
IDLE_SECONDS = 10
PATIENCE_SECONDS = 120

_HEAD_ID = "f" * 51 + "00000"  # the fake provider's
_ISOLATED = ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "--net", "--uts", "--kill-child"]
# The loopback address is the only one there, so the host must be known by it. Sockets' paths must be short: the
# cluster's files lie under /tmp/ray, which is a folder of the directory ($1). The shell stays, to reap orphans.
_PREPARE = """
ip link set lo up && hostname localhost && mkdir -p /tmp/ray && mount --bind "$1/ray" /tmp/ray || exit
shift
"$@"
exit $?
"""


def why_not_apart() -> str | None:
    """Why this machine does not let the cluster run apart; None where it does."""
    try:
        needed = "ip link set lo up && hostname localhost"
        tried = subprocess.run([*_unshare(), "sh", "-c", needed], stderr=subprocess.PIPE, text=True)
    except FileNotFoundError as error:
        return str(error)
    return tried.stderr.strip() if tried.returncode else None


def run_apart(directory: Path, runs: dict[str, list[str]], timeout: float) -> None:
    """Starts the cluster and makes the runs where no other process, port or /tmp/ray can be seen; all ends with it.

    runs: by name, the module that runs and its arguments.
    """
    for name in ("ray", "home"):
        (directory / name).mkdir()
    command = [sys.executable, "-m", "tests.helpers.autoscaling_cluster", str(directory), json.dumps(runs)]
    settings = {"HOME": f"{directory}/home", "RAY_AUTH_MODE": "disabled", "RAY_enable_autoscaler_v2": "1"}
    with (directory / "cluster.log").open("w") as log:
        subprocess.run(
            [*_unshare(), "sh", "-c", _PREPARE, "sh", str(directory), *command],
            check=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            env={**os.environ, **settings},
        )


def _unshare() -> list[str]:
    return _ISOLATED if os.geteuid() == 0 else [*_ISOLATED, "--map-root-user"]


def cluster_config() -> dict[str, Any]:
    """The cluster's description: as in cluster/, a group of nodes for each phase and a head without logical CPUs.

    A node holds one engine of 2 CPUs and a task beside it, or all training workers; one of the group `gpu` a GPU that
    nobody may use. Sizes are bytes.
    """
    resources = {"CPU": 3, "memory": 8 * 1024**3, "object_store_memory": 200 * 1024**2}
    groups = {
        role: {
            "resources": resources | ({"GPU": 1} if role == "gpu" else {}),
            "labels": {ROLE: role},
            "min_workers": 0,
            "max_workers": most,
            "node_config": {},
        }
        for role, most in (("generate", 2), ("train", 1), ("gpu", 4))
    }
    provider = {
        "type": "external",
        "module": "tests.helpers.fake_nodes.FakeNodes",
        "head_node_id": _HEAD_ID,
        "launch_multiple": True,
        "gcs_address": ADDRESS,
    }
    return {
        "cluster_name": "mipo",
        "provider": provider,
        "max_workers": 7,
        "idle_timeout_minutes": IDLE_SECONDS / 60,
        "head_node_type": HEAD,
        "available_node_types": {
            **groups,
            HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        },
        # What Ray's schema asks for and the fake provider does not read.
        "auth": {},
        "upscaling_speed": 1.0,
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


def main(directory: Path, runs: dict[str, list[str]]) -> None:
    _start(directory)
    for name, arguments in runs.items():
        seen = directory / f"{name}.jsonl"
        watcher = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.cluster_watcher", ADDRESS, DASHBOARD, str(seen)],
            stdin=subprocess.PIPE,
        )
        _wait_for(lambda seen=seen: seen.exists() and '"nodes"' in seen.read_text())
        command = [sys.executable, "-m", *arguments, f"ray.address={ADDRESS}", "ray.autoscaling=true"]
        with (directory / f"{name}.log").open("w") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
        (directory / f"{name}.exit").write_text(str(done.returncode))
        _wait_for(lambda: not any(nodes_of(ADDRESS).values()))
        watcher.communicate()  # it looks once more and ends


def _wait_for(condition: Callable[[], bool]) -> None:
    """Until then, or until it is too late; the tests tell what is missing."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(1)


def _start(directory: Path) -> None:
    """Starts the head, with the autoscaler."""
    (directory / "cluster.json").write_text(json.dumps(cluster_config()))
    ray = str(Path(sys.executable).with_name("ray"))
    head = ["--head", "--node-ip-address=127.0.0.1", "--port=6379", "--num-cpus=0", "--disable-usage-stats"]
    fake = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
        "RAY_NODE_TYPE_NAME": HEAD,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    subprocess.run(
        [ray, "start", *head, "--object-store-memory=200000000", f"--autoscaling-config={directory}/cluster.json"],
        check=True,
        env={**os.environ, **fake},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
