"""Tests with real vLLM, Ray and DeepSpeed; they share the fixtures of tests/conftest.py."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def environment(test_environment: None, ray_cluster: Any) -> None:
    """Every test here, and every process that it starts, has an environment of its own.

    The cluster is up before any test: Ray cannot start in a process that has run DeepSpeed ("Cannot allocate memory").
    """
