"""The submitter pod's program against a stand-in for Ray's dashboard that fails as real ones do.

python -m pytest tests/unit/cluster/test_submitter.py
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.helpers.cluster_manifests import CLUSTER, build, only

TOKEN = "t" * 32
LINES = [f"line {number}\n" for number in range(6)]


@pytest.fixture
def submit(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("submit", CLUSTER / "base" / "submit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "submit", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    return module


@dataclass
class Dashboard:
    """Ray's job API for one job. `streams` says how each stream in turn behaves; after the last the job has ended.

    A stream always begins at the log's first line, as Ray's does; `written` is how many lines the log has.
    """

    streams: list[str]
    known: bool = False
    status: str = "RUNNING"
    written: int = 2
    submitted: list[dict[str, str]] = field(default_factory=list)
    looks: int = 0

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self.authenticate])
        app.add_routes(
            [
                web.post("/api/jobs/", self.submit),
                web.get("/api/jobs/mipo-1", self.look),
                web.get("/api/jobs/mipo-1/logs", self.logs),
                web.get("/api/jobs/mipo-1/logs/tail", self.tail),
            ]
        )
        return app

    @web.middleware
    async def authenticate(self, request: web.Request, handler: Callable) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.Response(status=401, text="Missing authentication token")
        return await handler(request)

    async def submit(self, request: web.Request) -> web.Response:
        self.submitted.append(await request.json())
        self.known = True
        return web.json_response({"submission_id": "mipo-1"})

    async def look(self, request: web.Request) -> web.Response:
        self.looks += 1
        if not self.known:
            return web.Response(status=404, text="Job mipo-1 does not exist")
        return web.json_response({"status": self.status})

    async def logs(self, request: web.Request) -> web.Response:
        return web.json_response({"logs": "".join(LINES[: self.written])})

    async def tail(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for line in LINES[: self.written]:
            await socket.send_str(line)
        how = self.streams.pop(0)
        self.written += 2
        if not self.streams:
            self.status = "SUCCEEDED"
        if how == "abruptly":
            assert request.transport is not None
            request.transport.abort()
        elif how in ("silently", "after a rest"):
            looks = self.looks
            while self.looks == looks:  # the status alone can tell
                await asyncio.sleep(0.01)
            if how == "after a rest":
                for line in LINES[self.written - 2 : self.written]:
                    await socket.send_str(line)
        elif how == "with the head":  # whose successor knows no job
            self.known, self.written = False, 2
        return socket


def run(submit: ModuleType, dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch, token: str = TOKEN) -> int:
    """The program's exit code, run against the dashboard as the pod runs it."""

    async def scenario() -> int:
        async with TestServer(dashboard.app()) as server:
            monkeypatch.setenv("RAY_DASHBOARD_ADDRESS", f"127.0.0.1:{server.port}")
            monkeypatch.setenv("RAY_JOB_SUBMISSION_ID", "mipo-1")
            monkeypatch.setenv("RAY_AUTH_TOKEN", token)
            return await asyncio.wait_for(submit.main(["python -m mipo_ray.run recipe.yaml"]), timeout=20)

    return asyncio.run(scenario())


@pytest.mark.parametrize(
    "streams",
    [["cleanly", "abruptly", "cleanly"], ["silently"], ["abruptly", "silently"], ["after a rest", "cleanly"]],
    ids="-".join,
)
def test_only_the_jobs_status_ends_it(submit, streams, monkeypatch, capsys):
    """Streams that close while the job runs are opened again; each line is printed once; the job is submitted once."""
    dashboard = Dashboard(streams)
    lines = 2 + 2 * len(streams)

    assert run(submit, dashboard, monkeypatch) == 0

    assert dashboard.streams == []
    assert dashboard.status == "SUCCEEDED"
    assert dashboard.submitted == [{"entrypoint": "python -m mipo_ray.run recipe.yaml", "submission_id": "mipo-1"}]
    printed = capsys.readouterr()
    assert printed.out.splitlines(keepends=True) == LINES[:lines]
    assert "mipo-1 ended: SUCCEEDED" in printed.err


def test_the_pod_that_replaces_an_evicted_one_submits_nothing(submit, monkeypatch, capsys):
    dashboard = Dashboard(["cleanly"], known=True)
    assert run(submit, dashboard, monkeypatch) == 0
    assert dashboard.submitted == []
    assert capsys.readouterr().out == "".join(LINES[:4])


def test_a_new_head_gets_the_job_again(submit, monkeypatch, capsys):
    """A RayJob's head keeps no state: the one that replaces it knows no job, and the same command resumes the run."""
    dashboard = Dashboard(["with the head", "cleanly"])
    assert run(submit, dashboard, monkeypatch) == 0
    assert len(dashboard.submitted) == 2
    # The second driver's log is another one, and is printed from its start.
    assert capsys.readouterr().out.count(LINES[0]) == 2


def test_a_failed_job_is_a_finished_one(submit, monkeypatch):
    """KubeRay reads FAILED from the job; an exit code other than 0 would only make Kubernetes start the pod again."""
    assert run(submit, Dashboard([], known=True, status="FAILED"), monkeypatch) == 0


def test_without_the_token_it_ends_at_once(submit, monkeypatch, capsys):
    assert run(submit, Dashboard(["cleanly"]), monkeypatch, token="wrong") == 1
    assert "expected the token of this cluster" in capsys.readouterr().err


def test_a_dashboard_that_is_away_is_waited_for(submit, monkeypatch, capsys):
    """Nothing listens at first: the pod neither ends nor submits twice."""
    dashboard = Dashboard(["cleanly"])

    async def scenario() -> int:
        async with TestServer(dashboard.app()) as first:
            port = first.port
        monkeypatch.setenv("RAY_DASHBOARD_ADDRESS", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("RAY_JOB_SUBMISSION_ID", "mipo-1")
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
        following = asyncio.create_task(submit.main(["python -m mipo_ray.run recipe.yaml"]))
        await asyncio.sleep(0.1)
        assert not following.done()
        async with TestServer(dashboard.app(), port=port):
            return await asyncio.wait_for(following, timeout=20)

    assert asyncio.run(scenario()) == 0
    assert len(dashboard.submitted) == 1
    assert "the job is not given up" in capsys.readouterr().err


def test_the_pod_runs_this_program_with_the_jobs_own_command() -> None:
    """KubeRay hands its command to the default submitter alone, so the manifest says it a second time."""
    objects = build("overlays/cpu-demo")
    job = only(objects, "RayJob")["spec"]
    pod = job["submitterPodTemplate"]["spec"]
    (container,) = pod["containers"]
    program = (CLUSTER / "base" / "submit.py").read_text()

    assert [*container["command"], *container["args"]] == [
        "python",
        "/etc/mipo-ray-submit/submit.py",
        job["entrypoint"],
    ]
    assert only(objects, "ConfigMap", "mipo-submit")["data"] == {"submit.py": program}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/etc/mipo-ray-submit"}
