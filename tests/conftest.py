"""Settings of all tests; what those with engines share: a tiny model, one Ray cluster, and the folder of data."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from mipo_ray.ray_cluster.connection import WORKERS_KEPT, address_known_beforehand
from mipo_ray.ray_cluster.protection import on_loopback
from tests.helpers.fake_judge_endpoint import FakeJudgeEndpoint, longer
from tests.helpers.golden_run import JUDGE_KEY, GoldenRun, Place, make_golden_run
from tests.helpers.tiny_model import make_tiny_model

REPOSITORY = Path(__file__).resolve().parents[1]

# No test reaches for the Hub, on a machine that could as on one that cannot. Libraries read it when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# In the background of a shell script Ctrl-C is ignored, also by the processes that the tests would stop with it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No time limit per example: a busy machine must not fail a test of correctness.
settings.register_profile("mipo-ray", deadline=None)
settings.load_profile("mipo-ray")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random Llama with a chat template; tests must not change it."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def test_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Environment of the tests and of every process they start: this package, a cache of their own, no network."""
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("MIPO_RAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        patch.setenv("RAY_DEDUP_LOGS", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="session")
def ray_cluster(test_environment: None) -> Iterator[Any]:
    """One local Ray cluster for the whole session, more logical CPUs than this machine may have cores.

    On loopback, as the commands start theirs. Its processes inherit the environment, so it starts after
    `test_environment`.
    """
    import ray

    with pytest.MonkeyPatch.context() as patch, address_known_beforehand(), on_loopback(True):
        patch.setenv(WORKERS_KEPT, "22")  # as many as the commands keep: each new one would import everything again
        context = ray.init(
            address="local",
            num_cpus=6,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=_free_port(),
            object_store_memory=1024**3,  # bytes
            log_to_driver=True,
        )
    yield context
    ray.shutdown()


@pytest.fixture(scope="session")
def ray_address(ray_cluster: Any) -> str:
    """Where another driver joins the session's cluster."""
    return str(ray_cluster.address_info["gcs_address"])


@pytest.fixture(scope="session")
def golden_run(
    ray_cluster: Any, ray_address: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GoldenRun]:
    """A finished run of two rounds, with tasks, a judge and a tracker; tests must not change it."""
    import ray

    (node,) = ray.nodes()
    metrics = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with FakeJudgeEndpoint(longer, key=JUDGE_KEY).running() as endpoint:
        yield make_golden_run(tmp_path_factory.mktemp("golden"), Place(ray_address, metrics, tiny_model, endpoint))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets beside the repository, ../shared/data."""
    directory = REPOSITORY.parent / "shared" / "data"
    if not directory.is_dir():
        pytest.skip(f"no data sets at {directory}")
    return directory


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
