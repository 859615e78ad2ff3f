"""Submits the run's command to a Ray cluster once, and follows it to its end: what the submitter pod does.

KubeRay's own command takes the end of the log stream for the end of the job: when a head is busy or a proxy closes the
connection, the pod ends, and half a minute later KubeRay fails a job that runs (ray-project/kuberay#4921). Here nothing
but the job's status ends the pod; a stream that ends is opened again, and what was printed is not printed twice.

A job that the head does not know is submitted. That is so at the start; and again when the head was lost, since a head
without Redis keeps no state: the new one runs the same command, which goes on from the run directory. A pod that takes
an evicted submitter's place finds the job there, and only follows it.

KubeRay gives the pod the dashboard's address, the submission's id and the token. The exit code is 0 however the job
ends, for KubeRay reads that from the job; any other code makes Kubernetes start this pod again.

    python submit.py 'python -m mipo_ray.run recipe.yaml'
"""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass

import aiohttp

FINISHED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
ANSWER_SECONDS = 60.0
# A stream may be dead without a word, so the status is asked for this often while the log says nothing.
LOOK_SECONDS = 30.0
PAUSE_SECONDS = 5.0


class RefusedError(Exception):
    """The dashboard does not let this pod in: nothing that waiting would change."""


@dataclass(frozen=True)
class Job:
    """A job on a Ray cluster: where its dashboard is, and what is submitted under which id."""

    dashboard: str
    submission_id: str
    entrypoint: str

    @property
    def url(self) -> str:
        """The job's own address in the dashboard's API."""
        return f"{self.dashboard}/api/jobs/{self.submission_id}"


class Log:
    """What the job wrote, printed once: every stream begins again at the first line."""

    def __init__(self) -> None:
        self.printed = 0

    def show(self, text: str, start: int) -> int:
        """Prints what is new of `text`, which begins at character `start` of the log; returns where it ends."""
        end = start + len(text)
        if end > self.printed:
            print(text[max(self.printed - start, 0) :], end="", flush=True)
            self.printed = end
        return end


async def follow(job: Job, session: aiohttp.ClientSession) -> str:
    """Submits the job unless the head knows it, prints its log, and returns its final status."""
    log = Log()
    while True:
        try:
            status = await look(job, session)
            if status is None:
                say(f"submitting {job.submission_id}: {job.entrypoint}")
                await submit(job, session)
                log = Log()
            elif status in FINISHED:
                await show_rest(job, session, log)
                return status
            else:
                await stream(job, session, log)
        except (aiohttp.ClientError, OSError) as error:
            say(f"{job.dashboard} does not answer ({type(error).__name__}: {error}); the job is not given up")
        await asyncio.sleep(PAUSE_SECONDS)


async def look(job: Job, session: aiohttp.ClientSession) -> str | None:
    """The job's status; None where the head does not know the job."""
    async with session.get(job.url, timeout=aiohttp.ClientTimeout(ANSWER_SECONDS)) as answer:
        if answer.status == 404:
            return None
        check(answer)
        return str((await answer.json())["status"])


async def submit(job: Job, session: aiohttp.ClientSession) -> None:
    """Submits the job. Should only the answer get lost, the next look finds the job, and Ray refuses an id twice."""
    body = {"entrypoint": job.entrypoint, "submission_id": job.submission_id}
    timeout = aiohttp.ClientTimeout(ANSWER_SECONDS)
    async with session.post(f"{job.dashboard}/api/jobs/", json=body, timeout=timeout) as answer:
        check(answer)


async def stream(job: Job, session: aiohttp.ClientSession, log: Log) -> None:
    """Prints the log until the stream ends, for whatever reason, or the job has."""
    place = 0
    async with session.ws_connect(f"{job.url}/logs/tail", max_msg_size=0) as socket:
        # No heartbeat: Ray's side of the stream never reads, so that it answers no ping.
        while True:
            try:
                message = await socket.receive(timeout=LOOK_SECONDS)
            except TimeoutError:
                status = await look(job, session)
                if status is None or status in FINISHED:
                    return
                continue
            if message.type is not aiohttp.WSMsgType.TEXT:
                say("the log's stream ended; the job's status says whether the job did")
                return
            place = log.show(message.data, place)


async def show_rest(job: Job, session: aiohttp.ClientSession, log: Log) -> None:
    """Prints what no stream brought. A log that is not to be had changes nothing about how the job ended."""
    try:
        async with session.get(f"{job.url}/logs", timeout=aiohttp.ClientTimeout(ANSWER_SECONDS)) as answer:
            check(answer)
            log.show(str((await answer.json())["logs"]), 0)
    except (aiohttp.ClientError, OSError) as error:
        say(f"the end of the log is missing: {type(error).__name__}: {error}")


def check(answer: aiohttp.ClientResponse) -> None:
    """Raises RefusedError where the token is not the cluster's, and aiohttp's error for any other failure."""
    if answer.status in (401, 403):
        raise RefusedError(f"{answer.url}: HTTP {answer.status}; expected the token of this cluster in RAY_AUTH_TOKEN")
    answer.raise_for_status()


def say(line: str) -> None:
    """Prints a line of this program's own, apart from the job's log."""
    print(f"[submitter] {line}", file=sys.stderr, flush=True)


async def main(arguments: list[str]) -> int:
    """Follows the job that the environment and the only argument name; returns the exit code."""
    (entrypoint,) = arguments
    address = os.environ["RAY_DASHBOARD_ADDRESS"]
    dashboard = address if "://" in address else f"http://{address}"
    job = Job(dashboard, os.environ["RAY_JOB_SUBMISSION_ID"], entrypoint)
    token = os.environ.get("RAY_AUTH_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        async with aiohttp.ClientSession(headers=headers) as session:
            status = await follow(job, session)
    except RefusedError as error:
        say(str(error))
        return 1
    say(f"{job.submission_id} ended: {status}")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
