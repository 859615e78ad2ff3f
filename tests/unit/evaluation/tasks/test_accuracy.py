"""From what engines give back to examples and metrics, and the tokens that are scored.

python -m pytest tests/unit/evaluation/tasks/test_accuracy.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.evaluation.significance import wilson
from mipo_ray.evaluation.tasks.stage import EXAMPLE_SCHEMA, examples_of, measure_examples, options_to_score
from mipo_ray.evaluation.tasks.task import load_task
from mipo_ray.evaluation.tasks.task_requests import SCORED, option_token_ids
from mipo_ray.generation.rendering import load_tokenizer
from mipo_ray.pairs.schema import RESPONSES, SCORES
from mipo_ray.storage.entries import Entries
from tests.helpers.tiny_model import make_tiny_model

TASKS = {name: load_task(name) for name in ("gsm8k", "arc_easy_likelihood", "mmlu_likelihood")}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")))


def answered(
    task: str, answer: str, *, response: str = "", logprobs: tuple[float, ...] = (), reason: str = "stop"
) -> dict:
    """A row as it comes back from the engine; options a, bbbb, cc where there are log-probs."""
    labels, texts = (["1", "2", "3"], ["a", "bbbb", "cc"]) if logprobs else ([], [])
    tokens = {"token_ids": [5] * len(response), "text": response, "finish_reason": reason}
    return {
        "key": f"{task}/x",
        "task": task,
        "item_id": "x",
        "position": 0,
        "prompt": "Why?",
        "answer": answer,
        "option_labels": labels,
        "option_texts": texts,
        "scored": [{"prompt_token_ids": [1], "response_token_ids": [7] * len(text)} for text in texts],
        "responses": [{**tokens, "logprob": -1.0, "prompt_tokens": 1, "cached_tokens": 0}] if response else [],
        # In any order: they are told apart by their number.
        "scores": [{"sample": 0, "negative": n, "logprob": value} for n, value in enumerate(logprobs)][::-1],
    }


def block(*rows: dict) -> pa.Table:
    table = pa.Table.from_pylist(list(rows))
    for name, kind in (("scored", SCORED), ("responses", RESPONSES), ("scores", SCORES)):
        column = pa.array([row[name] for row in rows], kind)
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def test_a_response_is_judged_by_its_final_answer() -> None:
    rows = [
        answered("gsm8k", "18", response="The answer is 18."),
        answered("gsm8k", "18", response="The answer is 17.", reason="length"),
        answered("gsm8k", "18", response="No idea"),
    ]
    found = examples_of(block(*rows), tasks=TASKS).to_pylist()
    assert [(row["extracted"], row["verdict"]) for row in found] == [
        ("18", "correct"),
        ("17", "wrong"),
        (None, "no_answer"),
    ]
    assert [row["finish_reason"] for row in found] == ["stop", "length", "stop"]
    assert found[0]["tokens"] == len("The answer is 18.")
    assert found[0]["option_logprobs"] is None


def test_the_likeliest_option_is_chosen_and_beside_it_the_likeliest_per_character() -> None:
    # Sums say 1, sums per character say 2: -2/1, -4/4, -5/2.
    row = answered("arc_easy_likelihood", "2", logprobs=(-2.0, -4.0, -5.0))
    (found,) = examples_of(block(row), tasks=TASKS).to_pylist()
    assert (found["extracted"], found["extracted_normalized"], found["verdict"]) == ("1", "2", "wrong")
    assert (found["option_logprobs"], found["option_tokens"]) == ([-2.0, -4.0, -5.0], [1, 4, 2])
    assert (found["response"], found["finish_reason"], found["tokens"]) == ("a", None, 1)
    by_label = answered("mmlu_likelihood", "3", logprobs=(-2.0, -4.0, -1.0))
    (found,) = examples_of(block(by_label), tasks=TASKS).to_pylist()
    assert (found["extracted"], found["extracted_normalized"], found["response"]) == ("3", "3", "3")


def test_every_option_is_scored_under_its_number() -> None:
    rows = block(
        answered("arc_easy_likelihood", "2", logprobs=(-1.0, -2.0, -3.0)), answered("gsm8k", "1", response="1")
    )
    asked = options_to_score(rows)
    assert [[option["negative"] for option in row] for row in asked] == [[0, 1, 2], []]
    assert [option["response_token_ids"] for option in asked[0]] == [[7], [7] * 4, [7] * 2]


def examples(verdicts: str, tokens: int = 5) -> pa.Table:
    """One example for each letter: c(orrect), w(rong), n(o answer)."""
    names = {"c": "correct", "w": "wrong", "n": "no_answer"}
    rows = [
        {
            "item_id": str(i),
            "verdict": names[v],
            "answer": "A",
            "tokens": tokens,
            "finish_reason": "length" if v == "n" else "stop",
        }
        for i, v in enumerate(verdicts)
    ]
    return pa.Table.from_pylist(rows, schema=EXAMPLE_SCHEMA)


def measured(new: str, base: str | None = None, tokens: int = 5) -> Entries:
    before = None if base is None else examples(base)
    return measure_examples(TASKS["gsm8k"], examples(new, tokens), before, samples=500, seed=0)


def test_metrics_of_a_policy_alone() -> None:
    metrics = measured("ccwnn")
    assert list(metrics) == ["accuracy", "no_answer", "truncated", "response_tokens"]
    interval = wilson(2, 5)
    accuracy = metrics["accuracy"]
    assert (accuracy.value, accuracy.low, accuracy.high, accuracy.n) == (
        0.4,
        interval.low,
        interval.high,
        5,
    )
    assert (accuracy.interval, accuracy.unit) == ("wilson", "share")
    assert metrics["no_answer"].value == metrics["truncated"].value == 0.4
    assert (metrics["response_tokens"].value, metrics["response_tokens"].unit) == (5.0, "tokens")
    assert accuracy.change is None


def test_metrics_of_a_round_are_paired_with_the_base() -> None:
    better = measured("c" * 18 + "ww", "w" * 18 + "cw", tokens=9)
    assert better["accuracy"].change == pytest.approx(0.85)
    assert (better["accuracy"].fixed, better["accuracy"].broken) == (18, 1)
    assert better["accuracy"].verdict == "better"
    assert better["accuracy"].p_value < 0.001
    assert better["response_tokens"].change == 4
    assert better["response_tokens"].verdict is None
    worse = measured("n" * 20, "c" * 20)
    assert [worse[name].verdict for name in ("accuracy", "no_answer", "truncated")] == ["worse"] * 3
    same = measured("cw" * 10, "wc" * 10)
    assert same["accuracy"].verdict == "not distinguishable"


WORDS = st.text(st.sampled_from("ab ?.\n"), max_size=12)


@settings(deadline=None)
@given(context=WORDS, option=WORDS.filter(str.strip))
def test_context_and_option_are_the_whole_text(tokenizer: Any, context: str, option: str) -> None:
    context_ids, option_ids = option_token_ids(tokenizer, context, f" {option}")
    assert option_ids
    assert context_ids == tokenizer(context.rstrip())["input_ids"]
    whole = tokenizer(f"{context} {option}")["input_ids"]
    assert whole[len(context_ids) :] == option_ids


def test_the_space_before_an_option_is_the_options(tokenizer: Any, tmp_path: Path) -> None:
    context_ids, option_ids = option_token_ids(tokenizer, "Answer: ", "the")
    assert tokenizer.decode(context_ids) == "Answer:"
    assert tokenizer.decode(option_ids) == " the"
