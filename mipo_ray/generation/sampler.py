"""The pool of vLLM actors as one step of a Ray Data pipeline, and the actor: one asynchronous engine that samples the
responses of several blocks at the same time."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data

from mipo_ray.config.generation import EnginePoolConfig, SamplingConfig
from mipo_ray.config.schema import Config
from mipo_ray.generation.rendering import load_tokenizer
from mipo_ray.generation.thinking import thought_reader
from mipo_ray.generation.turn_tokens import turn_tokens
from mipo_ray.generation.vllm_arguments import (
    EngineSettings,
    engine_arguments,
    engine_settings,
    is_dead_engine,
    set_environment,
    stat_loggers,
)
from mipo_ray.monitoring.events import Events
from mipo_ray.monitoring.idle import IdleClock
from mipo_ray.pairs.schema import RESPONSES, SCORES, TOKEN_IDS
from mipo_ray.ray_cluster.blocks import engine_pool, map_actors
from mipo_ray.ray_cluster.resources import Request, Resources, engine_request

# Ray restarts an actor without end: a block that kills every engine must not look like a hang.
MOST_ENGINE_DEATHS = 5

# `sampling` names the parameters of a request among those of the pool; null, or absent in files of earlier versions:
# DEFAULT_SAMPLING.
REQUESTS = pa.list_(pa.struct([("prompt_token_ids", TOKEN_IDS), ("seed", pa.int64()), ("sampling", pa.string())]))
DEFAULT_SAMPLING = "generation"

# From a sampled block to the responses that are to be scored, row by row (see `assemble.to_score`).
ToScore = Callable[[pa.Table], list[list[dict[str, Any]]]]


@dataclass(frozen=True)
class Engines:
    """A pool of engines of one model: how each is started, what it reserves, how many there are and how long the first
    may wait for a node."""

    settings: EngineSettings
    request: Request
    pool: EnginePoolConfig
    wait_minutes: float


def policy_engines(config: Config, policy: str, resources: Resources) -> Engines:
    """The engines that sample from a policy (any model path), in the run's own window."""
    return Engines(
        settings=engine_settings(config, policy, resources),
        request=engine_request(config, resources),
        pool=config.generation.pool,
        wait_minutes=config.ray.wait_timeout_minutes,
    )


def sample_responses(
    rows: ray.data.Dataset,
    engines: Engines,
    sampling: Mapping[str, SamplingConfig],
    events: Events,
    to_score: ToScore | None = None,
) -> ray.data.Dataset:
    """Adds `responses` to rows with `requests`, through a pool of vLLM actors; a block stays a block.

    sampling: parameters by the name that requests give (REQUESTS); those of DEFAULT_SAMPLING hold where they
    give none. With `to_score` also `scores`: log-probs of the responses that it gives for each block.
    """
    return map_actors(
        rows,
        Sampler,
        (engines.settings, sampling, events, to_score, engines.request.gpus),
        request=engines.request,
        pool=engine_pool(engines.pool),
        wait_minutes=engines.wait_minutes,
    )


class Sampler:
    """A Ray Data actor: adds `responses` to blocks that hold `requests` (see REQUESTS, pairs.RESPONSES).

    The log-prob of a response is the model's own (temperature 1, before top-p), summed over its tokens, in nats. A
    response that stopped keeps its end token; one cut at the limit has none. The token by which the chat template ends
    a turn is an end token too, whatever the model's files say. With `to_score` it also adds `scores` (pairs.SCORES):
    the log-probs, in the same sense, of given responses under given prompts. `sampling` holds the
    parameters by name, DEFAULT_SAMPLING among them. `gpus` are those that the actor reserves.
    """

    def __init__(
        self,
        settings: EngineSettings,
        sampling: Mapping[str, SamplingConfig],
        events: Events,
        to_score: ToScore | None = None,
        gpus: float = 0.0,
    ):
        self._idle = IdleClock(gpus)
        if (deaths := events.total("engine_deaths")) >= MOST_ENGINE_DEATHS:
            raise RuntimeError(
                f"vLLM engines died {deaths:.0f} times in this stage; metrics.jsonl holds each error (engine_death), "
                "the logs of the Ray session what vLLM said"
            )
        set_environment(settings.on_gpu)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from mipo_ray.models.source import local_model_directory

        model = local_model_directory(settings.model_path, trust_remote_code=settings.trust_remote_code)
        arguments = engine_arguments(model, settings) | {
            "enable_prefix_caching": True,
            "generation_config": "vllm",  # sampling comes from the run's configuration alone
        }
        started = time.monotonic()
        tokenizer = load_tokenizer(settings.model_path, settings.trust_remote_code)
        self._turn_tokens = turn_tokens(tokenizer, model, settings.chat)
        self._thoughts = thought_reader(tokenizer, settings.thought_marks)
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**{**arguments, **settings.engine_args}), stat_loggers=stat_loggers()
        )
        self._sampling = sampling
        self._max_model_len = settings.max_model_len
        self._events = events
        self._to_score = to_score
        self._request_count = 0
        self._blocks_in_flight = 0
        # The beginning of the actor's id, by which the Ray dashboard finds it.
        self._name = str(ray.get_runtime_context().get_actor_id())[:8]
        seconds = time.monotonic() - started
        self._emit({"event": "engine_start", "engine_starts": 1, "engine_start_seconds": seconds})

    async def __call__(self, block: pa.Table) -> AsyncIterator[pa.Table]:
        """Samples every request of the block; yields the block once, with its `responses`."""
        started = time.monotonic()
        requests = block["requests"].to_pylist()
        self._blocks_in_flight += 1
        self._idle.work_begins()
        try:
            responses = await _gather_rows(self._sample, requests)
            block = block.drop_columns(["requests"]).append_column("responses", pa.array(responses, type=RESPONSES))
            if self._to_score is not None:
                # In a thread: other blocks' requests must not wait while this one's filters run.
                wanted = await asyncio.to_thread(self._to_score, block)
                scores = await _gather_rows(self._score, wanted)
                block = block.append_column("scores", pa.array(scores, type=SCORES))
        except Exception as error:
            if is_dead_engine(error):
                # Ray restarts an actor elsewhere only after a system error: an exception would fail the whole stage.
                death = {"event": "engine_death", "engine": self._name, "engine_deaths": 1, "error": str(error)}
                self._events.emit_and_wait(death)
                os._exit(1)
            raise
        finally:
            self._idle.work_ends()
            self._blocks_in_flight -= 1
        tokens = sum(len(response["token_ids"]) for row in responses for response in row)
        self._emit(
            {
                "event": "generated",
                "rows": block.num_rows,
                "generated_tokens": tokens,
                "block_seconds": time.monotonic() - started,
                "blocks_in_flight": self._blocks_in_flight,
                **self._idle.take(),
            }
        )
        yield block

    def _emit(self, event: dict[str, Any]) -> None:
        self._events.emit({**event, "engine": self._name})

    async def _sample(self, request: dict[str, Any]) -> dict[str, Any]:
        from vllm import SamplingParams

        sampling = self._sampling[request.get("sampling") or DEFAULT_SAMPLING]
        parameters = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            seed=request["seed"],
            stop_token_ids=list(self._turn_tokens.added),
            logprobs=0,
        )
        output = await self._run(request["prompt_token_ids"], parameters)
        final = output.outputs[0]
        token_ids = list(final.token_ids)
        text, answer_tokens = self._thoughts.read(
            request["prompt_token_ids"], token_ids, final.text, stopped=final.finish_reason == "stop"
        )
        return {
            "token_ids": token_ids,
            "text": text,
            "answer_tokens": answer_tokens,
            "finish_reason": final.finish_reason,
            "logprob": final.cumulative_logprob,
            "prompt_tokens": len(request["prompt_token_ids"]),
            "cached_tokens": output.num_cached_tokens or 0,
            "control_tokens": self._turn_tokens.inside(final.token_ids),
        }

    async def _score(self, request: dict[str, Any]) -> dict[str, Any]:
        """The log-prob of a given response; null where it and its prompt fill the window, as nothing can follow."""
        from vllm import SamplingParams

        token_ids = [*request["prompt_token_ids"], *request["response_token_ids"]]
        logprob = None
        if len(token_ids) < self._max_model_len:
            # The engine scores prompts only while it generates: one token, which is thrown away.
            output = await self._run(token_ids, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
            scored = zip(token_ids, output.prompt_logprobs, strict=True)
            response = list(scored)[len(request["prompt_token_ids"]) :]
            logprob = sum(candidates[token].logprob for token, candidates in response)
        return {"sample": request["sample"], "negative": request["negative"], "logprob": logprob}

    async def _run(self, token_ids: list[int], parameters: Any) -> Any:
        """The engine's finished output of one request."""
        from vllm.inputs import TokensPrompt

        self._request_count += 1
        prompt = TokensPrompt(prompt_token_ids=token_ids)
        async for output in self._engine.generate(prompt, parameters, str(self._request_count)):
            final = output
        return final

    def __del__(self) -> None:
        # Without it the engine's process outlives the pool and reports that its client died.
        if (engine := getattr(self, "_engine", None)) is not None:
            engine.shutdown()


async def _gather_rows(
    function: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]], rows: list[list[dict[str, Any]]]
) -> list[list[dict[str, Any]]]:
    """`function` of every item of every row, all of them under way at the same time."""
    return await asyncio.gather(*(asyncio.gather(*(function(item) for item in row)) for row in rows))
