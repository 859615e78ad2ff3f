"""Thoughts and answers, kept apart.

python -m pytest tests/unit/text/test_thoughts.py
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.text.final_answers import final_choice, final_number, same_final_answer
from mipo_ray.text.thoughts import answer_of, opens_thought, split_thoughts

PAIRS = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<THINK>", "</THINK>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<reflection>", "</reflection>"),
    ("<inner_monologue>", "</inner_monologue>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|think|>", "<|/think|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|thought_start|>", "<|thought_end|>"),
    ("<think_start>", "<think_end>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<\uff5cbegin\u2581of\u2581thought\uff5c>", "<\uff5cend\u2581of\u2581thought\uff5c>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
]
THOUGHT = "First guess: the answer is 12. But wait, two are broken."


@pytest.mark.parametrize(("opening", "closing"), PAIRS)
def test_the_answer_is_what_follows_the_thought(opening: str, closing: str) -> None:
    found = split_thoughts(f"{opening}\n{THOUGHT}\n{closing}\n\nTim can use **10** pens.")
    assert found.thought.startswith(THOUGHT)
    assert (found.answer, found.closed) == ("Tim can use **10** pens.", True)


@pytest.mark.parametrize(("opening", "closing"), PAIRS)
def test_a_thought_that_was_cut_is_no_answer(opening: str, closing: str) -> None:
    for text in (f"{opening}{THOUGHT}", f"{opening}", f"Well. {opening}{THOUGHT}"):
        assert (split_thoughts(text).answer, split_thoughts(text).closed) == ("", False)
    assert split_thoughts(THOUGHT, begins_inside=True).answer == ""
    assert split_thoughts(f"{THOUGHT}{closing}Ten.", begins_inside=True).answer == "Ten."


@pytest.mark.parametrize(("opening", "closing"), PAIRS)
def test_a_closing_mark_alone_ends_what_the_prompt_began(opening: str, closing: str) -> None:
    assert answer_of(f"{THOUGHT}\n{closing}\n10") == "10"
    assert opens_thought(f"<|im_start|>assistant\n{opening}\n")
    assert not opens_thought(f"<|im_start|>assistant\n{opening}\n\n{closing}\n\n")
    assert not opens_thought(f"What does {opening} mean?<|im_end|>\n<|im_start|>assistant\n")


def test_marks_of_ones_own() -> None:
    marks = (("Here is my thought process:", "Here is my response:"), ("<cot>", "</cot>"))
    assert split_thoughts(f"Here is my thought process: {THOUGHT} Here is my response: 10.", marks).answer == "10."
    assert split_thoughts(f"<cot>{THOUGHT}", marks).closed is False
    assert answer_of("<cot>a</cot>b") == "<cot>a</cot>b"
    assert opens_thought("Assistant: <cot>", marks)


def test_several_thoughts_and_marks_inside_one() -> None:
    assert answer_of("<think>a</think>One <think>b</think>two.") == "One two."
    assert answer_of("<think>a <reasoning>b</reasoning> c</think>d") == "d"
    assert answer_of("<think>a <think>b</think>c") == "c"
    assert answer_of("<think>a</think>b <think>c") == ""


@pytest.mark.parametrize(
    "text",
    [
        "Write `<think>` before and `</think>` after your thoughts.",
        'The token "<think>" opens a thought.',
        "[thinking] Let me see. [/thinking]",
        "<b>10</b> pens, <reason>none</reason>, a[1/THINK], x < think > y",
        "I think that </thinker> is no mark; nor is <thinkpad>.",
        "  Two spaces before, and a line after.\n",
        "",
    ],
)
def test_what_holds_no_thought_stays_as_it_is(text: str) -> None:
    assert split_thoughts(text) == split_thoughts(text, (("<cot>", "</cot>"),))
    assert (split_thoughts(text).answer, split_thoughts(text).closed) == (text, True)


@given(st.text(), st.text(alphabet=st.characters(exclude_characters="<>[]\u25c1\u25b7`\"'\u201c\u201d\u2018\u2019")))
def test_any_text_without_marks_is_an_answer_and_any_after_a_thought(thought: str, answer: str) -> None:
    assert answer_of(answer) == answer
    plain = thought.replace("<", "(").replace("[", "(").replace("\u25c1", "(")
    assert answer_of(f"<think> {plain} </think> {answer}") == answer.strip()
    assert answer_of(f"{answer} <think> {plain}") == ""


def test_final_answers_are_read_behind_the_thoughts() -> None:
    assert final_number(f"<think>{THOUGHT}</think>Tim can use **10** pens.") == 10
    assert final_number(f"<think>{THOUGHT}") is None
    assert final_choice("<think>Maybe the answer is A.") is None
    assert final_choice("Maybe the answer is A.</think>\nThe answer is C.") == "C"
    assert final_choice("<think>The answer is rain.</think>Fog.", texts=["fog", "rain"]) == "A"
    first = "<think>The answer is 4. No.</think>The answer is 5."
    assert not same_final_answer("number", first, "The answer is 4.")
    assert same_final_answer("number", first, "<think>7?</think>It is 5.")
    assert not same_final_answer("number", "<think>The answer is 4.", "<think>The answer is 4.")


@pytest.mark.parametrize("unit", ["<think>", "</think>", "<|", "[THINK", "<think", "`<think>`", "<|channel|>analysis"])
def test_long_texts_take_linear_time(unit: str) -> None:
    split_thoughts(unit * (200_000 // len(unit)))
