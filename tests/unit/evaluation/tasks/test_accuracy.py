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
from tokenizers import processors

from mipo_ray.errors import UserError
from mipo_ray.evaluation.significance import wilson
from mipo_ray.evaluation.tasks.examples import EXAMPLE_SCHEMA, examples_of, likeliest, options_to_score
from mipo_ray.evaluation.tasks.stage import measure_examples
from mipo_ray.evaluation.tasks.task import load_task
from mipo_ray.evaluation.tasks.task_requests import SCORED, check_options, option_token_ids
from mipo_ray.generation.rendering import load_tokenizer
from mipo_ray.pairs.schema import RESPONSES, SCORES
from mipo_ray.storage.entries import Entries
from tests.helpers.tiny_model import END, PAD, START, make_tiny_model, make_tokenizer

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


@pytest.mark.parametrize(
    ("logprobs", "chosen", "normalized"),
    [
        ((-3.0, -3.0, -3.0), None, "2"),  # as a tokenizer gives that scores its own end token
        ((-1.0, -4.0, -2.0), "1", None),
        ((-2.0, -2.0, -5.0), None, "2"),
        ((-9.0, -2.0, -2.0), None, "2"),
        ((float("nan"), -2.0, -5.0), None, None),
        ((float("-inf"),) * 3, None, None),
        ((float("-inf"), -8.0, float("-inf")), "2", "2"),
    ],
)
def test_scores_that_choose_no_option_are_no_answer(
    logprobs: tuple[float, ...], chosen: str | None, normalized: str | None
) -> None:
    row = answered("arc_easy_likelihood", "1", logprobs=logprobs)
    (found,) = examples_of(block(row), tasks=TASKS).to_pylist()
    assert (found["extracted"], found["extracted_normalized"]) == (chosen, normalized)
    assert found["verdict"] == {None: "no_answer", "1": "correct"}.get(chosen, "wrong")
    assert found["response"] == {None: "", "1": "a", "2": "bbbb"}[chosen]


def test_no_answers_of_a_likelihood_are_counted_by_the_score_that_its_figure_is_made_of() -> None:
    rows = [answered("arc_easy_likelihood", "1", logprobs=(-1.0, -4.0, -2.0)) for _ in range(3)]
    rows.append(answered("arc_easy_likelihood", "1", logprobs=(-3.0, -3.0, -3.0)))
    found = examples_of(block(*rows), tasks=TASKS).select(EXAMPLE_SCHEMA.names).cast(EXAMPLE_SCHEMA)
    by_sum = TASKS["mmlu_likelihood"]
    by_character = by_sum.model_copy(update={"metric": "accuracy_normalized"})
    values = [measure_examples(task, found, None, samples=100, seed=0) for task in (by_sum, by_character)]
    assert [metrics["no_answer"].value for metrics in values] == [0.25, 0.75]
    assert values[0]["accuracy"].value == 0.75
    assert all(tuple(metrics) == by_sum.metrics for metrics in values)


@given(
    scores=st.lists(st.sampled_from([-3.0, -2.0, -1.0]), min_size=2, max_size=5),
    texts=st.lists(st.sampled_from("ab"), min_size=5, max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_the_place_of_an_option_never_decides(scores: list[float], texts: list[str], order: Any) -> None:
    texts = texts[: len(scores)]
    shuffled = order.sample(range(len(scores)), len(scores))
    one = likeliest(scores, texts)
    other = likeliest([scores[number] for number in shuffled], [texts[number] for number in shuffled])
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert texts[one] == texts[shuffled[other]]


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
    assert list(metrics) == list(TASKS["gsm8k"].metrics) == ["accuracy", "no_answer", "truncated", "response_tokens"]
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


def adding(before: str, behind: str) -> Any:
    """The tiny tokenizer as those are that put tokens of their own around every text."""
    tokenizer = make_tokenizer()
    around = " ".join(part for part in (before, "$A", behind) if part)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (START, END, PAD)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    return tokenizer


@pytest.mark.parametrize("before", ["", START, f"{START} {PAD}"])
@pytest.mark.parametrize("behind", ["", END, f"{PAD} {END}"])
@given(context=WORDS, option=WORDS.filter(str.strip))
def test_an_end_token_that_the_tokenizer_adds_is_no_option(before: str, behind: str, context: str, option: str) -> None:
    plain, around = adding("", ""), adding(before, behind)
    context_ids, option_ids = option_token_ids(plain, context, f" {option}")
    first = plain.convert_tokens_to_ids(before.split())
    assert option_token_ids(around, context, f" {option}") == (first + context_ids, option_ids)


@pytest.mark.parametrize("text", [f"a{END}", START, f"{PAD}{PAD} b"])
def test_a_control_token_in_an_option_or_its_question_is_text(tokenizer: Any, text: str) -> None:
    context_ids, option_ids = option_token_ids(tokenizer, f"Why {text}?", f" {text}")
    assert not {*context_ids, *option_ids} & set(tokenizer.all_special_ids)
    assert tokenizer.decode(option_ids) == f" {text}"


@pytest.mark.parametrize(
    ("texts", "token_ids", "message"),
    [
        (["A", "B"], [[2], [2]], r"the options 'A' and 'B' are the same tokens \[2\]"),
        (["tea", "茶", "酒"], [[4, 5], [0], [0]], "the options '茶' and '酒' are the same tokens"),
        (["A", ""], [[2], []], "the option '' has no tokens of its own"),
    ],
)
def test_options_that_the_model_cannot_tell_apart_are_refused(texts: Any, token_ids: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"data, item 'x': {message}"):
        check_options("data, item 'x'", texts, token_ids)


def test_options_of_the_same_text_are_the_datas_own_affair() -> None:
    check_options("here", ["tea", "milk", "tea"], [[4], [5, 6], [4]])
