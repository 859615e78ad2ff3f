"""Tests with real vLLM, Ray and DeepSpeed; they share the fixtures of tests/conftest.py.

Two processes run them, each with a cluster of its own; one of them starts with what reads the golden run.
"""

from __future__ import annotations

from typing import Any

import pytest

GOLDEN = "golden_run"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever reads the golden run is in one process, which begins with it; else a file stays together."""
    for item in items:
        is_golden = GOLDEN in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group(GOLDEN if is_golden else item.path.stem))
    items.sort(key=lambda item: GOLDEN not in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session", autouse=True)
def environment(test_environment: None, ray_cluster: Any) -> None:
    """Every test here, and every process that it starts, has an environment of its own.

    The cluster is up before any test: Ray cannot start in a process that has run DeepSpeed ("Cannot allocate memory").
    """
