"""Tests with real vLLM, Ray and DeepSpeed; they share the fixtures of tests/conftest.py.

Two processes run them in make test, each with a cluster of its own. One begins with the golden run and has all tests
that read it; the other files go to whoever is free.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

GOLDEN = "golden_run"


@functools.cache
def reads_golden_run(path: Path) -> bool:
    return GOLDEN in path.read_text(encoding="utf-8")


class FilesBesideGoldenRun(LoadScopeScheduling):
    """A file stays in one process, and all that read the golden run in the same one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return GOLDEN if reads_golden_run(self.config.rootpath / file) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesBesideGoldenRun:
    return FilesBesideGoldenRun(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first."""
    items.sort(key=lambda item: not reads_golden_run(item.path))


@pytest.fixture(scope="session", autouse=True)
def environment(test_environment: None, ray_cluster: Any) -> None:
    """Every test here, and every process that it starts, has an environment of its own.

    The cluster is up before any test: Ray cannot start in a process that has run DeepSpeed ("Cannot allocate memory").
    """
