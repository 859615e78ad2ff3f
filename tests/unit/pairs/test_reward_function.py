"""Reward functions by their import path: what they are called with, what they may return, what is refused.

python -m pytest tests/unit/pairs/test_reward_function.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mipo_ray.errors import UserError
from mipo_ray.pairs.reward_function import load_reward_function

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Write]:
    """Writes a module in the folder of the command, which is gone after the test; returns its name."""
    name = f"rewards_{abs(hash(request.node.name))}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one not in ("", str(tmp_path))])

    def module(text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    yield module
    sys.modules.pop(name, None)


def row(prompt_id: str, *texts: str, **extra: Any) -> dict[str, Any]:
    return {
        "prompt_id": prompt_id,
        "messages": [{"role": "user", "content": f"Say {prompt_id}"}],
        "context": "likes tea",
        "group": "g",
        "extra": json.dumps(extra),
        "responses": [{"text": text, "token_ids": list(text.encode())} for text in texts],
    }


def test_a_function_is_called_once_as_trl_calls_one(write: Write) -> None:
    name = write(
        "calls = []\n"
        "def reward(prompts, completions, completion_ids, answer, **kwargs):\n"
        "    calls.append((prompts, completions, completion_ids, answer, kwargs))\n"
        "    return [float(len(one[0]['content'])) for one in completions]\n"
    )
    function = load_reward_function(f"{name}:reward")
    assert function.columns == ("answer",)
    found = function.rewards([row("p", "a", "bcd", answer=4), row("q", "ef", answer=5, topic="x")])
    assert found == [[1.0, 3.0], [2.0]]
    ((prompts, completions, ids, answer, others),) = sys.modules[name].calls
    assert prompts == [[{"role": "user", "content": f"Say {one}"}] for one in "ppq"]
    assert completions == [[{"role": "assistant", "content": text}] for text in ("a", "bcd", "ef")]
    assert ids == [[97], [98, 99, 100], [101, 102]]
    assert answer == [4, 4, 5]
    assert others == {
        "prompt_id": ["p", "p", "q"],
        "context": ["likes tea"] * 3,
        "group": ["g"] * 3,
        "topic": [None, None, "x"],
    }


def test_a_reward_function_made_for_trl_takes_what_it_names(write: Write) -> None:
    """Without **kwargs nothing else is handed over; a class is made once."""
    name = write(
        "class Short:\n"
        "    def __init__(self):\n"
        "        self.unit = -1\n"
        "    def __call__(self, completions):\n"
        "        return [self.unit * len(one[0]['content']) for one in completions]\n"
    )
    assert load_reward_function(f"{name}:Short").rewards([row("p", "ab", "c")]) == [[-2.0, -1.0]]


@pytest.mark.parametrize(
    "returned", [np.array([1.5, 0.0]), torch.tensor([1.5, 0.0]), (1.5, False), [np.float32(1.5), 0]]
)
def test_numbers_of_any_kind_are_rewards(write: Write, returned: Any) -> None:
    name = write("value = None\ndef reward(completions):\n    return value\n")
    function = load_reward_function(f"{name}:reward")
    sys.modules[name].value = returned
    assert function.rewards([row("p", "a", "b")]) == [[1.5, 0.0]]


def test_none_and_what_is_not_finite_say_nothing(write: Write) -> None:
    name = write("def reward(completions):\n    return [None, float('nan'), float('inf'), 2]\n")
    assert load_reward_function(f"{name}:reward").rewards([row("p", *"abcd")]) == [[None, None, None, 2.0]]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1.0]", "expected 2 numbers, one for each response, found 1"),
        ("return 1.0", "expected a list of numbers, found 1.0"),
        ("return ['a', 'b']", "expected numbers or None, found 'a'"),
        ("raise KeyError('x')", "raised KeyError: 'x'"),
    ],
)
def test_what_a_function_does_wrong_is_told_with_its_name_and_prompt(write: Write, body: str, said: str) -> None:
    name = write(f"def reward(completions):\n    {body}\n")
    with pytest.raises(UserError) as error:
        load_reward_function(f"{name}:reward").rewards([row("p7", "a", "b")])
    assert str(error.value) == (
        f"preference.function {name}:reward, called with 2 responses from prompt 'p7' on: {said}"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a function or a class 'reward'"),
        ("reward = 3", "expected a function or a class 'reward'"),
        ("import no_such_module_at_all", "cannot import"),
        ("def reward(prompts): ...", "expected a function of completions"),
        ("class reward:\n    def __init__(self, weights): ...", "cannot be used: TypeError"),
    ],
)
def test_what_is_no_reward_function_is_refused(write: Write, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_reward_function(f"{write(text)}:reward")


def test_a_missing_module_says_where_it_was_looked_for() -> None:
    with pytest.raises(UserError, match=r"cannot import no_such_rewards: ModuleNotFoundError.*folder"):
        load_reward_function("no_such_rewards:reward")


def test_a_prompt_row_without_a_needed_column_is_named(write: Write) -> None:
    function = load_reward_function(f"{write('def reward(completions, answer, hint=None): ...')}:reward")
    function.watch("prompts.jsonl, row 1", row("p", answer=1))
    with pytest.raises(UserError) as error:
        function.watch("prompts.jsonl, row 2", row("q", topic="tea"))
    assert str(error.value).startswith("prompts.jsonl, row 2, field 'answer': expected a value")
    assert "topic" in str(error.value)


def test_another_text_of_the_module_has_another_hash(write: Write) -> None:
    first = load_reward_function(f"{write('def reward(completions): return [1]')}:reward").source
    again = load_reward_function(f"{write('def reward(completions): return [1]')}:reward").source
    other = load_reward_function(f"{write('def reward(completions): return [2, 3]')}:reward").source
    assert first == again != other
