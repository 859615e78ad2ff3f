"""Who died with what: the record of engine deaths, and how a sampling actor asks by it. No Ray, no vLLM.

python -m pytest tests/unit/generation/test_deaths.py
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import secrets
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.generation import sampler
from mipo_ray.generation.actor_engines import EngineUse
from mipo_ray.generation.asking import Asker
from mipo_ray.generation.bisection import DEATHS_OF_A_ROW
from mipo_ray.generation.deaths import (
    DEATHS,
    MOST_CHARACTERS,
    MOST_DEATHS_IN_A_ROW,
    QUARANTINE,
    QUARANTINED,
    DeathRecord,
    Deaths,
    QuarantineError,
    group_of,
)
from mipo_ray.generation.engine import REQUESTS
from mipo_ray.generation.sampler import Sampler
from mipo_ray.pairs.schema import RESPONSES
from mipo_ray.storage.run_directory import RunDirectory, open_run
from tests.helpers.faulty_engine import EngineDied, FaultyEngine

STAGE = "rounds/000/generate"
WHOLE = group_of("sample", ["a", "b", "c", "d"])
SINGLE = group_of("sample", ["b"])


class Heard:
    """Takes the place of events."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, event: dict[str, Any]) -> None:
        self.events.append(event)


class Here:
    """Takes the place of the handle of an actor that is in this process."""

    def __init__(self, record: DeathRecord) -> None:
        self._record = record

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any, **named: Any) -> Any:
            return getattr(self._record, name)(*arguments, **named)

        return SimpleNamespace(remote=call)


@pytest.fixture(params=["{}", "memory://bucket{}"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunDirectory:
    """On a local disk, and on an object store, which cannot append."""
    return open_run(request.param.format(tmp_path / "run"))


def record_of(run: RunDirectory, allowed: int = 1, heard: Any = None) -> DeathRecord:
    return DeathRecord(run, STAGE, allowed, heard or Heard())


def lines(run: RunDirectory, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.read_text(f"{STAGE}/{name}") or "").splitlines()]


def kill(record: DeathRecord, *groups: Any, client: str = "one", error: str = "out of memory") -> None:
    record.start(client)
    for group in groups:
        record.ask(client, group)
    record.die(client, error)


def test_all_that_was_with_an_engine_is_noted_and_who_was_alone(run: RunDirectory) -> None:
    record = record_of(run)
    other = group_of("score", ["e", "f"])
    kill(record, WHOLE, other)
    kill(record, SINGLE, error="line 1\n   line 2" + "x" * 2000)
    found = lines(run, DEATHS)
    assert [(line["first"], line["rows"], line["step"], line["alone"]) for line in found] == [
        ("a", 4, "sample", False),
        ("e", 2, "score", False),
        ("b", 1, "sample", True),
    ]
    assert found[0]["error"] == "out of memory"
    assert found[2]["error"].startswith("line 1 line 2xxx")
    assert len(found[2]["error"]) < MOST_CHARACTERS + 30
    for record_again in (record, record_of(run)):  # what a resumed run reads
        assert record_again.deaths(WHOLE.key, alone=False) == 1
        assert record_again.deaths(WHOLE.key, alone=True) == 0
        assert record_again.deaths(SINGLE.key, alone=True) == 1
        assert record_again.deaths(group_of("score", ["b"]).key, alone=False) == 0


def test_what_is_answered_died_of_nothing(run: RunDirectory) -> None:
    record = record_of(run)
    record.start("one")
    record.ask("one", WHOLE)
    record.answer("one", WHOLE)
    record.ask("one", SINGLE)
    record.ask("two", group_of("sample", ["z"]))  # another engine's
    record.die("one", "gone")
    assert [(line["first"], line["alone"]) for line in lines(run, DEATHS)] == [("b", True)]


def test_a_death_is_counted_once_by_the_first_who_tells_of_it(run: RunDirectory) -> None:
    record = record_of(run)
    record.start("one")
    record.ask("one", SINGLE)
    record.die("one", "said by the engine")
    record.die("one", "seen by its client")
    assert record.start("one") == 1
    assert [line["error"] for line in lines(run, DEATHS)] == ["said by the engine"]


def test_an_actor_that_begins_again_and_said_nothing_was_killed(run: RunDirectory) -> None:
    record = record_of(run)
    assert record.start("one") == 0
    record.ask("one", SINGLE)
    assert record.start("one") == 1
    (line,) = lines(run, DEATHS)
    assert line["error"].startswith("its process ended without a word")


def test_deaths_in_a_row_are_those_with_no_answer_between(run: RunDirectory) -> None:
    record = record_of(run)
    for _ in range(3):
        kill(record, SINGLE)
    assert record.start("one") == 3
    assert record.start("two") == 0
    record.answer("one", WHOLE)
    record.die("one", "once more")
    assert record.start("one") == 1


def test_rows_are_set_aside_once_and_too_many_stop_the_run(run: RunDirectory) -> None:
    heard = Heard()
    record = record_of(run, heard=heard)
    kill(record, SINGLE)
    kill(record, SINGLE, error="CUDA error: an illegal memory access")
    assert record.set_aside(SINGLE) == ""
    assert record.set_aside(SINGLE) == ""
    (line,) = lines(run, QUARANTINE)
    assert line["time"].endswith("Z")
    assert {key: line[key] for key in ("prompt_id", "step", "reason")} == {
        "prompt_id": "b",
        "step": "sample",
        "reason": "CUDA error: an illegal memory access",
    }
    (event,) = heard.events
    assert (event["event"], event["quarantined_prompts"], event["prompt_id"]) == ("quarantined", 1, "b")
    again = record_of(run)
    other = group_of("score", ["c"])
    kill(again, other)
    message = again.set_aside(other)
    assert message.startswith(
        f"{run.path(STAGE, QUARANTINE)}: rows of which engines died, each alone: 2, the newest 'c'"
    )
    assert "expected at most 1 (generation.max_quarantined_share)" in message
    assert [line["prompt_id"] for line in lines(run, QUARANTINE)] == ["b", "c"]


def test_groups_are_told_apart_by_step_rows_and_order() -> None:
    asked = [("sample", "ab"), ("score", "ab"), ("sample", "ba"), ("sample", "abc"), ("sample", ["ab"])]
    assert len({group_of(step, list(rows)).key for step, rows in asked}) == len(asked)


@st.composite
def blocks_and_deadly(draw: st.DrawFn) -> tuple[list[list[str]], set[str]]:
    sizes = draw(st.lists(st.integers(1, 20), min_size=1, max_size=6))
    names = (f"row-{number}" for number in itertools.count())
    blocks = [list(itertools.islice(names, size)) for size in sizes]
    rows = list(itertools.chain.from_iterable(blocks))
    return blocks, draw(st.sets(st.sampled_from(rows), max_size=6))


@given(blocks_and_deadly(), st.integers(1, 4))
def test_deadly_rows_of_blocks_in_flight_are_found_and_all_others_answered_once(
    case: tuple[list[list[str]], set[str]], in_flight: int
) -> None:
    blocks, deadly = case
    run = open_run(f"memory://bucket/{secrets.token_hex(8)}")
    record = record_of(run, allowed=len(deadly))
    done: dict[int, list[tuple[range, list[str] | None]]] = {}
    deaths = 0
    while len(done) < len(blocks):
        engine = FaultyEngine(deadly)
        record.start("one")
        if not asyncio.run(answer_blocks(blocks, done, Deaths(Here(record), "one"), engine, in_flight)):
            record.die("one", "the engine died")
            deaths += 1
    for block, names in enumerate(blocks):
        answered = [answer for _, part in done[block] for answer in (part or [None])]
        assert answered == [None if name in deadly else f"answer to {name}" for name in names]
    assert {line["prompt_id"] for line in lines(run, QUARANTINE)} == deadly
    # One more for each of them: while it was together with other blocks.
    largest = max(map(len, blocks))
    assert deaths <= len(deadly) * (1 + math.ceil(math.log2(largest)) + DEATHS_OF_A_ROW)


async def answer_blocks(
    blocks: list[list[str]],
    done: dict[int, list[tuple[range, list[str] | None]]],
    deaths: Deaths,
    engine: FaultyEngine,
    in_flight: int,
) -> bool:
    """Asks for the blocks that are not done, as many at the same time; whether the engine lived to the end. What it
    died with is lost, as it is where a process ends."""

    async def probe() -> None:
        await engine.answer([])

    asker = Asker(deaths, probe)
    places = asyncio.Semaphore(in_flight)

    async def answer(block: int) -> None:
        async def ask(rows: range) -> list[str]:
            return await engine.answer(blocks[block][rows.start : rows.stop])

        async with places:
            done[block] = await asker.answers("sample", pa.table({"prompt_id": blocks[block]}), ask)

    left = [asyncio.ensure_future(answer(block)) for block in range(len(blocks)) if block not in done]
    finished, _ = await asyncio.wait(left, return_when=asyncio.FIRST_EXCEPTION)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    errors = [task.exception() for task in finished if task.exception() is not None]
    assert all(isinstance(error, EngineDied) for error in errors), errors
    return not errors


def test_blocks_are_asked_together_until_an_engine_dies() -> None:
    engine = FaultyEngine(deadly=())
    blocks = [["a", "b"], ["c"], ["d", "e"]]
    record = record_of(open_run(f"memory://bucket/{secrets.token_hex(8)}"))
    assert asyncio.run(answer_blocks(blocks, {}, Deaths(Here(record), "one"), engine, in_flight=3))
    assert engine.most_together == 3
    kill(record, *(group_of("sample", block) for block in blocks))
    suspected = FaultyEngine(deadly=())
    record.start("one")
    assert asyncio.run(answer_blocks(blocks, {}, Deaths(Here(record), "one"), suspected, in_flight=3))
    assert suspected.most_together == 1


def test_without_a_record_a_block_is_asked_as_it_is() -> None:
    async def ask(rows: range) -> str:
        return f"{len(rows)} answers"

    async def run() -> Any:
        return await Asker(None, lambda: pytest.fail("no probe")).answers("sample", pa.table({"x": [1, 2]}), ask)

    assert asyncio.run(run()) == [(range(2), "2 answers")]


class Sampled:
    """Takes the place of an actor's engine: every request is answered by its seed, as a token."""

    name = "engine"

    async def respond(self, requests: pa.ChunkedArray, sampling: Any) -> pa.Array:
        answers = [[response(request["seed"]) for request in row] for row in requests.to_pylist()]
        return pa.array(answers, RESPONSES)

    async def score(self, rows: list[list[dict[str, Any]]], window: int) -> list[list[dict[str, Any]]]:
        return [[{**wanted, "logprob": -1.0} for wanted in row] for row in rows]

    async def probe(self) -> list[float]:
        return []

    def is_gone(self, error: Exception) -> bool:
        return False

    def give_back(self) -> None: ...


def response(token: int) -> dict[str, Any]:
    names = [field.name for field in RESPONSES.value_type]
    return dict.fromkeys(names) | {"token_ids": [token], "text": str(token)}


@pytest.fixture
def sampling_actor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the actor, without Ray, around a record and an engine that answers everything."""

    def make(record: Any, to_score: Any = None) -> Sampler:
        monkeypatch.setattr(sampler, "OwnEngine", lambda *_: Sampled())
        monkeypatch.setattr(sampler.ray, "get_runtime_context", lambda: SimpleNamespace(get_actor_id=lambda: "one"))
        monkeypatch.setattr("mipo_ray.generation.deaths.ray.get", asyncio.run)
        settings: Any = SimpleNamespace(max_model_len=16)
        heard: Any = Heard()
        return Sampler(EngineUse(settings, 0.0, deaths=Deaths(Here(record))), {}, heard, to_score)

    return make


def block_of(rows: str) -> pa.Table:
    asked = [[{"prompt_token_ids": [1], "seed": seed, "sampling": None}] for seed in range(len(rows))]
    dropped = ["too_long" if row == "d" else "" for row in rows]
    return pa.table({"prompt_id": list(rows), "dropped": dropped, "requests": pa.array(asked, REQUESTS)})


def sampled_block(actor: Sampler, block: pa.Table) -> pa.Table:
    async def send() -> pa.Table:
        (table,) = [table async for table in actor(block)]
        return table

    return asyncio.run(send())


def test_a_row_that_is_set_aside_stays_in_its_block_and_says_so(sampling_actor: Any, run: RunDirectory) -> None:
    record = record_of(run)
    for group in (WHOLE, group_of("sample", ["a", "b"]), SINGLE, SINGLE):
        kill(record, group)
    table = sampled_block(sampling_actor(record), block_of("abcd"))
    assert table["prompt_id"].to_pylist() == list("abcd")
    assert table["dropped"].to_pylist() == ["", QUARANTINED, "", "too_long"]
    tokens = [[one["token_ids"] for one in row] for row in table["responses"].to_pylist()]
    assert tokens == [[[0]], [], [[2]], [[3]]]
    assert [line["prompt_id"] for line in lines(run, QUARANTINE)] == ["b"]


def test_a_row_of_whose_score_engines_die_is_set_aside_too(sampling_actor: Any, run: RunDirectory) -> None:
    record = record_of(run)
    for rows in ("ab", "a", "a"):
        kill(record, group_of("score", list(rows)))

    def to_score(block: pa.Table) -> list[list[dict[str, Any]]]:
        return [[{"sample": 0, "negative": 0}] for _ in range(block.num_rows)]

    table = sampled_block(sampling_actor(record, to_score), block_of("ab"))
    assert table["dropped"].to_pylist() == [QUARANTINED, ""]
    assert table["scores"].to_pylist() == [[], [{"sample": 0, "negative": 0, "logprob": -1.0}]]
    assert [len(row) for row in table["responses"].to_pylist()] == [1, 1]


def test_past_the_share_the_actor_says_why_it_stops(sampling_actor: Any, run: RunDirectory) -> None:
    record = record_of(run, allowed=0)
    for group in (WHOLE, group_of("sample", ["a", "b"]), SINGLE, SINGLE):
        kill(record, group)
    with pytest.raises(QuarantineError, match=r"expected at most 0 \(generation.max_quarantined_share\)"):
        sampled_block(sampling_actor(record), block_of("abcd"))


def test_engines_that_die_whatever_they_are_asked_stop_the_run(sampling_actor: Any, run: RunDirectory) -> None:
    record = record_of(run)
    for _ in range(MOST_DEATHS_IN_A_ROW):
        kill(record, WHOLE)
    with pytest.raises(QuarantineError, match="30 vLLM engines died one after the other"):
        sampled_block(sampling_actor(record), block_of("abcd"))
