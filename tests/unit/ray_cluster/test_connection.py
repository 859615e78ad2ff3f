"""Joining and starting clusters, without one.

python -m pytest tests/unit/ray_cluster/test_connection.py
"""

from __future__ import annotations

import contextlib
import os

import pytest

from mipo_ray.ray_cluster.connection import address_known_beforehand


@pytest.mark.parametrize("before", [None, "", "10.0.0.1:6379"])
def test_a_local_cluster_is_told_its_address_and_nobody_after_it(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if before is not None:
        monkeypatch.setenv("RAY_ADDRESS", before)
    with contextlib.suppress(RuntimeError), address_known_beforehand():
        assert os.environ["RAY_ADDRESS"] == f"127.0.0.1:{os.environ['RAY_GCS_SERVER_PORT']}"
        raise RuntimeError("the start failed")
    assert os.environ.get("RAY_ADDRESS") == before
    assert "RAY_GCS_SERVER_PORT" not in os.environ
