"""Waiting for nodes: what is said about it, and when it ends with an error. Pure: no Ray import; see cluster_waiting.

A stage waits for its first engine, or for all workers that training starts with; engines beyond the first are waited
for while the others work, which is said and never an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mipo_ray.config.label_selectors import shown
from mipo_ray.ray_cluster.resources import Request, ResourceError

# Actors get their places within seconds where there are nodes: nothing is said of that.
QUIET_SECONDS = 15.0
# Between two lines: twice as long each time, up to this.
LONGEST_SILENCE_SECONDS = 300.0
# An autoscaler calls a request infeasible also while nodes that are about to go fill its cluster.
INFEASIBLE_SECONDS = 300.0

_NAMES = {"engine": "engine actors", "worker": "training workers", "scorer": "scoring actors"}


class NoAnswerError(Exception):
    """The cluster's head did not answer a question in time, which passes when it restarts."""

    def __str__(self) -> str:
        return f"the cluster's head does not answer ({super().__str__()})"


class WaitTimeoutError(ResourceError):
    """Nodes did not come in time; the message says what was asked for and what the autoscaler did."""


@dataclass(frozen=True)
class Autoscaling:
    """What the cluster's autoscaler does.

    starting: nodes on their way, by node type. failed: why it could not start nodes, the newest last. infeasible: it
    says of the request that no node type fits it, or that none may be added.
    """

    starting: Mapping[str, int] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    infeasible: bool = False

    def __str__(self) -> str:
        if self.starting:
            nodes = ", ".join(f"{count} {name}" for name, count in sorted(self.starting.items()))
            said = f"the autoscaler is starting {nodes}"
        elif self.infeasible:
            said = "the autoscaler has no node type that fits, or may add none"
        else:
            said = "the autoscaler is starting nothing"
        return said + (f" (it failed to: {self.failed[-1]})" if self.failed else "")


class Wait:
    """Follows how many actors of a request have their nodes; times are seconds of one clock that never goes back."""

    def __init__(self, request: Request, limit_minutes: float) -> None:
        self.request = request
        # Training starts with all of them, generation with the first.
        self._enough = request.fewest if request.kind == "worker" else 1
        self._limit = limit_minutes * 60
        self._incomplete_since: float | None = None
        self._blocked_since: float | None = None
        self._infeasible_since: float | None = None
        self._silence = QUIET_SECONDS
        self._next_line = 0.0

    def observe(self, placed: int, autoscaling: Autoscaling | NoAnswerError | None, now: float) -> str | None:
        """Takes note of `placed` actors with a node; returns the line to print now, if any.

        `autoscaling` is None where no autoscaler tells what it does. Raises WaitTimeoutError when too few of them have
        had a node for too long, and as well when the head has not told of any for so long.
        """
        if placed >= self.request.fewest:
            line = self._complete(now)
            self._incomplete_since = self._blocked_since = self._infeasible_since = None
            return line
        if self._incomplete_since is None:
            self._incomplete_since, self._silence = now, QUIET_SECONDS
            self._next_line = now + QUIET_SECONDS
        if placed >= self._enough:
            self._blocked_since = self._infeasible_since = None
        else:
            self._check_limits(placed, autoscaling, now)
        if now < self._next_line:
            return None
        self._silence = min(2 * self._silence, LONGEST_SILENCE_SECONDS)
        self._next_line = now + self._silence
        # Whoever reads it must know whether to stay; of engines beyond the first there is no limit.
        limit = "" if self._blocked_since is None else f" of at most {_duration(self._limit)}"
        waited = _duration(now - self._incomplete_since)
        return f"waiting for {self._missing(placed)}, {waited}{limit}; {self._what(autoscaling)}"

    def _complete(self, now: float) -> str | None:
        since = self._incomplete_since
        if since is None or now - since < QUIET_SECONDS:
            return None
        return f"{self.request.fewest} {_NAMES[self.request.kind]} have their nodes, after {_duration(now - since)}"

    def _check_limits(self, placed: int, autoscaling: Autoscaling | NoAnswerError | None, now: float) -> None:
        if self._blocked_since is None:
            self._blocked_since = now
        if not isinstance(autoscaling, Autoscaling) or not autoscaling.infeasible:
            self._infeasible_since = None
        elif self._infeasible_since is None:
            self._infeasible_since = now
        waited = now - self._blocked_since
        told = 0.0 if self._infeasible_since is None else now - self._infeasible_since
        if waited < self._limit and told < INFEASIBLE_SECONDS:
            return
        limit = f" (ray.wait_timeout_minutes {self._limit / 60:g})" if waited >= self._limit else ""
        raise WaitTimeoutError(
            f"{self.request.phase}: waited {_duration(waited)}{limit} for {self._missing(placed)}; "
            f"{self._what(autoscaling)}. Expected nodes that hold them: check {self.request.key}, what each one "
            "reserves, its label_selector, and the cluster's node groups and their maximum sizes"
        )

    def _missing(self, placed: int) -> str:
        request = self.request
        more = " more" if placed else ""
        labels = f" and labels {shown(request.selector)}" if request.selector else ""
        return (
            f"{request.fewest - placed}{more} {_NAMES[request.kind]}, each on a node with {request.cpus:g} CPUs, "
            f"{request.gpus:g} GPUs{labels}"
        )

    def _what(self, autoscaling: Autoscaling | NoAnswerError | None) -> str:
        return "no autoscaler of this cluster says what it does" if autoscaling is None else str(autoscaling)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours".replace(".0 ", " ")
