"""An S3 server that answers nothing for half a minute: the clients' real waits, which the unit tests shorten.

python -m pytest tests/nightly/test_storage_stalls.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from mipo_ray.storage.run_directory import RunDirectory, open_run
from tests.helpers.faulty_proxy import first
from tests.helpers.s3_server import s3_bucket, s3_server


@pytest.mark.parametrize(
    ("method", "act"),
    [
        ("PUT", lambda run: run.write_text("b.txt", "text")),
        ("GET", lambda run: run.read_text("a.txt")),
        ("POST", lambda run: run.remove("")),
    ],
)
def test_a_stall_of_30_seconds_costs_one_wait_and_one_try(method: str, act: Callable[[RunDirectory], object]) -> None:
    with s3_server() as port, s3_bucket(port) as bucket:
        run = open_run(f"{bucket.url}/run")
        run.write_text("a.txt", "text")
        bucket.proxy.plan = first(1, "stall", method)
        started = time.monotonic()
        act(run)
        assert 15 <= time.monotonic() - started < 30
        assert [(kind, verb) for kind, verb, _ in bucket.proxy.injected] == [("stall", method)]
