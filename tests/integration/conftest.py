"""What the integration tests share: a tiny model, one Ray cluster, and the data folder beside the repository."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny_model import make_tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]
# What the real model is measured on (`real_tasks`).
ARC_ITEMS, SVAMP_ITEMS, GSM8K_ITEMS = 500, 100, 50
SVAMP_TOKENS, GSM8K_TOKENS = 48, 64
# Two quiet cores need 4 minutes.
REAL_TASKS_SECONDS = 1800


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random Llama with a chat template; tests must not change it."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session", autouse=True)
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

    Its processes inherit the environment, so it starts after `test_environment`.
    """
    import ray

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
def real_tasks(ray_address: str, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory in which the real 135M model is measured on three tasks at once; tests must not change it.

    Responses are kept short for a CPU.
    """
    from tests.integration.test_evaluation_loop import command
    from tests.integration.test_loop import finish

    directory = tmp_path_factory.mktemp("real-tasks")
    tasks = {
        "arc_easy_likelihood": {"path": f"{shared_data}/arc/arc_easy_test.jsonl", "limit": ARC_ITEMS},
        "svamp": {"path": f"{shared_data}/svamp/SVAMP.json", "limit": SVAMP_ITEMS, "max_tokens": SVAMP_TOKENS},
        "gsm8k": {"path": f"{shared_data}/gsm8k/test.jsonl", "limit": GSM8K_ITEMS, "max_tokens": GSM8K_TOKENS},
    }
    (directory / "recipe.yaml").write_text(f"run_dir: {directory}/run\nmodel: {{max_model_len: 2048}}\n")
    process = command(ray_address, f"{directory}/recipe.yaml", f"tasks={json.dumps(tasks)}")
    print(finish(process, seconds=REAL_TASKS_SECONDS))
    return directory / "run"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets beside the repository, ../shared/data."""
    directory = REPOSITORY.parent / "shared" / "data"
    if not directory.is_dir():
        pytest.skip(f"no data sets at {directory}")
    return directory
