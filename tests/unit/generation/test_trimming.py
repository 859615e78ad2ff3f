"""Responses that the limit cut, cut back to their last whole sentence: prefixes of what was sampled.

python -m pytest tests/unit/generation/test_trimming.py
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mipo_ray.generation.engine import Engine
from mipo_ray.generation.thinking import ThoughtReader, thought_reader
from mipo_ray.generation.trimming import logprob_of, whole_tokens
from mipo_ray.generation.turn_tokens import TurnTokens
from tests.helpers.tiny_model import END, make_tokenizer

# Whatever follows, and at the very end too, each of these is a sentence.
WHOLE = (
    "It rains.",
    "Why not?",
    "Stop it!",
    "(Really so.)",
    "Er sagte „ja“!",
    "She left at noon.",
    "お茶です。",
    "😀 Tea!",
)
GAPS = (" ", "\n", "\n\n", "  ")
UNFINISHED = ("", "And then", "Zw", "No way, said", "É", "おち", "😀")


class Pieces:
    """A tokenizer whose tokens are any bytes: it may split a character, and join a sentence's end with the next."""

    def __init__(self, pieces: list[bytes]):
        self.pieces = pieces

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return b"".join(self.pieces[token] for token in token_ids).decode(errors="replace")


@st.composite
def sampled(draw: st.DrawFn) -> tuple[list[bytes], str, list[int]]:
    """A response in pieces, its text without what it was cut in, and where its sentences end, in characters."""
    text, ends = "", []
    for sentence in draw(st.lists(st.sampled_from(WHOLE), max_size=5)):
        text += sentence
        ends.append(len(text))
        text += draw(st.sampled_from(GAPS))
    text = draw(st.sampled_from([text, text.rstrip()])) + draw(st.sampled_from(UNFINISHED))
    if not text[ends[-1] if ends else 0 :].strip():
        text = text[: ends[-1] if ends else 0] + draw(st.sampled_from(["", " "]))
    elif ends and not text[ends[-1]].isspace():  # what follows a stop without white space may take it away
        text = text[: ends[-1]]
    data = text.encode()
    cuts = sorted({0, len(data), *draw(st.lists(st.integers(0, len(data)), max_size=40))})
    return [data[start:end] for start, end in itertools.pairwise(cuts)], text, ends


@settings(max_examples=400)
@example(([b"It rains", b". The"], "It rains. The", [9]))
@example(([b"Tea", b".", b" It rains", b". The"], "Tea. It rains. The", [4, 14]))
@given(sampled())
def test_what_is_left_is_the_longest_prefix_of_tokens_that_ends_a_sentence(
    drawn: tuple[list[bytes], str, list[int]],
) -> None:
    pieces, text, ends = drawn
    tokenizer, token_ids = Pieces(pieces), list(range(len(pieces)))
    found = whole_tokens(ThoughtReader(tokenizer, (), (), False), [], token_ids)
    # Searched by trying every prefix, and knowing how the text was made.
    sentences = {text[:end]: end for end in ends}
    prefixes = [b"".join(pieces[:count]).decode(errors="replace").rstrip() for count in range(len(pieces) + 1)]
    known = [(sentences[prefix], -count) for count, prefix in enumerate(prefixes) if prefix in sentences]
    assert found == (-max(known)[1] if known else None)


def test_a_token_that_also_begins_the_next_sentence_is_cut_off_with_its_sentence() -> None:
    reader = ThoughtReader(Pieces([b"It rains", b".", b" It pours", b". The"]), (), (), False)
    assert whole_tokens(reader, [], [0, 1, 2, 3]) == 2
    assert whole_tokens(reader, [], [0, 3]) is None


def test_white_space_in_the_token_of_the_stop_stays_and_in_a_token_of_its_own_goes() -> None:
    reader = ThoughtReader(Pieces([b"It rains", b".\n\n", b".", b"\n\n", b"The"]), (), (), False)
    assert whole_tokens(reader, [], [0, 1, 4]) == 2
    assert whole_tokens(reader, [], [0, 2, 3, 4]) == 2


THINKS = ("<think>", "</think>")


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("<think>\nIt rains. It pours.", None),  # cut inside the thought: there is no answer
        ("<think>\nIt rains. It pours.</think>\n\nTake tea", None),  # the thought's sentences are none of the answer
        ("<think>\nIt rains.</think>\n\nTake tea. And then", "<think>\nIt rains.</think>\n\nTake tea."),
        ("It rains.</think>\n\nTake tea. And then", "It rains.</think>\n\nTake tea."),
        ("Take tea. And then", "Take tea."),
    ],
)
@pytest.mark.parametrize("special", [False, True])
def test_thoughts_stay_and_are_no_sentences_of_the_answer(written: str, kept: str | None, special: bool) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(THINKS), special_tokens=special)
    token_ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    found = whole_tokens(thought_reader(tokenizer), [], token_ids)
    assert (None if found is None else tokenizer.decode(token_ids[:found])) == kept


def test_a_thought_that_the_prompt_opened_is_one() -> None:
    tokenizer = make_tokenizer()
    prompt = tokenizer("How?<think>\n", add_special_tokens=False)["input_ids"]
    reader = thought_reader(tokenizer)
    for written, kept in (("It rains. It", None), ("It rains.</think> Tea. It", "It rains.</think> Tea.")):
        token_ids = tokenizer(written, add_special_tokens=False)["input_ids"]
        found = whole_tokens(reader, prompt, token_ids)
        assert (None if found is None else tokenizer.decode(token_ids[:found])) == kept


@given(st.lists(st.floats(-30, 0), min_size=1, max_size=30), st.data())
def test_the_logprob_is_that_of_the_prefix(values: list[float], data: st.DataObject) -> None:
    token_ids = list(range(len(values)))
    candidates = [
        {token: SimpleNamespace(logprob=value), 999: SimpleNamespace(logprob=1.0)}
        for token, value in zip(token_ids, values, strict=True)
    ]
    count = data.draw(st.integers(0, len(values)))
    assert logprob_of(token_ids[:count], candidates) == pytest.approx(np.asarray(values)[:count].sum(), abs=1e-9)


def engine(tokenizer: Any) -> Engine:
    """What of an engine makes responses of vLLM's outputs, without one."""
    made = object.__new__(Engine)
    made._thoughts = thought_reader(tokenizer)
    end = tokenizer.convert_tokens_to_ids(END)
    made._turn_tokens = TurnTokens(frozenset({end}), (), frozenset({end}))
    return made


def output(tokenizer: Any, text: str, finish_reason: str) -> Any:
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    logprobs = [{token: SimpleNamespace(logprob=-1.0 - place)} for place, token in enumerate(token_ids)]
    total = sum(-1.0 - place for place in range(len(token_ids)))
    shown = tokenizer.decode(token_ids, skip_special_tokens=True)
    final = SimpleNamespace(
        token_ids=token_ids, text=shown, finish_reason=finish_reason, logprobs=logprobs, cumulative_logprob=total
    )
    return SimpleNamespace(outputs=[final], num_cached_tokens=3)


@pytest.mark.parametrize(
    ("text", "finish_reason", "kept"),
    [
        ("Take tea. And then", "length", "Take tea."),
        ("Take tea. It is good.", "length", "Take tea. It is good."),  # whole by chance: nothing is cut off
        ("Take tea and then", "length", None),
        ("Take tea. And then", "stop", None),
    ],
)
def test_a_response_is_its_prefix_in_every_column(text: str, finish_reason: str, kept: str | None) -> None:
    tokenizer = make_tokenizer()
    whole = output(tokenizer, text, finish_reason)
    sampled_ids = whole.outputs[0].token_ids
    response = engine(tokenizer)._response({"prompt_token_ids": [5, 6]}, whole, trims=True)
    count = len(response["token_ids"])
    assert response["token_ids"] == sampled_ids[:count]
    assert response["text"] == tokenizer.decode(sampled_ids[:count]) == (text if kept is None else kept)
    assert response["answer_tokens"] == count
    assert response["logprob"] == -count * (count + 1) / 2
    assert response["finish_reason"] == finish_reason
    assert response["trimmed_tokens"] == (None if kept is None else len(sampled_ids) - count)


def test_nothing_is_trimmed_unless_it_is_asked_for() -> None:
    tokenizer = make_tokenizer()
    response = engine(tokenizer)._response({"prompt_token_ids": [5]}, output(tokenizer, "Take tea. And then", "length"))
    assert (response["text"], response["trimmed_tokens"]) == ("Take tea. And then", None)
