"""What a run that fails keeps of the cluster's logs, in the run directory: the cluster may go with them.

Ray has the logs of every process as long as their nodes live, and its own interface to them. Here the last lines are
taken through it: of the driver, of the engines and workers, and why actors died.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from mipo_ray.errors import UserError, cut
from mipo_ray.ray_cluster.connection import user_error
from mipo_ray.storage.run_directory import LOGS, RunDirectory
from mipo_ray.terminal import plain, say_error

LINES = 200  # of each process
MOST_CHARACTERS = 100_000  # of each, the last ones
MOST_FILES = 60
MOST_KEPT = 5  # failures, the newest
SECONDS = 60.0  # for all of it: a cluster that answers slowly must not keep a failed run from ending
ANSWER_SECONDS = 10

# How Ray says that an actor ended because it was to.
_INTENDED = re.compile(r"ray\.kill|out of scope|exit_actor|INTENDED|finished|owner has (?:died|exited)", re.IGNORECASE)
# In the names of logs of processes that Ray had started before a job needed them.
_NO_JOB = "ffffffff"
# Lines by which Ray finds its place in a file.
_MARKS = re.compile(r":(?:job_id|actor_name|task_name):")


@contextlib.contextmanager
def kept_logs(run: RunDirectory) -> Iterator[None]:
    """For work on a connected cluster: where it fails, the last lines of its logs are kept below `logs` of the run.

    Not for a mistake of the user's, which says itself what is to be mended, and not where somebody stops the run.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError) and user_error(error) is None:
            place = f"{LOGS}/{time.strftime('%Y-%m-%dT%H%M%SZ', time.gmtime())}"
            # In a thread that may be left behind: the interface has no time limit of its own.
            thread = threading.Thread(target=keep_logs, args=(run, place, error), daemon=True, name="keep-logs")
            thread.start()
            thread.join(SECONDS)
            say_error(f"the last lines of engines, workers and this driver: {run.path(place)}")
        raise


def keep_logs(run: RunDirectory, place: str, error: BaseException) -> None:
    """Writes to `place` below the run directory what is known of a failure; what cannot be had is named, not raised."""
    missing: list[str] = []
    with _noted(missing, "the run directory"):
        _remove_old(run)
        run.write_text(f"{place}/driver.txt", plain("".join(traceback.format_exception(error))))
        for name, text in _cluster_logs(missing):
            run.write_text(f"{place}/{name}", text)
    if missing:
        with contextlib.suppress(UserError, OSError):
            run.write_text(f"{place}/missing.txt", plain("\n".join([*missing, ""])))


def _cluster_logs(missing: list[str]) -> Iterator[tuple[str, str]]:
    """The files to write, by name; notes in `missing` what could not be had."""
    from ray.util.state import get_log, list_actors

    context = ray.get_runtime_context()
    # Without an address Ray would look for any cluster on this machine, and refuse to choose between two.
    asked: dict[str, Any] = {"address": context.gcs_address, "timeout": ANSWER_SECONDS}
    job, actors = context.get_job_id(), []
    with _noted(missing, "the list of actors"):
        asked_for: dict[str, Any] = {"filters": [("job_id", "=", job)], "limit": 10_000, "detail": True}
        actors = list_actors(**asked_for, raise_on_missing_output=False, **asked)
    if deaths := _deaths(actors):
        yield "actors.txt", plain("\n\n".join([*deaths, ""]))
    asked |= {"tail": LINES, "errors": "replace"}
    if (submission := _submission_id()) is not None:
        with _noted(missing, "the log of the submitted job"):
            yield "job-driver.log", _tail(get_log(submission_id=submission, **asked))
    kept = 0
    for file in _files_of(job, actors, missing):
        if kept == MOST_FILES:
            missing.append(f"more than {MOST_FILES} logs: the others are left out")
            return
        with _noted(missing, f"{file.name} of node {file.node[:8]}"):
            if text := _lines_of(file, asked):
                kept += 1
                yield file.kept_as, text


@dataclass(frozen=True)
class _LogFile:
    """The log of one process of the job; `actor`: the class that it ran, "" where that is not known."""

    node: str
    name: str
    actor: str

    @property
    def kept_as(self) -> str:
        process, suffix = self.name.rsplit("-", 1)[1].split(".", 1)
        return f"{self.actor or 'worker'}-{process}-{self.node[:8]}.{suffix}"


def _files_of(job: str, actors: Sequence[Any], missing: list[str]) -> list[_LogFile]:
    """The logs of all processes of the job on living nodes, those of actors that died first, then of other actors."""
    classes = {(actor.node_id, str(actor.pid)): actor for actor in actors}
    ranked: list[tuple[int, _LogFile]] = []
    for node in ray.nodes():
        where = f"node {node['NodeID'][:8]} ({node.get('NodeManagerAddress')})"
        if not node["Alive"]:
            missing.append(f"the logs of {where}: it is gone")
            continue
        with _noted(missing, f"the logs of {where}"):
            for name in _names(node["NodeID"]):
                match = re.fullmatch(rf"worker-\w+-({re.escape(job)}|{_NO_JOB})-(\d+)\.(?:out|err)", name)
                if match is None:
                    continue
                actor = classes.get((node["NodeID"], match[2]))
                if actor is None and match[1] == _NO_JOB:
                    continue
                rank = 2 if actor is None else 0 if _cause(actor) else 1
                ranked.append((rank, _LogFile(node["NodeID"], name, "" if actor is None else _class_of(actor))))
    return [file for _, file in sorted(ranked, key=lambda item: item[0])]


def _names(node: str) -> list[str]:
    """The names of a node's logs of workers."""
    from ray.util.state import list_logs

    try:
        groups = list_logs(ray.get_runtime_context().gcs_address, node, glob_filter="worker-*", timeout=ANSWER_SECONDS)
    except Exception:
        if (own := _own_logs(node)) is None:
            raise
        return sorted(os.listdir(own))
    return sorted({name for names in groups.values() for name in names})


def _lines_of(file: _LogFile, asked: Mapping[str, Any]) -> str:
    """The last lines of a log."""
    from ray.util.state import get_log

    try:
        return _tail(get_log(node_id=file.node, filename=file.name, **asked))
    except Exception:
        if (own := _own_logs(file.node)) is None:
            raise
        with open(os.path.join(own, file.name), encoding="utf-8", errors="replace") as lines:
            return _tail(iter(deque(lines, LINES)))


def _own_logs(node: str) -> str | None:
    """The logs of this driver's own node, None for another one. Of two clusters on a machine one does not get the port
    by which Ray would be asked."""
    here: Any = ray._private.worker._global_node
    return here.get_logs_dir_path() if here and node == ray.get_runtime_context().get_node_id() else None


def _class_of(actor: Any) -> str:
    """`Sampler` for Ray Data's `MapWorker(MapBatches(Sampler))`; fit for a file's name."""
    return re.findall(r"[A-Za-z0-9_]+", str(actor.class_name) or "actor")[-1]


def _deaths(actors: Sequence[Any]) -> list[str]:
    """What Ray says of each actor that ended otherwise than it was to."""
    found = [(actor, cause) for actor in actors if (cause := _cause(actor))]
    return [
        f"{_class_of(actor)}, process {actor.pid}, node {str(actor.node_id)[:8]}:\n{cause}" for actor, cause in found
    ]


def _cause(actor: Any) -> str:
    """Why an actor died, "" for one that lives or that was to end."""
    texts: list[str] = []

    def look(value: Any) -> None:
        if isinstance(value, Mapping):
            for key, below in value.items():
                if key in ("error_message", "formatted_exception_string") and isinstance(below, str):
                    texts.append(cut(below, MOST_CHARACTERS))
                look(below)

    look(getattr(actor, "death_cause", None) or {})
    text = "\n".join(texts)
    return "" if _INTENDED.search(text) else text


def _tail(chunks: Iterator[str]) -> str:
    """The last lines without Ray's own marks, as they may be shown; "" where nothing is left."""
    lines = [line for line in "".join(chunks).splitlines() if not _MARKS.match(line)]
    return plain("\n".join([*lines, ""]))[-MOST_CHARACTERS:] if any(line.strip() for line in lines) else ""


def _submission_id() -> str | None:
    """How `ray job submit` knows this driver; None for one that it did not start."""
    with contextlib.suppress(ValueError, AttributeError):
        config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        return (config.get("metadata") or {}).get("job_submission_id")
    return None


def _remove_old(run: RunDirectory) -> None:
    """Leaves room for one more failure among the newest."""
    # Beside them lies what libraries printed (`library_output`), which has a name that is no time.
    places = sorted({name.split("/")[0] for name in run.list_files(LOGS) if name[:1].isdigit()})
    for place in places[: max(0, len(places) - MOST_KEPT + 1)]:
        run.remove(f"{LOGS}/{place}")


@contextlib.contextmanager
def _noted(missing: list[str], what: str) -> Iterator[None]:
    """Takes note of what the block could not get, whatever the reason: the cluster is failing."""
    try:
        yield
    except Exception as error:
        missing.append(f"{what}: {type(error).__name__}: {cut(str(error))}")
