"""Engines and training workers that sleep instead of working, for measuring everything around them on a small machine.

What they replace is the engine and the optimizer step alone: prompts, conditioning, Ray Data's pool, assembly, the
files, Ray Train, and the streams of pairs to its workers are the real ones. Lengths are drawn from each request's own
seed, so that two runs have the same work. How fast they are stands in an environment variable, which every process of a
cluster inherits.

    MIPO_RAY_SIMULATED='{}' python -m benchmarks.simulated [RECIPE] [key=value ...]     a run of simulated machines
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train

from mipo_ray.generation import sampler
from mipo_ray.generation.actor_engines import EngineUse
from mipo_ray.generation.asking import Asker
from mipo_ray.generation.sampler import Sampler, ToScore
from mipo_ray.monitoring.events import Events
from mipo_ray.monitoring.idle import IdleClock
from mipo_ray.pairs.schema import RESPONSES
from mipo_ray.storage.manifests import TrainSummary
from mipo_ray.training import trainer
from mipo_ray.training.shares import own_steps
from mipo_ray.training.steps import known_steps
from mipo_ray.training.stream import PairStream, streamed_steps

VARIABLE = "MIPO_RAY_SIMULATED"
WORDS = ("bread", "river", "star", "map", "tea", "train", "moss", "chess", "rain", "clock", "stone", "lamp", "wind")


@dataclass(frozen=True)
class Speeds:
    """How fast the simulated machines are, and how long answers get. Seconds, tokens."""

    sequences: int = 32
    """That an engine works on at once."""
    token_seconds: float = 0.016
    """For one token of each of them: 2,000 tokens a second in all."""
    mean_tokens: float = 100.0
    """Of an answer; lengths are log-normal, with a standard deviation of 0.6 of the logarithm."""
    score_seconds: float = 0.05
    """For the log-prob of a given answer."""
    train_tokens_per_second: float = 4000.0
    """Of one training worker: tokens of chosen and rejected answers with their prompts."""

    def engine_tokens_per_second(self) -> float:
        """Of one engine whose places are all taken; infinite where nothing takes time."""
        return self.sequences / self.token_seconds if self.token_seconds else float("inf")

    def length(self, seed: int, most: int) -> int:
        """Tokens of the answer to a request."""
        draw = np.random.default_rng(seed).lognormal(np.log(self.mean_tokens) - 0.18, 0.6)
        return int(min(max(1.0, draw), most))


def as_text(speeds: Speeds) -> str:
    """What `VARIABLE` is to hold in the environment of a cluster whose machines are so fast."""
    return json.dumps(asdict(speeds))


def speeds_here() -> Speeds:
    """Those of the environment."""
    return Speeds(**json.loads(os.environ[VARIABLE]))


def simulate() -> None:
    """From now on this process's generate stages sample from simulated engines, and its train stages sleep."""
    vars(sampler)["Sampler"] = SimulatedSampler
    vars(trainer)["worker_loop"] = simulated_worker_loop


class SimulatedEngine:
    """Takes the time that answers would take, and gives words that mean nothing."""

    def __init__(self, speeds: Speeds) -> None:
        self.name = f"simulated {os.getpid()}"  # one a process: the events tell engines apart by it
        self._speeds = speeds
        self._places = asyncio.Semaphore(speeds.sequences)

    async def respond(self, requests: pa.ChunkedArray, sampling: Any) -> pa.Array:
        async def respond(request: dict[str, Any]) -> dict[str, Any]:
            most = sampling.parameters[request.get("sampling") or "generation"].max_tokens
            length = self._speeds.length(request["seed"], most)
            await self._take(length * self._speeds.token_seconds)
            words = np.random.default_rng(request["seed"]).choice(WORDS, length).tolist()
            return {
                "token_ids": [3 + WORDS.index(word) for word in words],
                "text": " ".join(words),
                "answer_tokens": length,
                "finish_reason": "stop",
                "logprob": -1.0 * length,
                "prompt_tokens": len(request["prompt_token_ids"]),
                "cached_tokens": 0,
                "control_tokens": 0,
            }

        return pa.array(await _in_rows(respond, requests.to_pylist()), type=RESPONSES)

    async def score(self, rows: list[list[dict[str, Any]]], window: int) -> list[list[dict[str, Any]]]:
        async def score(wanted: dict[str, Any]) -> dict[str, Any]:
            await self._take(self._speeds.score_seconds)
            found = -1.5 * len(wanted["response_token_ids"])
            return {"sample": wanted["sample"], "negative": wanted["negative"], "logprob": found}

        return await _in_rows(score, rows)

    async def probe(self) -> list[float]:
        return []

    def is_gone(self, error: Exception) -> bool:
        return False

    def give_back(self) -> None:
        """Nothing was started."""

    async def _take(self, seconds: float) -> None:
        if seconds:
            async with self._places:
                await asyncio.sleep(seconds)


async def _in_rows(
    function: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]], rows: list[list[dict[str, Any]]]
) -> list[list[dict[str, Any]]]:
    return await asyncio.gather(*(asyncio.gather(*(function(item) for item in row)) for row in rows))


class SimulatedSampler(Sampler):
    """The actor of a Ray Data pool, around a simulated engine."""

    def __init__(self, use: EngineUse, sampling: Any, events: Events, to_score: ToScore | None = None) -> None:
        self._idle = IdleClock(1.0)
        self._refusal = None
        self._sampling = sampling
        self._window = use.settings.max_model_len
        self._events = events
        self._to_score = to_score
        self._blocks_in_flight = 0
        self._engine: Any = SimulatedEngine(speeds_here())
        self._deaths = None
        self._asker = Asker(None, self._engine.probe)


def simulated_worker_loop(loop_config: dict[str, Any]) -> TrainSummary:
    """One training worker: takes the real steps, and sleeps as long as their tokens would take."""
    context, settings, stage = ray.train.get_context(), loop_config["settings"], loop_config["stage"]
    workers, speeds, started = context.get_world_size(), speeds_here(), time.monotonic()
    stream: PairStream | None = loop_config["stream"]
    if stream is not None:
        steps = streamed_steps(stream, settings, context.get_world_rank(), workers)
    else:
        shard = ray.train.get_dataset_shard("pairs")
        steps = known_steps(settings, lambda epoch: own_steps(shard, settings.train, workers))
    tokens = pairs = taken = 0
    idle = IdleClock(float(workers))
    for step in steps(0):
        own = sum(tree.prompt + sum(tree.responses) for pair in step.pairs for tree in pair.lengths)
        seconds = own / speeds.train_tokens_per_second
        time.sleep(seconds)
        idle.work_was(seconds)
        tokens, pairs, taken = tokens + own, pairs + step.step_pairs, taken + 1
        if context.get_world_rank() == 0:
            event = {"event": "train_step", "step": taken - 1, "total_steps": taken, "loss": 0.0, "tokens": own}
            stage.events.emit({**event, "step_seconds": seconds, **idle.take()})
    if context.get_world_rank() == 0:
        policy = Path(stage.path("policy"))
        policy.mkdir(parents=True, exist_ok=True)
        (policy / "config.json").write_text("{}")
    # The tokens of this worker alone: the others' are about as many.
    return TrainSummary(
        steps=taken,
        pairs=pairs,
        tokens=tokens * workers,
        first_loss=0.6931,
        last_loss=0.6931,
        seconds=time.monotonic() - started,
    )


if __name__ == "__main__":
    # By its name: an actor must not be of a module that is called __main__ where it runs.
    from benchmarks import simulated
    from mipo_ray import run

    simulated.simulate()
    sys.exit(run.main())
