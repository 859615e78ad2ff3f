"""A Hub that has too many requests or fails is asked again; what is on this machine is used without it.

The Hub is a stand-in behind a fault injector (tests/helpers/faulty_proxy.py), asked by the real huggingface_hub, in
processes of their own, since it reads its settings when it is imported.

python -m pytest tests/unit/models/test_hub_faults.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from mipo_ray.models import hub
from tests.helpers.fake_hub_files import COMMIT, NAME, serve_repository
from tests.helpers.faulty_proxy import Fault, FaultyProxy, always, first, no_faults, seeded

PASSING: list[Fault] = ["too_many", "unavailable", "internal", "cut_request", "cut_answer"]
# Nobody waits for real: the Hub's client does between its own tries as well, minutes in all.
SCRIPT = """
import sys
import time
from mipo_ray.errors import UserError
from mipo_ray.models.source import local_model_directory
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.02))
try:
    print("found", local_model_directory(sys.argv[1]))
except UserError as error:
    print("refused", error)
"""


@dataclass
class Hub:
    """A Hub and a node: every download is a process of its own, with one cache."""

    proxy: FaultyProxy
    url: str
    cache: Path

    def download(self, name: str = NAME) -> str:
        environment = {**os.environ, "HF_ENDPOINT": self.url, "HF_HOME": str(self.cache), "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", SCRIPT, name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        self.said = done.stderr
        return done.stdout.strip()

    @property
    def snapshot(self) -> Path:
        return self.cache / f"hub/models--org--model/snapshots/{COMMIT}"


@pytest.fixture
def node(tiny_model: Path, tmp_path: Path) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir() if path.is_file()}
    with serve_repository(files) as port:
        proxy = FaultyProxy(port)
        with proxy.running() as url:
            yield Hub(proxy, url, tmp_path / "cache")


def check_complete(node: Hub, tiny_model: Path) -> None:
    for path in tiny_model.iterdir():
        if path.is_file():
            assert (node.snapshot / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("path", ["/api/models/org/model/revision/main", "/tree/", "/resolve/"])
@pytest.mark.parametrize("fault", ["too_many", "unavailable"])
def test_a_hub_that_fails_for_a_moment_is_asked_again(fault: Fault, path: str, node: Hub, tiny_model: Path) -> None:
    node.proxy.plan = first(2, fault, path=path)
    assert node.download() == f"found {node.snapshot}"
    check_complete(node, tiny_model)
    assert len(node.proxy.injected) == 2


def test_a_hub_that_fails_in_a_third_of_all_requests_is_downloaded_from(node: Hub, tiny_model: Path) -> None:
    node.proxy.plan = seeded(3, 1 / 3, PASSING)
    assert node.download() == f"found {node.snapshot}"
    check_complete(node, tiny_model)
    assert node.proxy.injected


def test_a_hub_that_stays_away_is_named_after_all_tries(node: Hub) -> None:
    node.proxy.plan = always("unavailable")
    assert node.download().startswith(f"refused model.path '{NAME}': cannot be downloaded: ")
    assert len(node.proxy.injected) == len(hub.WAITS) + 1
    for wait in hub.WAITS:
        assert f"the Hub does not answer as it should (HTTP 503); asking again in {wait:.0f} s\n" in node.said


def test_what_a_node_has_it_uses_while_the_hub_is_away(node: Hub, tiny_model: Path) -> None:
    found = node.download()
    node.proxy.plan = always("unavailable")
    assert node.download() == found
    assert len(node.proxy.injected) == 1  # with a whole copy at hand it is not asked again
    check_complete(node, tiny_model)


def test_a_model_at_a_commit_is_asked_for_once(node: Hub) -> None:
    found = node.download(f"{NAME}@{COMMIT}")
    asked = len(node.proxy.requests)
    assert node.download(f"{NAME}@{COMMIT}") == found
    assert len(node.proxy.requests) == asked


def test_a_download_that_was_cut_off_is_no_model(node: Hub, tiny_model: Path) -> None:
    """A file is missing: the next process asks on, and takes it alone; with the Hub away it is told so."""
    node.proxy.plan = always("unavailable", path="/resolve/" + COMMIT + "/tokenizer.json")
    assert node.download().startswith("refused")
    node.proxy.plan = always("unavailable")
    assert node.download().startswith(f"refused model.path '{NAME}': cannot be downloaded: ")
    node.proxy.plan = no_faults
    before = len(node.proxy.requests)
    assert node.download() == f"found {node.snapshot}"
    fetched = {request.path for request in node.proxy.requests[before:] if request.method == "GET"}
    assert {path.rsplit("/", 1)[1] for path in fetched if "/resolve/" in path} == {"tokenizer.json"}
    check_complete(node, tiny_model)


def failing(*errors: BaseException) -> tuple[list[float], str]:
    """The waits before an answer came that these errors stood before."""
    waits, left = [], list(errors)

    def ask() -> str:
        if left:
            raise left.pop(0)
        return "answer"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "time", SimpleNamespace(sleep=waits.append))
        return waits, hub.asked_again(ask)


class FakeHttpError(OSError):
    def __init__(self, status: int, **headers: str) -> None:
        super().__init__(f"HTTP {status}")
        self.response = SimpleNamespace(status_code=status, headers={"Retry-After": "0"} | headers)


def test_waits_grow_and_are_those_that_the_hub_asks_for() -> None:
    assert failing(*[FakeHttpError(503)] * 5) == ([1, 2, 4, 8, 16], "answer")
    assert failing(FakeHttpError(429, **{"Retry-After": "30"}), FakeHttpError(429)) == ([30, 2], "answer")
    assert failing(FakeHttpError(429, **{"Retry-After": "9999"})) == ([hub.LONGEST_WAIT], "answer")
    assert failing(FakeHttpError(429, **{"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})) == ([1], "answer")
    with pytest.raises(FakeHttpError):
        failing(*[FakeHttpError(503)] * 6)


@pytest.mark.parametrize("error", [FakeHttpError(401), FakeHttpError(404), OSError("no space"), ValueError("other")])
def test_what_does_not_pass_is_raised_at_once(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        failing(error)
    assert caught.value is error


def test_what_the_hub_is_asked_in_the_driver_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    answers = [FakeHttpError(429), FakeHttpError(502)]

    def repo_info(*_: object, **__: object) -> SimpleNamespace:
        if answers:
            raise answers.pop()
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr(hub, "time", SimpleNamespace(sleep=lambda _: None))
    assert hub.at_commit(hub.HubFile("datasets/", NAME, "v1", "x")).revision == COMMIT
