"""One vLLM engine of one model: it samples responses to token ids, and scores given responses."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mipo_ray.config.generation import SamplingConfig
from mipo_ray.generation.orphans import OrphanGuard
from mipo_ray.generation.rendering import load_tokenizer
from mipo_ray.generation.thinking import thought_reader
from mipo_ray.generation.trimming import logprob_of, whole_tokens
from mipo_ray.generation.turn_tokens import turn_tokens
from mipo_ray.generation.vllm_arguments import (
    EngineSettings,
    EngineStalled,
    engine_arguments,
    set_environment,
    stat_loggers,
)
from mipo_ray.generation.weight_swap import EXTENSION
from mipo_ray.models.probes import probes
from mipo_ray.monitoring.progress import Tally
from mipo_ray.pairs.schema import RESPONSES, TOKEN_IDS
from mipo_ray.paths import plain_path
from mipo_ray.ray_cluster.gpus import check_engine_gpus

# `sampling` names the parameters of a request among those of the pool; null, or absent in files of earlier versions:
# DEFAULT_SAMPLING.
REQUESTS = pa.list_(pa.struct([("prompt_token_ids", TOKEN_IDS), ("seed", pa.int64()), ("sampling", pa.string())]))
DEFAULT_SAMPLING = "generation"


@dataclass(frozen=True)
class Sampling:
    """How a pool of engines samples.

    parameters: by the name that requests give; those of DEFAULT_SAMPLING hold where they give none. trims: whether a
    response that runs into the length limit is cut back to its last whole sentence.
    """

    parameters: Mapping[str, SamplingConfig]
    trims: bool = False


class Engine:
    """A vLLM engine that works on any number of requests at the same time.

    The log-prob of a response is the model's own (temperature 1, before top-p), summed over its tokens, in nats. A
    response that stopped keeps its end token; one cut at the limit has none. The token by which the chat template ends
    a turn is an end token too, whatever the model's files say.
    """

    def __init__(self, settings: EngineSettings, *, takes_weights: bool = False):
        """Starts the engine. takes_weights: whether `load` will be called."""
        set_environment(settings.on_gpu)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from mipo_ray.models.source import local_model_directory

        if settings.on_gpu:
            check_engine_gpus(settings.dtype, settings.tensor_parallel_size)
        model = local_model_directory(settings.model_path, trust_remote_code=settings.trust_remote_code)
        arguments = engine_arguments(model, settings) | {
            "enable_prefix_caching": True,
            "generation_config": "vllm",  # sampling comes from the run's configuration alone
        }
        if takes_weights:
            arguments["worker_extension_cls"] = EXTENSION
        # A run's policies have one tokenizer and one chat template: the export copies them.
        tokenizer = load_tokenizer(settings.model_path, settings.trust_remote_code)
        self._turn_tokens = turn_tokens(tokenizer, model, settings.chat)
        self._thoughts = thought_reader(tokenizer, settings.thought_marks)
        self._trust_remote_code = settings.trust_remote_code
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**{**arguments, **settings.engine_args}), stat_loggers=stat_loggers(self._stepped)
        )
        # Set last: by it `__del__` knows that there is an engine.
        self._guard = OrphanGuard(process.pid for process in multiprocessing.active_children() if process.pid)
        self._request_count = 0
        self._stall_seconds = None if settings.stall_minutes is None else 60 * settings.stall_minutes
        self._stepped()

    async def respond(self, requests: pa.ChunkedArray, sampling: Sampling, tally: Tally | None = None) -> pa.Array:
        """The responses (pairs.RESPONSES) to every row's requests (REQUESTS).

        tally: counts each row that has its responses. Raises EngineStalled where the engine does no step for
        `stall_minutes`, as everything does that has it work.
        """

        async def respond(request: dict[str, Any]) -> dict[str, Any]:
            return await self._respond(request, sampling)

        def count(responses: list[dict[str, Any]]) -> None:
            if tally is not None and responses:
                tally.answered(len(responses), sum(len(response["token_ids"]) for response in responses))

        responses = await _gather_rows(respond, requests.to_pylist(), count)
        if tally is not None:
            tally.tell()
        return pa.array(responses, type=RESPONSES)

    async def stream(self, request: dict[str, Any], sampling: SamplingConfig) -> AsyncIterator[str | dict[str, Any]]:
        """The response to one request (an item of REQUESTS) while it is sampled: its text piece by piece, as the engine
        decodes it, and at last all of the response (an item of pairs.RESPONSES)."""
        sent = 0
        async for output in self._outputs(request["prompt_token_ids"], self._parameters(request, sampling)):
            text = output.outputs[0].text
            if len(text) > sent:
                yield text[sent:]
            sent = len(text)
        yield self._response(request, output)

    async def score(self, rows: list[list[dict[str, Any]]], window: int) -> list[list[dict[str, Any]]]:
        """Log-probs of given responses under given prompts (pairs.SCORES, as `assemble.to_score` asks for them); null
        where both together fill `window` tokens."""

        async def score(wanted: dict[str, Any]) -> dict[str, Any]:
            prompt, response = wanted["prompt_token_ids"], wanted["response_token_ids"]
            fits = len(prompt) + len(response) < window
            logprob = await self._logprob(prompt, response) if fits else None
            return {"sample": wanted["sample"], "negative": wanted["negative"], "logprob": logprob}

        return await _gather_rows(score, rows)

    async def probe(self) -> list[float]:
        """The log-probs of the probe sequences, in nats (see `models.probes`)."""
        vocabulary = self._engine.model_config.get_vocab_size()
        scored = [self._logprob(one.prompt.tolist(), one.response.tolist()) for one in probes(vocabulary)]
        return list(await asyncio.gather(*scored))

    async def load(self, model_path: str) -> None:
        """Puts the weights of another policy of the same run in place of those that are here; no request may be under
        way. Nothing says whether it worked: ask for `probe`."""
        from mipo_ray.models.source import local_model_directory

        model = local_model_directory(model_path, trust_remote_code=self._trust_remote_code)
        await self._unless_stalled(self._engine.collective_rpc("swap_weights", args=(plain_path(model),)))

    async def forget_prompts(self) -> None:
        """Empties the prefix cache: what it holds was computed with other weights, or by another stage, whose responses
        should be what a fresh engine gives."""
        for _ in range(20):
            if await self._unless_stalled(self._engine.reset_prefix_cache()):
                return
            await asyncio.sleep(0.1)  # the last request's blocks may not be free yet
        raise RuntimeError("the engine kept its prefix cache: expected no request under way")

    def shutdown(self) -> None:
        """Ends the engine's processes."""
        self._engine.shutdown()
        self._guard.dismiss()

    async def _respond(self, request: dict[str, Any], sampling: Sampling) -> dict[str, Any]:
        parameters = sampling.parameters[request.get("sampling") or DEFAULT_SAMPLING]
        output = await self._run(request["prompt_token_ids"], self._parameters(request, parameters))
        return self._response(request, output, trims=sampling.trims)

    def _parameters(self, request: dict[str, Any], sampling: SamplingConfig) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            seed=request["seed"],
            stop_token_ids=list(self._turn_tokens.added),
            logprobs=0,
        )

    def _response(self, request: dict[str, Any], output: Any, *, trims: bool = False) -> dict[str, Any]:
        """An item of pairs.RESPONSES, from the engine's finished output; trims: see `Sampling`."""
        final, prompt = output.outputs[0], request["prompt_token_ids"]
        token_ids, text, logprob = list(final.token_ids), final.text, final.cumulative_logprob
        trimmed = None
        if trims and final.finish_reason == "length":
            kept = whole_tokens(self._thoughts, prompt, token_ids)
            trimmed = None if kept is None else len(token_ids) - kept
        if trimmed:
            token_ids = token_ids[:-trimmed]
            text = self._thoughts.tokenizer.decode(token_ids, skip_special_tokens=True)
            logprob = logprob_of(token_ids, final.logprobs)
        text, answer_tokens = self._thoughts.read(prompt, token_ids, text, stopped=final.finish_reason == "stop")
        return {
            "token_ids": token_ids,
            "text": text,
            "answer_tokens": answer_tokens,
            "finish_reason": final.finish_reason,
            "logprob": logprob,
            "prompt_tokens": len(prompt),
            "cached_tokens": output.num_cached_tokens or 0,
            "control_tokens": self._turn_tokens.inside(token_ids),
            "trimmed_tokens": trimmed,
        }

    async def _logprob(self, prompt: list[int], response: list[int]) -> float:
        """log p(response | prompt), in nats."""
        from vllm import SamplingParams

        token_ids = [*prompt, *response]
        # The engine scores prompts only while it generates: one token, which is thrown away.
        output = await self._run(token_ids, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
        scored = list(zip(token_ids, output.prompt_logprobs, strict=True))[len(prompt) :]
        return float(sum(candidates[token].logprob for token, candidates in scored))

    async def _run(self, token_ids: list[int], parameters: Any) -> Any:
        """The engine's finished output of one request."""
        from vllm.sampling_params import RequestOutputKind

        parameters.output_kind = RequestOutputKind.FINAL_ONLY  # else an object for every token, with all before it
        (final,) = await self._unless_stalled(_all_of(self._outputs(token_ids, parameters)))
        return final

    def _outputs(self, token_ids: list[int], parameters: Any) -> AsyncIterator[Any]:
        """The engine's outputs of one request, of which each holds the ones before it."""
        from vllm.inputs import TokensPrompt

        self._request_count += 1
        outputs: AsyncIterator[Any] = self._engine.generate(
            TokensPrompt(prompt_token_ids=token_ids), parameters, str(self._request_count)
        )
        return outputs

    def _stepped(self) -> None:
        self._last_step = time.monotonic()

    async def _unless_stalled(self, answer: Awaitable[Any]) -> Any:
        """What the engine answers, as long as it goes on with whatever requests it has."""
        asked = time.monotonic()
        waiting = asyncio.ensure_future(answer)
        try:
            while self._stall_seconds is not None and not waiting.done():
                still_for = time.monotonic() - max(asked, self._last_step)
                if still_for >= self._stall_seconds:
                    raise EngineStalled(
                        f"the engine does not answer, and did no step for {still_for / 60:.3g} minutes "
                        f"(generation.stall_minutes {self._stall_seconds / 60:g})"
                    )
                await asyncio.wait({waiting}, timeout=self._stall_seconds - still_for)
            return await waiting
        finally:
            waiting.cancel()

    def __del__(self) -> None:
        # Without it the engine's process outlives the pool and reports that its client died.
        if getattr(self, "_guard", None) is not None:
            self.shutdown()


def engine_death(name: str, error: Exception) -> dict[str, Any]:
    """The event of an engine that died in the actor `name`."""
    return {"event": "engine_death", "engine": name, "engine_deaths": 1, "error": str(error)}


async def _all_of(outputs: AsyncIterator[Any]) -> list[Any]:
    return [output async for output in outputs]


async def _gather_rows(
    function: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]],
    rows: list[list[dict[str, Any]]],
    finished: Callable[[list[dict[str, Any]]], None] = lambda row: None,
) -> list[list[dict[str, Any]]]:
    """`function` of every item of every row, all of them under way at the same time; `finished` hears of each row."""

    async def gather(row: list[dict[str, Any]]) -> list[dict[str, Any]]:
        results = await asyncio.gather(*map(function, row))
        finished(results)
        return results

    return await asyncio.gather(*map(gather, rows))
