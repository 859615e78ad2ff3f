"""The engines of a run's policies, as in a run: vLLM in Ray actors, with the run's arguments, places and dtype.

Each policy has an engine of its own where the cluster has the room, and without GPUs the memory, for all at once.
Where it has not, those that find no room share the last engine, which takes the weights of the one that answers and
proves it (`generation.living_engine`). The initial model scores every answer, with the engine's own log-probs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import ray

from mipo_ray.chat.policies import ChatRun
from mipo_ray.chat.questions import Answer, Piece, Question, prompt_row
from mipo_ray.config.judge import JudgeConfig
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.evaluation.held_out.mutual_information import pmi_without_context
from mipo_ray.generation.living_engine import LivingEngine
from mipo_ray.generation.rendering import check_length, load_tokenizer, render_prompts
from mipo_ray.generation.sampler import round_engines
from mipo_ray.generation.vllm_arguments import EngineSettings
from mipo_ray.monitoring.events import NO_EVENTS
from mipo_ray.monitoring.failure_logs import kept_logs
from mipo_ray.pairs.filters import prompt_text
from mipo_ray.planning.lifetime import no_memory
from mipo_ray.ray_cluster.connection import connect, connected_work, user_error
from mipo_ray.ray_cluster.living import LivingActors
from mipo_ray.ray_cluster.resources import (
    Node,
    ResourceError,
    Resources,
    check_places,
    engine_request,
    resolve,
    total,
)
from mipo_ray.session import Session
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.terminal import say_error
from mipo_ray.text.statistics import copy_rate
from mipo_ray.text.thoughts import answer_of

Item = TypeVar("Item")


class EngineLost(UserError):
    """An engine died while it answered; the next question starts it anew."""


@contextlib.contextmanager
def running_engines(chat: ChatRun) -> Iterator[EngineAnswerer]:
    """Joins or starts Ray, with the engines of a chat until the block ends; none of them has started yet.

    Raises ResourceError where no node has room for one.
    """
    nodes = connect(chat.config)
    with connected_work(), kept_logs(chat.run):
        resources = resolve(chat.config, total(nodes))
        count = engine_count(chat.config, resources, nodes, len(chat.engine_rounds))
        request = replace(engine_request(chat.config, resources), fewest=count, most=count)
        session = Session(chat.config, chat.run, resources, NO_EVENTS)
        settings = {round: round_engines(session, round).settings for round in chat.engine_rounds}
        living = LivingActors(LivingEngine, (chat.config.model.max_model_len,), request)
        try:
            yield EngineAnswerer(chat.config, settings, living.lease().actors)
        finally:
            living.end()


def engine_count(config: Config, resources: Resources, nodes: Sequence[Node], policies: int) -> int:
    """How many engines there are for so many policies: one each, or as many as there is room for; raises
    ResourceError where that is none."""
    one = replace(engine_request(config, resources), fewest=1)
    if config.ray.autoscaling:
        return policies
    check_places(one, nodes)
    for count in range(min(policies, one.room(nodes)), 1, -1):
        if not no_memory(_with_engines(config, count), resources, nodes, workers=0):
            return count
    return 1


def _with_engines(config: Config, count: int) -> Config:
    """The configuration with so many engines, and without a judge, which a chat has none of."""
    pool = config.generation.pool.model_copy(update={"min_size": count, "max_size": count})
    return config.model_copy(
        update={
            "generation": config.generation.model_copy(update={"pool": pool}),
            "evaluate": config.evaluate.model_copy(update={"judge": JudgeConfig()}),
        }
    )


class EngineAnswerer:
    """Answers by a run's engines. One question at a time: a second one waits."""

    def __init__(self, config: Config, settings: dict[Round, EngineSettings], actors: Sequence[Any]) -> None:
        self._config = config
        self._settings = settings
        self._actors = actors
        self._asking = asyncio.Lock()

    async def start(self) -> None:
        """Starts every engine; returns when they take questions."""
        shared = len(self._actors) < len(self._settings)
        names = ", ".join(round.key for round in self._settings)
        how = f"{len(self._actors)} for all of them, with weights that change" if shared else "one each"
        say_error(f"starting engines for {names} ({how})")
        with _told_of_engines():
            own = list(self._settings)[: len(self._actors)]
            await asyncio.gather(*map(self._hold, own))
            if shared and self._settings[BASE].probe_logprobs is None:
                # Its own, of a fresh engine: what it must give when it takes the initial weights again.
                found = await self._actor(BASE).probe.remote()
                self._settings[BASE] = replace(self._settings[BASE], probe_logprobs=tuple(found))

    async def ask(self, question: Question, rounds: Sequence[Round]) -> AsyncGenerator[Piece | Answer]:
        """See `questions.Answerer`."""
        row = prompt_row(question, self._config.prompts)
        prompt, plain = self._token_ids(question, [row["messages"], row["question_messages"]])
        source = prompt_text(row["messages"], row["context"])
        responses: dict[Round, dict[str, Any]] = {}
        async with self._asking:
            with _told_of_engines():
                by_engine: dict[int, list[Round]] = {}
                for round in rounds:
                    by_engine.setdefault(self._place(round), []).append(round)
                streams = [self._in_turn(group, prompt, question) for group in by_engine.values()]
                async with contextlib.aclosing(merged(streams)) as parts:
                    async for round, part in parts:
                        if isinstance(part, str):
                            yield Piece(round, part)
                        else:
                            responses[round] = part
                scores: dict[Round, float | None] = {}
                if row["context"]:
                    scores = await self._context_pmi(prompt, plain, responses)
        for round in rounds:
            response = responses[round]
            yield Answer(
                round,
                response["text"],
                tuple(response["token_ids"]),
                response["finish_reason"] == "length",
                copy_rate(answer_of(response["text"]), source),
                scores.get(round),
            )

    def _token_ids(self, question: Question, conversations: list[list[dict[str, str]]]) -> list[list[int]]:
        """Of the question with its context and without; raises UserError where the window has no room for an answer."""
        model = self._config.model
        tokenizer = load_tokenizer(model.source, model.trust_remote_code)
        rendered = render_prompts(tokenizer, conversations, self._config.prompts.chat)
        check_length(
            "the question",
            rendered[0],
            max_tokens=question.sampling.max_tokens,
            max_model_len=model.max_model_len,
            hint=", or ask for fewer max_tokens",
        )
        return rendered

    def _place(self, round: Round) -> int:
        """Which engine has a policy: the first ones have one each, the last one all others."""
        return min(list(self._settings).index(round), len(self._actors) - 1)

    def _actor(self, round: Round) -> Any:
        return self._actors[self._place(round)]

    async def _hold(self, round: Round) -> None:
        """The engine of a policy holds it: started, or with its weights taken, where that is not so already."""
        minutes = self._config.ray.wait_timeout_minutes
        try:
            async with asyncio.timeout(minutes * 60):
                await self._actor(round).hold.remote(self._settings[round], None)
        except TimeoutError:
            raise ResourceError(
                f"no engine for {round.key} within {minutes:g} minutes (ray.wait_timeout_minutes): expected nodes with "
                "room for it; see the Ray dashboard for what holds them"
            ) from None

    async def _in_turn(
        self, rounds: Sequence[Round], prompt: list[int], question: Question
    ) -> AsyncIterator[tuple[Round, str | dict[str, Any]]]:
        """The responses of policies that share an engine, one after the other: pieces of text, then all of each."""
        for round in rounds:
            await self._hold(round)
            request = {"prompt_token_ids": prompt, "seed": question.seed}
            stream = self._actor(round).stream.options(num_returns="streaming").remote(request, question.sampling)
            has_ended = False
            try:
                async for reference in stream:
                    yield round, await reference
                has_ended = True
            finally:
                if not has_ended:  # nobody waits for it any more
                    ray.cancel(stream)

    async def _context_pmi(
        self, prompt: list[int], plain: list[int], responses: dict[Round, dict[str, Any]]
    ) -> dict[Round, float | None]:
        """The context PMI of each response by the initial model, nats; None where one fills the window."""
        await self._hold(BASE)
        rows = [
            [
                {"sample": 0, "negative": number, "prompt_token_ids": ids, "response_token_ids": one["token_ids"]}
                for number, ids in enumerate((prompt, plain))
            ]
            for one in responses.values()
        ]
        scores = await self._actor(BASE).score.remote(rows, self._config.model.max_model_len)
        found: dict[Round, float | None] = {}
        for round, (own, none) in zip(responses, scores, strict=True):
            logprobs = own["logprob"], none["logprob"]
            found[round] = None if None in logprobs else float(pmi_without_context([logprobs[0]], [logprobs[1]])[0])
        return found


async def merged(streams: Sequence[AsyncIterator[Item]]) -> AsyncGenerator[Item]:
    """What several streams give, as it comes. The first error of one ends all of them, as does a caller that stops."""
    queue: asyncio.Queue[tuple[bool, Any]] = asyncio.Queue()

    async def follow(stream: AsyncIterator[Item]) -> None:
        try:
            async for item in stream:
                queue.put_nowait((True, item))
            queue.put_nowait((False, None))
        except Exception as error:
            queue.put_nowait((False, error))

    tasks = [asyncio.create_task(follow(stream)) for stream in streams]
    try:
        under_way = len(tasks)
        while under_way:
            is_item, value = await queue.get()
            if is_item:
                yield value
            elif value is not None:
                raise value
            else:
                under_way -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def _told_of_engines() -> Iterator[None]:
    """Raises the UserError of an actor as what it is, and EngineLost for an engine that died."""
    try:
        yield
    except ray.exceptions.RayError as error:
        if (cause := user_error(error)) is not None:
            raise cause from None
        if isinstance(error, ray.exceptions.RayActorError):
            raise EngineLost(
                "an engine died while it answered (out of memory?); the next question starts it anew"
            ) from error
        raise
