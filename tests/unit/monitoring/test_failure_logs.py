"""What a failed run keeps of a cluster's logs: the last lines, of whom, without secrets, and what could not be had.

Ray's interface is a stand-in here; tests/nightly/test_failure_logs.py has the real one.

python -m pytest tests/unit/monitoring/test_failure_logs.py
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.util.state

from mipo_ray.errors import UserError
from mipo_ray.monitoring import failure_logs
from mipo_ray.monitoring.failure_logs import keep_logs, kept_logs
from mipo_ray.storage.run_directory import RunDirectory, open_run

JOB, ADDRESS = "02000000", "10.0.0.1:6379"
NODE, GONE = "a" * 56, "b" * 56


def actor(name: str, pid: int, death: dict[str, Any] | None = None) -> SimpleNamespace:
    return SimpleNamespace(class_name=name, pid=pid, node_id=NODE, death_cause=death)


def died(text: str) -> dict[str, Any]:
    return {"actor_died_error_context": {"error_message": text, "pid": 1}}


class Cluster:
    """Answers as Ray's state API does: two nodes, one of which is gone."""

    def __init__(self) -> None:
        self.actors = [
            actor("MapWorker(MapBatches(Sampler))", 11, died("The actor is dead because its worker process has died.")),
            actor("RayTrainWorker", 12),
            actor("EventWriter", 13, died("The actor is dead because it was killed by `ray.kill`.")),
        ]
        self.logs = {
            "worker-aa-02000000-12.out": ":job_id:02000000\n:actor_name:RayTrainWorker\nstep 7 done\n",
            "worker-bb-02000000-11.err": ":actor_name:Sampler\nEngineCore failed: CUDA out of memory\n",
            "worker-bb-02000000-11.out": ":job_id:02000000\n",
            "worker-cc-02000000-14.err": "a task's line\n",
            "worker-dd-01000000-15.err": "of another job\n",
            "worker-ee-ffffffff-16.err": "of a process that has no job yet\n",
            "worker-aa-ffffffff-12.err": "a worker whose process was there before its job\n",
            "python-core-worker-aa_12.log": "of Ray\n",
        }
        self.asked: list[dict[str, Any]] = []
        self.submitted = "the driver's own lines\n"

    def list_actors(self, **options: Any) -> list[SimpleNamespace]:
        assert (options["filters"], options["address"]) == ([("job_id", "=", JOB)], ADDRESS)
        return self.actors

    def list_logs(self, address: str, node_id: str, glob_filter: str, timeout: int) -> dict[str, list[str]]:
        assert (address, node_id, glob_filter) == (ADDRESS, NODE, "worker-*")
        names = [name for name in self.logs if name.startswith("worker-")]
        return {"worker_err": [name for name in names if ".err" in name], "worker_out": names}

    def get_log(self, *, filename: str | None = None, **options: Any) -> Iterator[str]:
        self.asked.append({"filename": filename, **options})
        if filename is None:
            assert options["submission_id"] == "raysubmit_1"
            yield self.submitted
            return
        text = self.logs[filename]
        if text == "refused":
            raise ray.util.state.exception.RayStateApiException("no such agent")
        lines = text.splitlines(keepends=True)
        yield from lines[-options["tail"] :]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    for name in ("list_actors", "list_logs", "get_log"):
        monkeypatch.setattr(ray.util.state, name, getattr(cluster, name))
    context = SimpleNamespace(get_job_id=lambda: JOB, gcs_address=ADDRESS, get_node_id=lambda: "another")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    nodes = [{"NodeID": NODE, "Alive": True}, {"NodeID": GONE, "Alive": False, "NodeManagerAddress": "10.0.0.7"}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    return cluster


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return open_run(str(tmp_path / "run"))


def kept(run: RunDirectory) -> dict[str, str]:
    """The files of the only failure, by name."""
    places = {name.split("/")[0] for name in run.list_files("logs")}
    assert len(places) == 1, places
    return {name.split("/")[1]: str(run.read_text(f"logs/{name}")) for name in run.list_files("logs")}


def fail(run: RunDirectory, error: Exception) -> dict[str, str]:
    with pytest.raises(type(error)), kept_logs(run):
        raise error
    return kept(run)


def test_the_last_lines_of_engines_workers_and_driver_are_kept(
    cluster: Cluster, run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not Ray's own marks, not empty files, not another job's; and what a node that is gone took with it is said."""
    files = fail(run, RuntimeError("training worker 0: it broke"))
    assert files.keys() == {
        *("driver.txt", "actors.txt", "missing.txt", "Sampler-11-aaaaaaaa.err"),
        *("RayTrainWorker-12-aaaaaaaa.out", "RayTrainWorker-12-aaaaaaaa.err", "worker-14-aaaaaaaa.err"),
    }
    assert files["Sampler-11-aaaaaaaa.err"] == "EngineCore failed: CUDA out of memory\n"
    assert files["RayTrainWorker-12-aaaaaaaa.out"] == "step 7 done\n"
    assert files["driver.txt"].endswith("RuntimeError: training worker 0: it broke\n")
    assert files["actors.txt"].startswith("Sampler, process 11, node aaaaaaaa:\nThe actor is dead because its worker")
    assert "ray.kill" not in files["actors.txt"]
    assert files["missing.txt"] == "the logs of node bbbbbbbb (10.0.0.7): it is gone\n"
    assert f"the last lines of engines, workers and this driver: {run.path('logs')}/" in capsys.readouterr().err
    assert {(call["tail"], call["address"]) for call in cluster.asked} == {(failure_logs.LINES, ADDRESS)}


def test_no_secret_is_kept(cluster: Cluster, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one of this process's environment nor one that its form tells, nor in an error, nor of a dead actor."""
    monkeypatch.setenv("WANDB_API_KEY", "f0e1d2c3b4a5968778695a4b")
    secret = f"hf_{'Ab1' * 11} and f0e1d2c3b4a5968778695a4b"
    cluster.logs["worker-bb-02000000-11.err"] = (
        f"GET https://me:pass1234@hub/model: 401 with {secret}\n\x1b]0;title\x07\n"
    )
    cluster.actors[0] = actor("Sampler", 11, died(f"raised in its creation task: {secret}"))
    files = fail(run, RuntimeError(f"no model: {secret}"))
    for name, text in files.items():
        for part in ("Ab1Ab1", "f0e1d2c3", "pass1234", "\x1b"):
            assert part not in text, name
    assert "401 with" in files["Sampler-11-aaaaaaaa.err"]
    for path in Path(run.path("logs")).rglob("*.*"):
        if path.is_file():
            assert path.stat().st_mode & 0o077 == 0, path


def test_what_cannot_be_had_is_named_and_the_rest_is_kept(cluster: Cluster, run: RunDirectory) -> None:
    def no_answer(**_: Any) -> list[Any]:
        raise ConnectionError("the dashboard does not answer")

    ray.util.state.list_actors = no_answer
    cluster.logs["worker-aa-02000000-12.out"] = "refused"
    files = fail(run, RuntimeError("it broke"))
    assert {"driver.txt", "missing.txt", "worker-11-aaaaaaaa.err", "worker-14-aaaaaaaa.err"} == files.keys()
    assert "the list of actors: ConnectionError: the dashboard does not answer" in files["missing.txt"]
    assert "worker-aa-02000000-12.out of node aaaaaaaa: RayStateApiException: no such agent" in files["missing.txt"]


def test_a_submitted_driver_has_a_log_too(cluster: Cluster, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"metadata": {"job_submission_id": "raysubmit_1"}, "runtime_env": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))
    assert fail(run, RuntimeError("it broke"))["job-driver.log"] == "the driver's own lines\n"


def test_those_that_died_come_first_and_there_is_an_end(
    cluster: Cluster, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_logs, "MOST_FILES", 1)
    monkeypatch.setattr(failure_logs, "MOST_CHARACTERS", 20)
    files = fail(run, RuntimeError("it broke"))
    assert [name for name in files if name.endswith((".err", ".out"))] == ["Sampler-11-aaaaaaaa.err"]
    assert files["Sampler-11-aaaaaaaa.err"] == " CUDA out of memory\n"
    assert "more than 1 logs: the others are left out" in files["missing.txt"]


def test_the_newest_failures_are_kept(cluster: Cluster, run: RunDirectory) -> None:
    for second in range(failure_logs.MOST_KEPT + 2):
        keep_logs(run, f"logs/2026-01-01T00000{second}Z", RuntimeError(str(second)))
    places = sorted({name.split("/")[0] for name in run.list_files("logs")})
    assert places == [f"2026-01-01T00000{second}Z" for second in range(2, failure_logs.MOST_KEPT + 2)]


@pytest.mark.parametrize("error", [UserError("prompts.path: ..."), KeyboardInterrupt()])
def test_mistakes_and_stops_leave_none(cluster: Cluster, run: RunDirectory, error: BaseException) -> None:
    with pytest.raises(type(error)), kept_logs(run):
        raise error
    assert run.list_files("logs") == {}


def test_a_cluster_that_hangs_does_not_keep_a_run_from_ending(
    cluster: Cluster, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's own part is there all the same."""
    released = threading.Event()
    monkeypatch.setattr(ray.util.state, "list_actors", lambda **_: released.wait(60))
    monkeypatch.setattr(failure_logs, "SECONDS", 0.5)
    try:
        assert fail(run, RuntimeError("it broke")).keys() == {"driver.txt"}
    finally:
        released.set()


def test_a_second_cluster_on_a_machine_is_read_by_its_driver(
    cluster: Cluster, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray's agents of both want one port, and the second's cannot be asked."""

    def no_agent(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Agent for node id doesn't exist.")

    for name, text in cluster.logs.items():
        (tmp_path / name).write_text(text if name != "worker-cc-02000000-14.err" else "line\n" * 300)
    for name in ("list_logs", "get_log"):
        monkeypatch.setattr(ray.util.state, name, no_agent)
    context = SimpleNamespace(get_job_id=lambda: JOB, gcs_address=ADDRESS, get_node_id=lambda: NODE)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    node = SimpleNamespace(get_logs_dir_path=lambda: str(tmp_path))
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    files = fail(run, RuntimeError("it broke"))
    assert files["Sampler-11-aaaaaaaa.err"] == "EngineCore failed: CUDA out of memory\n"
    assert files["worker-14-aaaaaaaa.err"] == "line\n" * failure_logs.LINES
    assert files["missing.txt"] == "the logs of node bbbbbbbb (10.0.0.7): it is gone\n"
