"""Questions: the settings they may change, and what the engines are asked.

python -m pytest tests/unit/chat/test_questions.py
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from mipo_ray.chat.questions import SEEDS, Answer, Question, new_seed, prompt_row, sampling_of
from mipo_ray.config.generation import SamplingConfig
from mipo_ray.config.recipe import load_config
from mipo_ray.errors import UserError
from mipo_ray.storage.rounds import Round


def config_of(**overrides: Any) -> Any:
    words = [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in overrides.items()]
    return load_config(None, ["model.max_model_len=128", *words])


def asked(text: str, context: str = "") -> Question:
    return Question(text, context, SamplingConfig(), 0)


def test_the_sampling_is_the_runs_but_for_what_is_given() -> None:
    config = config_of(generation__sampling__temperature=0.2, generation__sampling__top_k=7)
    assert sampling_of(config, {}) == config.generation.sampling
    changed = sampling_of(config, {"top_p": 0.5, "max_tokens": 9})
    assert (changed.temperature, changed.top_k, changed.top_p, changed.max_tokens) == (0.2, 7, 0.5, 9)
    assert sampling_of(config, {"temperature": 0}, changed).top_p == 0.5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": -0.1}, "temperature: "),
        ({"top_p": 0}, "top_p: "),
        ({"top_p": 1.01}, "top_p: "),
        ({"temperature": float("nan")}, "temperature: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": 128}, "max_tokens: 128 leaves no room for a prompt in the run's model.max_model_len \\(128\\)"),
        ({"max_tokens": 3}, "max_tokens: expected at least 4 \\(the run's generation.sampling.min_tokens\\), found 3"),
        ({"top_k": 1}, "'top_k': unknown setting; expected temperature, top_p, max_tokens"),
    ],
)
def test_a_wrong_setting_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        sampling_of(config_of(generation__sampling__min_tokens=4), given)


@pytest.mark.parametrize("role", ["user", "system"])
def test_a_question_gets_what_the_runs_prompts_get(role: str) -> None:
    config = config_of(
        prompts__system="Be brief.",
        prompts__context_role=role,
        prompts__exemplars=[{"question": "1 + 1?", "answer": "2"}],
        prompts__question_template="{{ stem }}: {{ options }}",  # of columns that nobody types
    )
    row = prompt_row(asked("What {{ x }}?", "I am a nurse."), config.prompts)
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "What {{ x }}?"},
    ]
    assert row["question_messages"] == plain
    changed = [*plain[:3], {"role": "user", "content": "I am a nurse.\n\nWhat {{ x }}?"}]
    if role == "system":
        changed = [{"role": "system", "content": "Be brief.\n\nI am a nurse."}, *plain[1:]]
    assert row["messages"] == changed
    assert prompt_row(asked("What {{ x }}?"), config.prompts)["messages"] == plain


@pytest.mark.parametrize(("text", "context"), [("", "x"), (" \n", ""), ("a\ud800", ""), ("a", "\ud800")])
def test_what_is_no_question_is_refused(text: str, context: str) -> None:
    with pytest.raises(UserError, match=r"the question, field '(prompt|context)': expected"):
        prompt_row(asked(text, context), config_of().prompts)


def test_new_seeds_differ_and_can_be_given_again() -> None:
    seeds = {new_seed() for _ in range(50)}
    assert len(seeds) > 45
    assert all(0 <= seed < SEEDS for seed in seeds)


def test_an_answer_as_json() -> None:
    answer = Answer(Round(1), "Soup.", (7, 8), is_cut=False, copy_rate=0.5, context_pmi=1.25)
    assert answer.to_json() == {
        "round": "1",
        "text": "Soup.",
        "token_ids": [7, 8],
        "cut": False,
        "copy_rate": 0.5,
        "context_pmi_nats": 1.25,
    }
