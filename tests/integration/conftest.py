"""Tests with real vLLM, Ray and DeepSpeed; they share the fixtures of tests/conftest.py.

Two processes run them, each with a Ray cluster of its own. Whatever reads the golden run goes to one of them, so that
the run is made once.
"""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def environment(test_environment: None, ray_cluster: Any) -> None:
    """Every test here, and every process that it starts, has an environment of its own.

    The cluster is up before any test: Ray cannot start in a process that has run DeepSpeed ("Cannot allocate memory").
    """


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Modules stay together, and those with a test that reads the golden run stay with each other."""
    golden = {item.path for item in items if "golden_run" in item.fixturenames}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("golden" if item.path in golden else item.path.stem))
