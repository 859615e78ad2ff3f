"""An engine that outlives the stages of a run: a Ray actor that takes each new policy's weights and proves it.

An actor pool of Ray Data ends with its execution, and the engines in it. Here the pool's actors are the engines'
clients (`sampler.Sampler`), and these actors keep the engines. See `ray_cluster.living` for whose each one is.

Two stages may work with an engine at the same time, where both sample from the same policy.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray

from mipo_ray.config.generation import SamplingConfig
from mipo_ray.config.schema import Config
from mipo_ray.errors import brief
from mipo_ray.generation.deaths import Deaths
from mipo_ray.generation.engine import Engine, Sampling, engine_death
from mipo_ray.generation.vllm_arguments import EngineSettings, end_with_engine, is_dead_engine
from mipo_ray.monitoring.events import Events
from mipo_ray.monitoring.progress import Tally
from mipo_ray.ray_cluster.living import LivingActors
from mipo_ray.ray_cluster.resources import Resources, engine_request
from mipo_ray.terminal import say_error

# How far an engine's log-prob of a probe (16 random tokens, some -200 nats) may be from the trainer's, in nats. With
# the 135M model on a CPU it was 0.0001 in float32, 0.67 in bfloat16. One projection of one layer set to zero changes
# three of the four by 1.2 to 25 nats; what vLLM's own reload leaves on a CPU is wrong by 0.6 to 0.8.
PROBE_BOUNDS = {"float32": 1e-3, "bfloat16": 1.0}
GPU_FLOAT32_FACTOR = 10  # products may be TF32 there


@contextlib.contextmanager
def engines_of_run(config: Config, resources: Resources, most: int) -> Iterator[LivingActors | None]:
    """The engines that outlive the stages of a run, until the block ends; a stage with much to do may have `most` of
    them for its time. None for a `most` of 0: every stage starts its own."""
    if not most:
        yield None
        return
    request = replace(engine_request(config, resources), most=most)
    living = LivingActors(LivingEngine, (max(config.windows.values()),), request)
    try:
        yield living
    finally:
        living.end()


class WrongWeights(RuntimeError):
    """An engine does not hold the policy that it was told to."""


class LivingEngine:
    """A Ray actor with one engine, which it starts when it is first told what to hold.

    `window` is that of the engine, in tokens: the longest that any stage of the run asks for.
    """

    def __init__(self, window: int):
        self._window = window
        self._engine: Engine | None = None
        self._held: EngineSettings | None = None
        self._events: Events | None = None
        self._tallies: dict[tuple[int | None, str], Tally] = {}  # by round and stage
        self._changing = asyncio.Lock()  # held while it becomes a policy's engine
        self._under_way: list[Deaths | None] = []  # of each call that works with the engine, the record of its stage
        # The beginning of the actor's id, by which the Ray dashboard finds it.
        self._name = str(ray.get_runtime_context().get_actor_id())[:8]

    async def hold(self, settings: EngineSettings, events: Events | None) -> None:
        """Makes the engine one of this policy, with an empty prefix cache; a new one where it cannot take the weights.

        An engine that is this policy's, and that another stage works with, stays as it is. Calls that come meanwhile
        wait. events: where it is written down; None: nowhere.
        Raises WrongWeights where a new engine, too, is not the policy that the trainer exported.
        """
        wanted = replace(settings, max_model_len=self._window)
        async with self._changing:  # of two stages that begin at once the second finds what the first has started
            self._events = events
            await self._become(wanted)
        if events is not None:
            events.tell({"event": "ready", "engine": self._name})

    async def _become(self, wanted: EngineSettings) -> None:
        # Of a policy of an earlier version nothing could be proven: it gets an engine of its own.
        if self._held is None or not takes_weights_of(self._held, wanted):
            await self._start(wanted)
            return
        try:
            await self._take(wanted)
        except Exception as error:  # whatever vLLM raises: what is left may be neither policy, or no engine at all
            self._emit({"event": "weight_swap_failure", "weight_swap_failures": 1, "error": str(error)})
            say_error(
                f"warning: engine {self._name} did not take the weights of {wanted.model_path}, and is started "
                f"anew: {type(error).__name__}: {brief(str(error))}"
            )
            await self._start(wanted)

    async def respond(
        self, requests: pa.ChunkedArray, sampling: Sampling, events: Events | None = None, deaths: Deaths | None = None
    ) -> pa.Array:
        """See `Engine.respond`; events: those of the stage that asks, None: nobody counts. deaths: its record of
        them."""
        async with self._at_work(events, deaths) as engine:
            return await engine.respond(requests, sampling, self._tally_of(events))

    async def stream(self, request: dict[str, Any], sampling: SamplingConfig) -> AsyncIterator[str | dict[str, Any]]:
        """See `Engine.stream`."""
        async with self._at_work(None) as engine:
            async for part in engine.stream(request, sampling):
                yield part

    async def probe(self, events: Events | None = None, deaths: Deaths | None = None) -> list[float]:
        """See `Engine.probe`; the rest as of `respond`."""
        async with self._at_work(events, deaths) as engine:
            return await engine.probe()

    async def score(
        self,
        rows: list[list[dict[str, Any]]],
        window: int,
        events: Events | None = None,
        deaths: Deaths | None = None,
    ) -> list[list[dict[str, Any]]]:
        """See `Engine.score`; the rest as of `respond`."""
        async with self._at_work(events, deaths) as engine:
            return await engine.score(rows, window)

    async def close(self) -> None:
        """Ends the engine's processes; the actor itself is the owner's to end."""
        if self._engine is not None:
            self._engine.shutdown()
        self._engine = self._held = None

    async def _start(self, wanted: EngineSettings) -> None:
        await self.close()
        started = time.monotonic()
        self._engine = Engine(wanted, takes_weights=True)
        seconds = time.monotonic() - started
        self._emit({"event": "engine_start", "engine_starts": 1, "engine_start_seconds": seconds})
        await self._prove(wanted)

    async def _take(self, wanted: EngineSettings) -> None:
        """Loads the weights into the engine that is here, unless it holds them."""
        assert self._engine is not None
        if wanted == self._held and self._under_way:
            return  # the cache is in use, and is that of this policy
        started = time.monotonic()
        await self._engine.forget_prompts()
        if wanted == self._held:
            return
        await self._engine.load(wanted.model_path)
        await self._prove(wanted)
        seconds = time.monotonic() - started
        self._emit({"event": "weight_swap", "weight_swaps": 1, "weight_swap_seconds": seconds})

    async def _prove(self, wanted: EngineSettings) -> None:
        """Raises WrongWeights where the engine's log-probs of the probes are not those of the trainer at export."""
        assert self._engine is not None
        if wanted.probe_logprobs is not None:
            check_probes(wanted, await self._engine.probe())
            await self._engine.forget_prompts()
        self._held = wanted

    @contextlib.asynccontextmanager
    async def _at_work(self, events: Events | None, deaths: Deaths | None = None) -> AsyncIterator[Engine]:
        """The engine, for a call of the stage of `events`, whose record of deaths is `deaths`. Where its process is
        gone this process ends, and Ray starts a new one: every stage whose call it had is told first, since its client
        will only see that the actor is gone."""
        async with self._changing:
            assert self._engine is not None
            self._under_way.append(deaths)
        try:
            yield self._engine
        except Exception as error:
            if is_dead_engine(error):
                if events is not None:
                    events.emit_and_wait(engine_death(self._name, error))
                for record in {one.client: one for one in self._under_way if one is not None}.values():
                    record.die(error)
                end_with_engine()
            raise error from None
        finally:
            self._under_way.remove(deaths)

    def _tally_of(self, events: Events | None) -> Tally | None:
        """What a stage's answers are counted by, once for all that it asks."""
        if events is None:
            return None
        return self._tallies.setdefault((events.round.index, events.stage), Tally(events))

    def _emit(self, event: dict[str, Any]) -> None:
        if self._events is not None:
            self._events.emit({**event, "engine": self._name})


def takes_weights_of(held: EngineSettings, wanted: EngineSettings) -> bool:
    """Whether an engine of one policy can become one of the other: they are one, or they differ in their weights alone
    and the trainer noted by what to prove the change."""
    if wanted == held:
        return True
    if wanted.probe_logprobs is None:
        return False
    return replace(held, model_path="", probe_logprobs=None) == replace(wanted, model_path="", probe_logprobs=None)


def check_probes(settings: EngineSettings, found: Sequence[float]) -> None:
    """Raises WrongWeights where most of an engine's log-probs of the probes are not the trainer's.

    Most, and not one: where a router chooses between experts, rounding alone may send a token elsewhere. Wrong weights
    change all of them.
    """
    expected = settings.probe_logprobs or ()
    bound = PROBE_BOUNDS[settings.dtype]
    if settings.on_gpu and settings.dtype == "float32":
        bound *= GPU_FLOAT32_FACTOR
    differences = [abs(one - other) for one, other in zip(found, expected, strict=True)]
    # Written so that a difference that is no number counts.
    beyond = [difference for difference in differences if not difference <= bound]
    if 2 * len(beyond) > len(differences):
        by_engine, by_trainer = (", ".join(f"{value:.3f}" for value in values) for values in (found, expected))
        raise WrongWeights(
            f"{settings.model_path}: an engine gives the probe sequences log-probs of {by_engine}, the trainer gave "
            f"{by_trainer} when it exported the policy (nats; expected at most {bound:g} between them in "
            f"{settings.dtype})"
        )
