"""A real S3 server on this machine (moto's), behind a fault injector, and the environment by which clients find it."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.request import Request, urlopen

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from tests.helpers.faulty_proxy import FaultyProxy


@dataclass(frozen=True)
class Bucket:
    """A bucket of moto's server; clients of this process reach it through `proxy`."""

    name: str
    proxy: FaultyProxy

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    def ask(self, method: str, key: str = "", content: bytes | None = None) -> bytes:
        """Asks the server itself, past the injector."""
        where = f"http://127.0.0.1:{self.proxy.port}/{self.name}/{key}".rstrip("/")
        headers = {"Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"}
        headers["Content-Type"] = "application/octet-stream"
        with urlopen(Request(where, content, headers, method=method)) as answer:
            found: bytes = answer.read()
        return found


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """The port of a new S3 server, which holds nothing."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield int(server.get_host_and_port()[1])
    finally:
        server.stop()


@contextlib.contextmanager
def s3_bucket(port: int) -> Iterator[Bucket]:
    """A new bucket of the server at `port`, for clients of this process and those that it starts."""
    proxy = FaultyProxy(port)
    bucket = Bucket(f"bucket-{secrets.token_hex(6)}", proxy)
    bucket.ask("PUT")
    with pytest.MonkeyPatch.context() as patch, proxy.running() as url:
        for name, value in _environment(url).items():
            patch.setenv(name, value)
        _forget_clients()
        try:
            yield bucket
        finally:
            _forget_clients()


def _environment(url: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _forget_clients() -> None:
    """fsspec keeps clients by their arguments, to which the environment does not belong."""
    clients: Any = s3fs.S3FileSystem
    clients.clear_instance_cache()
