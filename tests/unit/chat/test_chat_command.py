"""The command as far as it goes before an engine: what it refuses, and with which words.

python -m pytest tests/unit/chat/test_chat_command.py
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mipo_ray.chat import engines
from mipo_ray.chat.__main__ import main
from mipo_ray.chat.policies import ChatRun, open_chat
from mipo_ray.chat.votes import VOTES
from mipo_ray.config.recipe import load_config
from mipo_ray.storage.rounds import BASE, Round
from tests.helpers.chat_runs import make_chat_run
from tests.helpers.fake_answerer import FakeAnswerer
from tests.helpers.guard_figures import broken_bound
from tests.helpers.stages import commit

ANSWERS = {"base": "Nothing.", "0": "Bread.", "1": "A soup, as a nurse needs."}


class StartedFakeAnswerer(FakeAnswerer):
    """The fake, started as engines are, whose workers may print something."""

    async def start(self) -> None:
        """Prints as Ray does what a worker printed."""
        print("(LivingEngine pid=7) loading")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ChatRun]:
    """The chats for which engines would have been started; a fake answers in their place."""
    found: list[ChatRun] = []

    @contextmanager
    def fake_engines(chat: ChatRun) -> Iterator[StartedFakeAnswerer]:
        found.append(chat)
        yield StartedFakeAnswerer(ANSWERS)

    monkeypatch.setattr(engines, "running_engines", fake_engines)
    return found


def test_the_base_and_the_newest_policy_answer(tmp_path: Path) -> None:
    make_chat_run(tmp_path, 2)
    chat = open_chat(f"{tmp_path}/run", None)
    assert chat.rounds == (BASE, Round(1))
    assert chat.engine_rounds == (BASE, Round(1))


def test_a_policy_that_was_found_bad_answers_where_it_is_named_alone(tmp_path: Path) -> None:
    run = make_chat_run(tmp_path, 2)
    config = load_config(None, [f"run_dir={run.url}"])
    commit(run, "rounds/001/guard", config, broken=[broken_bound()])
    assert open_chat(f"{tmp_path}/run", None).rounds == (BASE, Round(0))
    assert open_chat(f"{tmp_path}/run", "1").rounds == (Round(1),)
    commit(run, "rounds/000/guard", config, broken=[broken_bound()])
    assert open_chat(f"{tmp_path}/run", None).rounds == (BASE,)


def test_others_answer_where_they_are_named(tmp_path: Path) -> None:
    make_chat_run(tmp_path, 2)
    assert open_chat(f"{tmp_path}/run", "1, 0,1").rounds == (Round(0), Round(1))
    # The initial model judges all the same.
    assert open_chat(f"{tmp_path}/run", "1").engine_rounds == (BASE, Round(1))
    assert open_chat(f"{tmp_path}/run", None, ["generation.pool.cpus_per_engine=2"]).config.run_dir.endswith("/run")


@pytest.mark.parametrize(
    ("trained", "words", "said"),
    [
        (
            2,
            ["--rounds", "base,2"],
            "--rounds 'base,2': expected policies of {run} with commas between them (base, 0, 1)",
        ),
        (2, ["--rounds", ""], "expected policies of {run} with commas between them (base, 0, 1), found ''"),
        (0, [], "{run}: expected a round that is trained, found none; python -m mipo_ray.run trains them"),
        (2, ["--temperature", "-1"], "temperature: "),
        (2, ["--max-tokens", "300"], "max_tokens: 300 leaves no room for a prompt"),
        (2, ["--once", "  "], "the question, field 'prompt': expected a prompt, found an empty string"),
        (2, ["model.max_model_len=128"], "this run directory holds work of another configuration"),
        (2, ["generation.pool.engine_args={worker_cls: evil.Worker}"], None),  # the user's own word
        (2, ["--page", "--port", "65536"], "--port 65536: expected a port of 127.0.0.1 that is free"),
    ],
)
def test_what_is_wrong_is_told_before_an_engine_starts(
    tmp_path: Path,
    started: list[ChatRun],
    capsys: pytest.CaptureFixture[str],
    trained: int,
    words: list[str],
    said: str | None,
) -> None:
    run = make_chat_run(tmp_path, trained)
    code = main([run.url, *([] if "--once" in words or "--page" in words else ["--once", "What?"]), *words])
    output = capsys.readouterr()
    if said is None:
        assert (code, len(started)) == (0, 1)
        return
    assert (code, started) == (2, [])
    assert said.format(run=run.url) in output.err
    assert "Traceback" not in output.err


def test_a_place_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        assert main([str(place)]) == 2
        assert f"error: {place}: expected a run directory with a config.yaml, found none" in capsys.readouterr().err


def test_a_port_that_is_taken_and_votes_that_are_none_are_refused(
    tmp_path: Path, started: list[ChatRun], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_chat_run(tmp_path, 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main([run.url, "--page", "--port", str(taken.getsockname()[1])]) == 2
    assert "that is free" in capsys.readouterr().err
    run.write_text(VOTES, "{}\n")
    assert main([run.url, "--page"]) == 2
    assert "votes.jsonl, line 1: " in capsys.readouterr().err
    assert started == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required"),
        (["one", "two"], "expected one run directory, found one, two"),
        (["one", "--json"], "--json: goes with --once"),
        (["one", "--port", "80"], "--port: goes with --page"),
        (["one", "--seed", "-1"], "--seed: expected a whole number"),
        (["one", "--page", "--seed", "1"], "--seed: the page has a setting for it"),
        (["one", "--page", "--once", "x"], "not allowed with argument"),
    ],
)
def test_arguments_that_do_not_fit(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_recipe_does_not_run_code_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_chat_run(tmp_path, 1, "model.trust_remote_code=true")
    assert main([run.url, "--once", "What?"]) == 2
    assert "model.trust_remote_code: runs Python code" in capsys.readouterr().err


@pytest.mark.usefixtures("started")
def test_one_question_as_text_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_chat_run(tmp_path, 2)
    words = [run.url, "--once", " What? ", "--context", "I am a nurse.", "--seed", "5", "--temperature", "0"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.index("base\nNothing.") < said.index("round 1\nA soup, as a nurse needs.\n")
    assert "context PMI +11.25 nats" in said
    assert main([*words, "--json", "--rounds", "0,1", "--max-tokens", "9", "--top-p", "0.5"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in ("question", "context", "seed")} == {
        "question": "What?",
        "context": "I am a nurse.",
        "seed": 5,
    }
    assert found["sampling"] == {"temperature": 0.0, "top_p": 0.5, "top_k": 0, "max_tokens": 9, "min_tokens": 0}
    assert [(one["round"], one["text"]) for one in found["answers"]] == [("0", "Bread."), ("1", ANSWERS["1"])]


@pytest.mark.usefixtures("started")
def test_what_cannot_be_answered_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([make_chat_run(tmp_path, 1).url, "--once", "refuse this"]) == 2
    assert "error: the question: 900 tokens do not fit" in capsys.readouterr().err
