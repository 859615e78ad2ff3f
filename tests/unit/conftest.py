"""What unit tests of several rooms share: one S3 server, and a process group of this process alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.helpers.s3_server import Bucket


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """The port of moto's S3 server."""
    from tests.helpers.s3_server import s3_server  # here, as most tests need neither moto nor its second of imports

    with s3_server() as port:
        yield port


@pytest.fixture
def bucket(s3_port: int) -> Iterator[Bucket]:
    """A new bucket, behind a fault injector that injects nothing yet."""
    from tests.helpers.s3_server import s3_bucket

    with s3_bucket(s3_port) as bucket:
        yield bucket


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """Of this process alone, where no other test has made one."""
    from torch import distributed

    if distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
