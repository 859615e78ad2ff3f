"""Tests with real vLLM, Ray and DeepSpeed; they share the fixtures of tests/conftest.py."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def environment(test_environment: None) -> None:
    """Every test here, and every process that it starts, has an environment of its own."""
