"""A local cluster as the commands start it: where its processes listen, and who can read its token.

python -m pytest tests/integration/test_local_cluster.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# In a process of its own: the tests' own cluster stays what it is.
LISTENING = """
import ipaddress, json, os, pathlib, psutil, ray
from mipo_ray.config.recipe import load_config
from mipo_ray.ray_cluster.connection import connect

connect(load_config())

@ray.remote
class Worker:
    def ping(self):
        return os.getpid()

workers = [Worker.remote() for _ in range(2)]
ray.get([worker.ping.remote() for worker in workers])
processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
found = {}
for process in processes:
    for connection in process.net_connections(kind="inet"):
        if connection.status == psutil.CONN_LISTEN:
            address = ipaddress.ip_address(connection.laddr.ip)
            address = getattr(address, "ipv4_mapped", None) or address
            found.setdefault(process.name(), []).append([str(address), address.is_loopback])
token = pathlib.Path.home() / ".ray" / "auth_token"
print(json.dumps([found, oct(token.stat().st_mode & 0o777), [node["NodeManagerAddress"] for node in ray.nodes()]]))
ray.shutdown()
"""


def test_every_process_listens_on_loopback_and_the_token_is_private(tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", LISTENING],
        capture_output=True,
        text=True,
        env={**variables, "HOME": str(tmp_path)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found, mode, nodes = json.loads(done.stdout.splitlines()[-1])
    assert {"gcs_server", "raylet"} <= found.keys()
    elsewhere = {name: places for name, places in found.items() if not all(loopback for _, loopback in places)}
    assert elsewhere == {}
    assert (mode, nodes) == ("0o600", ["127.0.0.1"])
