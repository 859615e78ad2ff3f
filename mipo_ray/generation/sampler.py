"""The pool of vLLM actors as one step of a Ray Data pipeline, and the actor: it samples the responses of several blocks
at the same time, with an engine of its own or as the client of one that outlives the stage."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from mipo_ray.config.generation import EnginePoolConfig
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.generation.actor_engines import EngineUse, LeasedEngine, OwnEngine
from mipo_ray.generation.asking import Asker
from mipo_ray.generation.deaths import QUARANTINED, Deaths
from mipo_ray.generation.engine import Sampling
from mipo_ray.generation.vllm_arguments import EngineSettings, end_with_engine, engine_settings
from mipo_ray.monitoring.events import Events
from mipo_ray.monitoring.idle import IdleClock
from mipo_ray.pairs.schema import RESPONSES, SCORES
from mipo_ray.ray_cluster.blocks import engine_pool, map_actors, map_clients
from mipo_ray.ray_cluster.living import LivingActors
from mipo_ray.ray_cluster.resources import Request, Resources, engine_request
from mipo_ray.ray_cluster.watch import watch_actors
from mipo_ray.session import Session
from mipo_ray.storage.manifests import TrainFacts
from mipo_ray.storage.rounds import Round

# Ray restarts an actor without end: where no record is kept of what engines die of, a block that kills every engine
# must not look like a hang.
MOST_ENGINE_DEATHS = 5

# From a sampled block to the responses that are to be scored, row by row (see `assemble.to_score`).
ToScore = Callable[[pa.Table], list[list[dict[str, Any]]]]


@dataclass(frozen=True)
class Engines:
    """A pool of engines of one model: how each is started, what it reserves, how many there are and how long the first
    may wait for a node. `living`: those of the run, which take the model's weights; None: they live for one stage.
    `are_shared`: another stage works with them at the same time, and counts the time in which they have no work.
    `deaths`: the record by which rows are found that kill them, and set aside; None: a few deaths stop the run."""

    settings: EngineSettings
    request: Request
    pool: EnginePoolConfig
    wait_minutes: float
    living: LivingActors | None = None
    are_shared: bool = False
    deaths: Deaths | None = None


def policy_engines(config: Config, policy: str, resources: Resources) -> Engines:
    """The engines that sample from a policy (any model path), in the run's own window, for one stage."""
    return Engines(
        settings=engine_settings(config, policy, resources),
        request=engine_request(config, resources),
        pool=config.generation.pool,
        wait_minutes=config.ray.wait_timeout_minutes,
    )


def round_engines(session: Session, round: Round) -> Engines:
    """The engines that sample from the policy that stands after a round: the run's living ones, where it has them."""
    engines = policy_engines(session.config, session.policy(round), session.resources)
    probes = None
    if not round.is_base and (trained := session.stage(round, "train").read_manifest(TrainFacts)) is not None:
        probes = trained.facts.summary.probe_logprobs
    settings = replace(engines.settings, probe_logprobs=None if probes is None else tuple(probes))
    return replace(engines, settings=settings, living=session.living_engines, are_shared=session.shares_engines)


def sample_responses(
    rows: ray.data.Dataset,
    engines: Engines,
    sampling: Sampling,
    events: Events,
    to_score: ToScore | None = None,
) -> ray.data.Dataset:
    """Adds `responses` to rows with `requests`, through a pool of vLLM actors; a block stays a block.

    With `to_score` also `scores`: log-probs of the responses that it gives for each block.
    """
    if engines.living is None:
        use = EngineUse(engines.settings, engines.request.gpus, deaths=engines.deaths)
        return map_actors(
            rows,
            Sampler,
            (use, sampling, events, to_score),
            request=engines.request,
            pool=engine_pool(engines.pool, engines.request),
            wait_minutes=engines.wait_minutes,
        )
    living = engines.living
    watch_actors(rows, living.request, engines.wait_minutes, living.class_name)
    gpus = 0.0 if engines.are_shared else living.request.gpus
    use = EngineUse(engines.settings, gpus, living.lease(), engines.deaths)
    pool = engine_pool(engines.pool, living.request)
    return map_clients(rows, Sampler, (use, sampling, events, to_score), pool=pool)


class Sampler:
    """A Ray Data actor: adds `responses` to blocks that hold `requests` (see engine.REQUESTS, pairs.RESPONSES).

    With `to_score` it also adds `scores` (pairs.SCORES): the log-probs of given responses under given prompts.
    """

    def __init__(self, use: EngineUse, sampling: Sampling, events: Events, to_score: ToScore | None = None):
        self._idle = IdleClock(use.gpus)
        self._sampling = sampling
        self._window = use.settings.max_model_len
        self._events = events
        self._to_score = to_score
        self._blocks_in_flight = 0
        self._refusal: UserError | None = None
        self._deaths = use.deaths
        try:
            if self._deaths is None:
                _refuse_many_deaths(events)
            else:
                self._deaths = self._deaths.of(str(ray.get_runtime_context().get_actor_id()))
                use = replace(use, deaths=self._deaths)
            self._engine = OwnEngine(use.settings, events) if use.lease is None else LeasedEngine(use, events)
            self._asker = Asker(self._deaths, self._engine.probe)
        except UserError as error:  # raised by the first block: of an error here Ray keeps the text alone
            self._refusal = error

    async def __call__(self, block: pa.Table) -> AsyncIterator[pa.Table]:
        """Samples every request of the block; yields the block once, with its `responses`.

        Raises the UserError for which the engine could not be started, and QuarantineError where more rows kill engines
        than may be set aside.
        """
        if self._refusal is not None:
            raise self._refusal
        started = time.monotonic()
        self._blocks_in_flight += 1
        self._idle.work_begins()
        try:
            block = await self._sampled(block)
            if self._to_score is not None:
                # In a thread: other blocks' requests must not wait while this one's filters run.
                block = await self._scored(block, await asyncio.to_thread(self._to_score, block))
        except Exception as error:
            if self._engine.is_gone(error):
                if self._deaths is not None:
                    self._deaths.die(error)
                end_with_engine()  # an exception would fail the whole stage
            raise
        finally:
            self._idle.work_ends()
            self._blocks_in_flight -= 1
        self._events.emit(
            {
                "event": "generated",
                "rows": block.num_rows,
                "generated_tokens": _sampled_tokens(block["responses"]),
                "block_seconds": time.monotonic() - started,
                "blocks_in_flight": self._blocks_in_flight,
                **self._idle.take(),
                "engine": self._engine.name,
            }
        )
        yield block

    async def _sampled(self, block: pa.Table) -> pa.Table:
        requests = block["requests"]

        async def ask(rows: range) -> pa.Array:
            return await self._engine.respond(requests.slice(rows.start, len(rows)), self._sampling)

        parts = await self._asker.answers("sample", block, ask)
        nothing = pa.array([[]], type=RESPONSES)
        responses = pa.chunked_array([nothing if part is None else part for _, part in parts], type=RESPONSES)
        return _without(block.drop_columns(["requests"]).append_column("responses", responses), parts)

    async def _scored(self, block: pa.Table, wanted: list[list[dict[str, Any]]]) -> pa.Table:
        async def ask(rows: range) -> list[list[dict[str, Any]]]:
            return await self._engine.score(wanted[rows.start : rows.stop], self._window)

        parts = await self._asker.answers("score", block, ask)
        scores = [row for _, part in parts for row in ([[]] if part is None else part)]
        return _without(block.append_column("scores", pa.array(scores, type=SCORES)), parts)

    def __del__(self) -> None:
        # Ray Data makes a pool smaller while the rest of it goes on: another actor may need the engine.
        if (engine := getattr(self, "_engine", None)) is not None:
            with contextlib.suppress(Exception):  # Ray may be gone by then, and nobody is left to be told
                engine.give_back()


def _without(block: pa.Table, parts: list[tuple[range, Any]]) -> pa.Table:
    """The block, in which rows that are set aside say why they give no pair."""
    aside = {rows.start for rows, answers in parts if answers is None}
    if not aside:
        return block
    is_aside = pa.array([row in aside for row in range(block.num_rows)])
    dropped = pc.if_else(is_aside, QUARANTINED, block["dropped"])
    return block.set_column(block.schema.get_field_index("dropped"), "dropped", dropped)


def _sampled_tokens(responses: pa.ChunkedArray) -> int:
    """Tokens that the engine gave, with those that were cut off."""
    each = responses.combine_chunks().flatten()
    return len(each.field("token_ids").flatten()) + (pc.sum(each.field("trimmed_tokens")).as_py() or 0)


def _refuse_many_deaths(events: Events) -> None:
    """Raises RuntimeError where engines of the stage died MOST_ENGINE_DEATHS times."""
    if (deaths := events.total("engine_deaths")) >= MOST_ENGINE_DEATHS:
        raise RuntimeError(
            f"vLLM engines died {deaths:.0f} times in this stage; metrics.jsonl holds each error (engine_death), "
            "logs/ beside it what vLLM said last"
        )
