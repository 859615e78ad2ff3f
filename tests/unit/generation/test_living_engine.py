"""When a living engine takes a policy's weights, by what it proves that it has them, and how two stages share it.

python -m pytest tests/unit/generation/test_living_engine.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from mipo_ray.config.recipe import load_config
from mipo_ray.generation import living_engine
from mipo_ray.generation.living_engine import LivingEngine, WrongWeights, check_probes, takes_weights_of
from mipo_ray.generation.vllm_arguments import engine_settings
from mipo_ray.ray_cluster.resources import resolve
from mipo_ray.storage.rounds import BASE, Round

CONFIG = load_config(None)
EXPECTED = (-200.0, -210.0, -190.0, -205.0)
POLICY = replace(
    engine_settings(CONFIG, "/runs/demo/policy", resolve(CONFIG, {"CPU": 6, "GPU": 0})), probe_logprobs=EXPECTED
)


def test_an_engine_takes_the_weights_of_another_policy_that_can_be_proven_and_differs_in_nothing_else() -> None:
    assert takes_weights_of(POLICY, POLICY)
    assert takes_weights_of(replace(POLICY, probe_logprobs=None), replace(POLICY, model_path="/runs/demo/next"))
    assert takes_weights_of(replace(POLICY, probe_logprobs=None), replace(POLICY, probe_logprobs=None))
    assert not takes_weights_of(POLICY, replace(POLICY, model_path="/runs/demo/older", probe_logprobs=None))
    assert not takes_weights_of(POLICY, replace(POLICY, dtype="bfloat16"))
    assert not takes_weights_of(POLICY, replace(POLICY, max_model_len=POLICY.max_model_len + 1))


@pytest.mark.parametrize(
    ("settings", "difference", "is_right"),
    [
        (POLICY, 0.0009, True),
        (POLICY, 0.0011, False),
        (replace(POLICY, on_gpu=True), 0.009, True),
        (replace(POLICY, on_gpu=True), 0.011, False),
        (replace(POLICY, dtype="bfloat16"), 0.9, True),
        (POLICY, float("nan"), False),
        (POLICY, float("-inf"), False),
    ],
)
def test_what_an_engine_gives_is_what_the_trainer_gave(settings, difference, is_right) -> None:
    found = [value + difference for value in EXPECTED]
    if is_right:
        check_probes(settings, found)
    else:
        with pytest.raises(WrongWeights, match="/runs/demo/policy: an engine gives the probe sequences log-probs of"):
            check_probes(settings, found)


def test_a_router_that_sends_some_tokens_elsewhere_makes_no_other_policy() -> None:
    check_probes(POLICY, [EXPECTED[0] + 2, EXPECTED[1] - 2, *EXPECTED[2:]])
    with pytest.raises(WrongWeights):
        check_probes(POLICY, [EXPECTED[0] + 2, EXPECTED[1] - 2, EXPECTED[2] + 2, EXPECTED[3]])


def test_all_probes_are_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        check_probes(POLICY, EXPECTED[:3])


class FakeEngine:
    """Answers when `go_on` is set, as its trainer expects, and refuses to forget prompts that are in use."""

    made: list[FakeEngine]

    def __init__(self, settings: Any, *, takes_weights: bool) -> None:
        self.calls: list[str] = []
        self.asking = 0
        self.go_on = asyncio.Event()
        self.made.append(self)

    async def respond(self, requests: Any, sampling: Any, tally: Any) -> Any:
        self.asking += 1
        await self.go_on.wait()
        self.asking -= 1
        if requests == "fail":
            raise RuntimeError("the engine is gone")
        tally.answered(1, requests)
        return requests

    async def probe(self) -> list[float]:
        await asyncio.sleep(0)  # others come in here
        return list(EXPECTED)

    async def forget_prompts(self) -> None:
        self.calls.append("forget")
        await asyncio.sleep(0)
        assert not self.asking, "prompts of a request under way were forgotten"

    async def load(self, model_path: str) -> None:
        self.calls.append(f"load {model_path}")
        await asyncio.sleep(0)
        assert not self.asking, "the weights changed under a request"

    def shutdown(self) -> None:
        self.calls.append("shutdown")


class FakeEvents:
    """Those of one stage."""

    def __init__(self, round: Round, stage: str) -> None:
        self.round, self.stage = round, stage
        self.told: list[dict[str, Any]] = []
        self.emitted: list[str] = []

    def tell(self, event: dict[str, Any]) -> None:
        self.told.append(event)

    def emit(self, event: dict[str, Any]) -> None:
        self.emitted.append(event["event"])

    def emit_and_wait(self, event: dict[str, Any]) -> None:
        self.emit(event)


@pytest.fixture
def living(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    FakeEngine.made = []
    monkeypatch.setattr(living_engine, "Engine", FakeEngine)
    context = SimpleNamespace(get_actor_id=lambda: "0123456789")
    monkeypatch.setattr(living_engine, "ray", SimpleNamespace(get_runtime_context=lambda: context))
    return lambda: LivingEngine(POLICY.max_model_len)


def comes(work: Awaitable[Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 30))


def stages() -> tuple[Any, Any]:
    return FakeEvents(BASE, "evaluate"), FakeEvents(Round(0), "generate")


def test_two_stages_that_begin_at_once_find_one_engine_and_both_are_counted(living) -> None:
    measured, generated = stages()

    async def work() -> None:
        engine = living()
        await asyncio.gather(engine.hold(POLICY, measured), engine.hold(POLICY, generated))
        answers = [engine.respond(number, None, events) for number, events in ((3, measured), (5, generated))]
        tasks = [asyncio.create_task(answer) for answer in answers]
        while FakeEngine.made[0].asking < len(tasks):
            await asyncio.sleep(0)
        await engine.hold(POLICY, measured)  # a client that died is there again
        FakeEngine.made[0].go_on.set()
        assert await asyncio.gather(*tasks) == [3, 5]

    comes(work())
    (engine,) = FakeEngine.made
    assert not [call for call in engine.calls if call != "forget"]
    assert measured.emitted == ["engine_start"]
    for events, tokens, ready in ((measured, 3, 2), (generated, 5, 1)):
        assert [event["tokens"] for event in events.told if event["event"] == "answered"] == [tokens]
        assert sum(event["event"] == "ready" for event in events.told) == ready


def test_a_policy_is_loaded_once_for_two_stages_and_what_is_asked_meanwhile_waits(living) -> None:
    following = replace(POLICY, model_path="/runs/demo/next")
    measured, generated = stages()

    async def work() -> None:
        engine = living()
        await engine.hold(POLICY, measured)
        FakeEngine.made[0].go_on.set()
        held = [engine.hold(following, events) for events in (measured, generated)]
        await asyncio.gather(*held, engine.respond(1, None, generated))

    comes(work())
    (engine,) = FakeEngine.made
    assert engine.calls.count("load /runs/demo/next") == 1
    assert measured.emitted + generated.emitted == ["engine_start", "weight_swap"]


def test_the_death_of_an_engine_is_that_of_the_stage_that_asked(living, monkeypatch) -> None:
    monkeypatch.setattr(living_engine, "is_dead_engine", lambda error: True)
    ends: list[int] = []
    monkeypatch.setattr(living_engine, "end_with_engine", lambda: ends.append(1))
    measured, generated = stages()

    async def work() -> None:
        engine = living()
        await engine.hold(POLICY, generated)
        await engine.hold(POLICY, measured)  # who came last
        FakeEngine.made[0].go_on.set()
        await engine.respond("fail", None, generated)

    with pytest.raises(RuntimeError, match="the engine is gone"):
        comes(work())
    assert (ends, generated.emitted, measured.emitted) == ([1], ["engine_start", "engine_death"], [])
