"""What engines are asked, and in which order, with fakes of the actors in which they run.

python -m pytest tests/unit/chat/test_engines.py
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from mipo_ray.chat.engines import EngineAnswerer, EngineLost, engine_count, merged
from mipo_ray.chat.questions import Answer, Piece, Question
from mipo_ray.config.generation import SamplingConfig
from mipo_ray.config.recipe import load_config
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.generation.sampler import policy_engines
from mipo_ray.ray_cluster.resources import Node, ResourceError, Resources
from mipo_ray.storage.rounds import BASE, Round
from tests.helpers.tiny_model import make_tokenizer

CPUS = Resources(on_gpu=False, dtype="float32", gpus_per_engine=0.0, gpus_per_worker=0.0)
QUESTION = Question("What grows?", "I am a gardener.", SamplingConfig(max_tokens=8), 5)


class FakeMethod:
    """A method of an actor: `remote` starts it."""

    def __init__(self, function: Any) -> None:
        self.remote = function

    def options(self, **_: Any) -> FakeMethod:
        return self


class FakeActor:
    """An actor with an engine that does not compute: it says its policy's name, and notes what it was told.

    A log-prob is minus the length of the prompt, so that a PMI is told by the prompts. error: what `hold` raises.
    """

    def __init__(self, log: list[Any]) -> None:
        self.log, self.held, self.error = log, "", None
        self.hold, self.score, self.probe = (FakeMethod(one) for one in (self._hold, self._score, self._probe))
        self.stream = FakeMethod(self._stream)

    async def _hold(self, settings: Any, events: Any) -> None:
        assert events is None
        if self.error is not None:
            raise self.error
        self.held = settings.model_path
        self.log.append(("hold", settings.model_path, settings.probe_logprobs))

    async def _stream(self, request: dict[str, Any], sampling: SamplingConfig) -> AsyncIterator[Any]:
        self.log.append(("stream", self.held, request["seed"], sampling.max_tokens, len(request["prompt_token_ids"])))
        for piece in (self.held, " grows"):
            yield _ready(piece)
            await asyncio.sleep(0)
        text = f"{self.held} grows"
        yield _ready({"text": text, "token_ids": [1, 2, 3], "finish_reason": "length" if self.held == "m0" else "stop"})

    async def _score(self, rows: list[Any], window: int) -> list[Any]:
        self.log.append(("score", self.held, window, [[one["response_token_ids"] for one in row] for row in rows]))
        return [[{**one, "logprob": -float(len(one["prompt_token_ids"]))} for one in row] for row in rows]

    async def _probe(self) -> list[float]:
        return [-1.0, -2.0]


def _ready(value: Any) -> Any:
    future = asyncio.get_running_loop().create_future()
    future.set_result(value)
    return future


@pytest.fixture(autouse=True)
def cancelled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The streams that were cancelled. Ray's own function would start a cluster."""
    found: list[Any] = []
    monkeypatch.setattr(ray, "cancel", found.append)
    return found


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = make_tokenizer()
    monkeypatch.setattr("mipo_ray.chat.engines.load_tokenizer", lambda *_: made)
    return made


def config_of(*overrides: str) -> Config:
    return load_config(None, ["model.max_model_len=256", *overrides])


def answerer_of(engines: int, policies: int, log: list[Any]) -> tuple[EngineAnswerer, list[FakeActor]]:
    config = config_of()
    names = {BASE: "initial", **{Round(number): f"m{number}" for number in range(policies - 1)}}
    settings = {
        round: replace(policy_engines(config, name, CPUS).settings, probe_logprobs=None if round.is_base else (-3.0,))
        for round, name in names.items()
    }
    actors = [FakeActor(log) for _ in range(engines)]
    return EngineAnswerer(config, settings, actors), actors


def asked(answerer: EngineAnswerer, question: Question, rounds: list[Round]) -> list[Piece | Answer]:
    async def ask() -> list[Piece | Answer]:
        await answerer.start()
        return [part async for part in answerer.ask(question, rounds)]

    return asyncio.run(ask())


@pytest.mark.usefixtures("tokenizer")
def test_each_policy_has_an_engine_and_all_answer_at_once() -> None:
    log: list[Any] = []
    answerer, _ = answerer_of(2, 2, log)
    parts = asked(answerer, QUESTION, [BASE, Round(0)])
    assert sorted(log[:2]) == [("hold", "initial", None), ("hold", "m0", (-3.0,))]  # the start
    streams = [entry for entry in log if entry[0] == "stream"]
    assert [entry[1:4] for entry in streams] == [("initial", 5, 8), ("m0", 5, 8)]
    pieces = [part for part in parts if isinstance(part, Piece)]
    assert [piece.round for piece in pieces] != sorted(piece.round for piece in pieces)  # interleaved
    for round, name in ((BASE, "initial"), (Round(0), "m0")):
        assert "".join(piece.text for piece in pieces if piece.round == round) == f"{name} grows"
    base, policy = (part for part in parts if isinstance(part, Answer))
    assert (base.round, base.text, base.token_ids, base.is_cut) == (BASE, "initial grows", (1, 2, 3), False)
    assert (policy.round, policy.text, policy.is_cut) == (Round(0), "m0 grows", True)
    assert isinstance(parts[-2], Answer)


@pytest.mark.usefixtures("tokenizer")
def test_the_initial_model_scores_every_answer_with_the_context_and_without(tokenizer: Any) -> None:
    log: list[Any] = []
    answerer, _ = answerer_of(2, 2, log)
    answers = [one for one in asked(answerer, QUESTION, [BASE, Round(0)]) if isinstance(one, Answer)]
    assert log[-1] == ("score", "initial", 256, [[[1, 2, 3]] * 2] * 2)
    lengths = [
        len(tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"])
        for text in ("I am a gardener.\n\nWhat grows?", "What grows?")
    ]
    assert [one.context_pmi for one in answers] == [lengths[1] - lengths[0]] * 2
    # Of the words of "initial grows" none stand in the question; PMI and copy rate need no context to be told apart.
    assert [one.copy_rate for one in answers] == [0.0, 0.0]


@pytest.mark.usefixtures("tokenizer")
def test_without_a_context_there_is_no_pmi() -> None:
    log: list[Any] = []
    answerer, _ = answerer_of(2, 2, log)
    answers = [one for one in asked(answerer, replace(QUESTION, context=""), [BASE]) if isinstance(one, Answer)]
    assert [one.context_pmi for one in answers] == [None]
    assert not any(entry[0] == "score" for entry in log)


@pytest.mark.usefixtures("tokenizer")
def test_policies_that_share_an_engine_answer_one_after_the_other_in_the_order_that_is_shown() -> None:
    log: list[Any] = []
    answerer, _ = answerer_of(1, 3, log)
    parts = asked(answerer, QUESTION, [Round(1), BASE, Round(0)])
    # The initial model's own probes let it take its weights back, as a policy's do that the trainer wrote down.
    own = (-1.0, -2.0)
    told = [entry[:3] if entry[0] == "hold" else entry[:2] for entry in log]
    assert told == [
        ("hold", "initial", None),
        *(("hold", "m1", (-3.0,)), ("stream", "m1")),
        *(("hold", "initial", own), ("stream", "initial")),
        *(("hold", "m0", (-3.0,)), ("stream", "m0")),
        *(("hold", "initial", own), ("score", "initial")),
    ]
    assert [part.round for part in parts if isinstance(part, Answer)] == [Round(1), BASE, Round(0)]


@pytest.mark.usefixtures("tokenizer")
def test_two_engines_of_three_policies_keep_the_initial_model_on_its_own() -> None:
    log: list[Any] = []
    answerer, actors = answerer_of(2, 3, log)
    asked(answerer, QUESTION, [BASE, Round(0), Round(1)])
    assert actors[0].held == "initial"
    assert [entry[1] for entry in log if entry[0] == "hold" and entry[1] != "initial"] == ["m0", "m0", "m1"]


@pytest.mark.usefixtures("tokenizer")
def test_a_question_that_does_not_fit_starts_nothing() -> None:
    log: list[Any] = []
    answerer, _ = answerer_of(2, 2, log)
    with pytest.raises(
        UserError, match=r"'the question': \d+ tokens and a response of up to 8 do not fit .*max_tokens"
    ):
        asked(answerer, replace(QUESTION, text="word " * 300), [BASE])
    assert not any(entry[0] == "stream" for entry in log)


@pytest.mark.usefixtures("tokenizer")
def test_an_engine_that_died_is_told_and_the_next_question_is_answered() -> None:
    log: list[Any] = []
    answerer, actors = answerer_of(2, 2, log)

    async def ask_twice() -> list[Any]:
        await answerer.start()
        actors[1].error = ray.exceptions.ActorDiedError()
        with pytest.raises(EngineLost, match="the next question starts it anew"):
            async for _ in answerer.ask(QUESTION, [BASE, Round(0)]):
                pass
        actors[1].error = None
        return [part async for part in answerer.ask(QUESTION, [BASE, Round(0)])]

    assert sum(isinstance(part, Answer) for part in asyncio.run(ask_twice())) == 2


@pytest.mark.usefixtures("tokenizer")
def test_an_answer_that_nobody_waits_for_is_cancelled(cancelled: list[Any]) -> None:
    answerer, _ = answerer_of(2, 2, [])

    async def ask() -> list[Any]:
        async with contextlib.aclosing(answerer.ask(QUESTION, [BASE, Round(0)])) as parts:
            await anext(parts)
        return [part async for part in answerer.ask(QUESTION, [BASE])]

    parts = asyncio.run(ask())
    assert 1 <= len(cancelled) <= 2
    assert isinstance(parts[-1], Answer)  # the next question need not wait


def test_streams_are_merged_as_they_come_and_end_together() -> None:
    async def numbers(start: int, error: bool = False) -> AsyncIterator[int]:
        for number in range(start, start + 3):
            yield number
            await asyncio.sleep(0)
        if error:
            raise ValueError("broken")

    async def collect(*streams: AsyncIterator[int]) -> list[int]:
        return [number async for number in merged(streams)]

    assert sorted(asyncio.run(collect(numbers(0), numbers(10)))) == [0, 1, 2, 10, 11, 12]
    assert asyncio.run(collect()) == []
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(collect(numbers(0), numbers(10, error=True)))


@pytest.mark.parametrize(
    ("cpus", "memory_gib", "policies", "engines"),
    [(6, 64, 2, 2), (6, 64, 3, 3), (2, 64, 3, 2), (1, 64, 2, 1), (6, 0.5, 2, 1)],
)
def test_there_are_as_many_engines_as_there_is_room_for(
    tiny_model: Path, cpus: int, memory_gib: float, policies: int, engines: int
) -> None:
    node = Node({"CPU": cpus, "memory": memory_gib * 1024**3})
    config = config_of(f"model.path={tiny_model}", "generation.pool.min_size=4", "generation.pool.max_size=4")
    assert engine_count(config, CPUS, [node], policies) == engines


def test_a_place_without_room_is_refused_unless_nodes_come_on_demand() -> None:
    config = config_of("generation.pool.cpus_per_engine=8")
    with pytest.raises(ResourceError, match="room for 0 of the 1"):
        engine_count(config, CPUS, [Node({"CPU": 4.0})], 2)
    on_demand = config_of("generation.pool.cpus_per_engine=8", "ray.autoscaling=true")
    assert engine_count(on_demand, CPUS, [Node({"CPU": 4.0})], 2) == 2
