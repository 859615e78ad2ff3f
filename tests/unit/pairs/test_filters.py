"""Filters: each reason, on and off, their order, and pairs with several rejected responses.

python -m pytest tests/unit/pairs/test_filters.py
"""

from __future__ import annotations

from typing import Any

import pytest

from mipo_ray.config.filters import FiltersConfig
from mipo_ray.pairs.filters import drop_reason, prompt_text, repetition

OFF = FiltersConfig(control_tokens=False)
COPY = "tell me how to make tea"


def pair(chosen: str, *rejected: str, **changes: Any) -> dict[str, Any]:
    """A pair in the form of version 2, which no filter drops but for what its texts say."""
    return {
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"{COPY} please"}],
        "context": "",
        "chosen": chosen,
        "rejected": list(rejected),
        "chosen_token_ids": [1] * 10,
        "rejected_token_ids": [[1] * 10 for _ in rejected],
        "chosen_finish_reason": "stop",
        "rejected_finish_reason": ["stop" for _ in rejected],
        "chosen_trimmed_tokens": None,
        "rejected_trimmed_tokens": [None for _ in rejected],
        "pmi": 3.0,
        "control_tokens": 0,
        **changes,
    }


def reason(candidate: dict[str, Any], filters: FiltersConfig, *, with_pmi: bool = True) -> str:
    return drop_reason(candidate, filters, with_pmi=with_pmi)


def pattern(**fields: Any) -> FiltersConfig:
    return FiltersConfig.model_validate({"patterns": [{"name": "refusal", "regex": r"(?i)\bi cannot\b", **fields}]})


LOOP = "so it is so it is so it is so it is"  # 7 of its 10 3-grams repeat one of the first 3


@pytest.mark.parametrize(
    ("candidate", "setting", "expected"),
    [
        (pair("It is 4.", "The answer is 4.0"), {"equal_answers": "number"}, "equal_answers"),
        (pair("The answer is B.", "I choose option B."), {"equal_answers": "choice"}, "equal_answers"),
        (pair("yes", "no", chosen_finish_reason="length"), {"truncated": "drop"}, "truncated"),
        (pair("yes", "no", rejected_finish_reason=["length"]), {"truncated": "drop"}, "truncated"),
        (pair("yes", "no", chosen_finish_reason="length"), {"truncated": "trim"}, "truncated"),
        (pair("yes", "no", rejected_finish_reason=["length"]), {"truncated": "trim"}, "truncated"),
        (pair("yes", "no", chosen_token_ids=[1] * 4), {"min_length_ratio": 0.5}, "length_ratio"),
        (pair("yes", "no", chosen_token_ids=[1] * 21), {"max_length_ratio": 2.0}, "length_ratio"),
        (pair(LOOP, "no"), {"max_repetition": 0.5}, "repetition"),
        (pair("yes", LOOP), {"max_repetition": 0.5}, "repetition"),
        (pair(COPY, "no"), {"max_copy_rate": 0.5}, "copies_prompt"),
        (pair("yes", "no", control_tokens=1), {"control_tokens": True}, "control_tokens"),
        (pair("yes", "no", pmi=2.999), {"min_pmi": 3.0}, "low_pmi"),
        (pair("yes", "no", pmi=None), {"min_pmi": 3.0}, "no_pmi"),
    ],
)
def test_each_filter_drops_when_it_is_on_and_only_then(
    candidate: dict[str, Any], setting: dict[str, Any], expected: str
) -> None:
    assert reason(candidate, OFF) == ""
    assert reason(candidate, OFF.model_copy(update=setting)) == expected


@pytest.mark.parametrize(
    ("candidate", "setting"),
    [
        (pair("It is 4.", "It is -4."), {"equal_answers": "number"}),
        (pair("no idea", "no idea at all"), {"equal_answers": "number"}),  # none and none are not the same answer
        (pair("yes", "no"), {"truncated": "drop"}),
        (pair("yes", "no"), {"truncated": "trim"}),
        (pair("yes", "no", chosen_finish_reason="length", chosen_trimmed_tokens=3), {"truncated": "trim"}),
        (pair("yes", "no", rejected_finish_reason=["length"], rejected_trimmed_tokens=[0]), {"truncated": "trim"}),
        (pair("yes", "no", chosen_token_ids=[1] * 5), {"min_length_ratio": 0.5}),
        (pair("yes", "no", chosen_token_ids=[1] * 20), {"max_length_ratio": 2.0}),
        (pair("yes", "no", rejected_token_ids=[[]], chosen_token_ids=[1]), {"max_length_ratio": 1.0}),
        (pair(LOOP, "no"), {"max_repetition": 0.9}),
        (pair("boil some water first", COPY), {"max_copy_rate": 0.5}),  # the rejected side may copy
        (pair("yes", "no", pmi=3.0), {"min_pmi": 3.0}),
    ],
)
def test_each_filter_keeps_what_lies_within_its_bound(candidate: dict[str, Any], setting: dict[str, Any]) -> None:
    assert reason(candidate, OFF.model_copy(update=setting)) == ""


def test_empty_responses_are_dropped_whatever_is_off() -> None:
    assert reason(pair(" \n", "no"), OFF) == reason(pair("yes", "no", ""), OFF) == "empty"


def test_pairs_of_equal_texts_are_dropped_whatever_is_off() -> None:
    assert reason(pair("the same ", " the same"), OFF) == reason(pair("yes", "no", "yes"), OFF) == "identical"
    assert reason(pair("the same", "The same"), OFF) == ""


def test_one_of_several_rejected_responses_decides_over_the_pair() -> None:
    strict = FiltersConfig(truncated="drop", max_length_ratio=2.0, max_repetition=0.5)
    assert reason(pair("yes", "no", "maybe"), strict) == ""
    assert reason(pair("yes", "no", "yes"), strict) == "identical"
    assert reason(pair("yes", "no", "maybe", rejected_finish_reason=["stop", "length"]), strict) == "truncated"
    assert reason(pair("yes", "no", "maybe", rejected_token_ids=[[1] * 10, [1] * 4]), strict) == "length_ratio"
    assert reason(pair("yes", "no", LOOP), strict) == "repetition"
    number = FiltersConfig(equal_answers="number")
    assert reason(pair("It is 4.", "It is 5.", "It is 8/2."), number) == "equal_answers"


def test_a_trimmed_response_is_no_whole_one_where_cut_ones_are_dropped() -> None:
    """The two settings differ in what they do with what the sampler trimmed; nothing is trimmed but for trim."""
    trimmed = pair("yes", "no", "maybe", rejected_finish_reason=["length", "stop"], rejected_trimmed_tokens=[2, None])
    assert [reason(trimmed, FiltersConfig(truncated=how)) for how in ("drop", "keep", "trim")] == ["truncated", "", ""]
    cut = pair("yes", "no", "maybe", rejected_finish_reason=["length"] * 2, rejected_trimmed_tokens=[2, None])
    assert reason(cut, FiltersConfig(truncated="trim")) == "truncated"


def test_the_first_reason_that_holds_is_given() -> None:
    """Every pair has all later faults too; mending one fault after the other shows the next."""
    filters = FiltersConfig.model_validate(
        {
            "equal_answers": "number",
            "truncated": "drop",
            "max_length_ratio": 2.0,
            "max_repetition": 0.2,
            "max_copy_rate": 0.5,
            "patterns": [{"name": "tea", "regex": "tea"}, {"name": "again", "regex": "me"}],
            "min_pmi": 5.0,
        }
    )
    looping = f"{COPY} {COPY} 4"
    steps: list[tuple[dict[str, Any], str]] = [
        ({"rejected": [" "], "control_tokens": 2}, "empty"),
        ({"rejected": [looping]}, "control_tokens"),
        ({"control_tokens": 0}, "identical"),
        ({"rejected": ["It is 4"]}, "equal_answers"),
        ({"rejected": ["It is 5"]}, "truncated"),
        ({"chosen_finish_reason": "stop"}, "length_ratio"),
        ({"chosen_token_ids": [1]}, "repetition"),
        ({"chosen": COPY}, "copies_prompt"),
        ({"chosen": "tea? me too, thank you very much"}, "pattern_tea"),
        ({"chosen": "coffee? me too, thank you"}, "pattern_again"),
        ({"chosen": "coffee, thank you"}, "low_pmi"),
        ({"pmi": 5.0}, ""),
    ]
    candidate = pair(looping, "", chosen_finish_reason="length", chosen_token_ids=[1] * 50)
    for change, expected in steps:
        candidate |= change
        assert reason(candidate, filters) == expected


REFUSAL, FINE = "I cannot help with that.", "Boil some water."


@pytest.mark.parametrize(
    ("side", "chosen_refuses", "rejected_refuse", "is_found", "is_missing"),
    [
        ("chosen", True, (False, False), True, False),
        ("chosen", False, (True, True), False, True),
        ("rejected", True, (False, False), False, True),
        ("rejected", False, (False, True), True, True),  # found in one, missing in the other
        ("rejected", False, (True, True), True, False),
        ("either", False, (False, False), False, True),
        ("either", False, (False, True), True, True),
        ("either", True, (True, True), True, False),
    ],
)
def test_patterns_by_side_and_by_found_or_missing(
    side: str, chosen_refuses: bool, rejected_refuse: tuple[bool, bool], is_found: bool, is_missing: bool
) -> None:
    rejected = [f"{index}: {REFUSAL if refuses else FINE}" for index, refuses in enumerate(rejected_refuse)]
    candidate = pair(REFUSAL if chosen_refuses else FINE, *rejected)
    assert (reason(candidate, pattern(side=side)) == "pattern_refusal") is is_found
    assert (reason(candidate, pattern(side=side, drop_when="missing")) == "pattern_refusal") is is_missing


def test_the_pmi_is_left_out_before_pairs_are_scored() -> None:
    filters = FiltersConfig(min_pmi=5.0)
    unscored = pair("yes", "no")
    del unscored["pmi"]
    assert reason(unscored, filters, with_pmi=False) == ""
    assert reason(pair("yes", "no", pmi=-7.0), FiltersConfig(min_pmi=-8.0)) == ""


def test_repetition_counts_3_grams() -> None:
    # "a b c", "b c a", "c a b", "a b c": one of four repeats.
    assert repetition("a b c, A B C!") == 0.25
    assert repetition("two words") == repetition("") == 0.0


def test_the_text_of_a_prompt_is_what_is_its_own() -> None:
    exemplars = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "The answer is 2."}]
    last = {"role": "user", "content": "I ski.\n\nWhat now?"}
    assert prompt_text([{"role": "system", "content": "Be kind."}, *exemplars, last], "I ski.") == last["content"]
    in_system = [{"role": "system", "content": "Be kind.\n\nI ski."}, {"role": "user", "content": "What now?"}]
    assert prompt_text(in_system, "I ski.") == "I ski.\nWhat now?"
    assert prompt_text([], "") == ""


def think(thought: str, answer: str) -> str:
    return f"<think>{thought}</think>\n\n{answer}"


def test_filters_look_at_answers_and_not_at_the_thoughts_before_them() -> None:
    number = FiltersConfig(equal_answers="number")
    assert reason(pair(think("Is the answer 7?", "It is 4."), think("It is 5.", "It is 4.")), number) == "equal_answers"
    assert reason(pair(think("It is 4.", "It is 7."), think("It is 4.", "It is 5.")), number) == ""
    copies = FiltersConfig(max_copy_rate=0.5, max_repetition=0.5)
    assert reason(pair(think(f"{COPY}. {LOOP}", "boil some water first"), "no"), copies) == ""
    assert reason(pair(think("fresh words", COPY), "no"), copies) == "copies_prompt"
    assert reason(pair("yes", think("fresh words", LOOP)), copies) == "repetition"
    assert reason(pair(think(REFUSAL, FINE), "no"), pattern()) == ""
    assert reason(pair(think(FINE, REFUSAL), "no"), pattern()) == "pattern_refusal"
    ratio = FiltersConfig(max_length_ratio=2.0)
    long_answer = pair("yes", "no", chosen_answer_tokens=9, rejected_answer_tokens=[4])
    assert reason(long_answer, ratio) == "length_ratio"
    assert reason(long_answer | {"rejected_answer_tokens": [5], "rejected_token_ids": [[1]]}, ratio) == ""


def test_a_response_that_was_cut_inside_its_thought_gives_no_pair() -> None:
    cut = "<think>The answer is 4"
    assert reason(pair(cut, "no"), OFF) == reason(pair("yes", "no", cut), OFF) == "no_answer"
    assert reason(pair("yes", think("All thought", "")), OFF) == "no_answer"
    assert reason(pair(think("a", "yes"), think("b", "no")), OFF) == ""


def test_thoughts_are_trained_on_unless_they_are_dropped() -> None:
    drop = OFF.model_copy(update={"thoughts": "drop"})
    thoughtful = pair("yes", think("b", "no"))
    assert reason(thoughtful, OFF) == ""
    assert reason(thoughtful, drop) == "thoughts"
    assert reason(pair("yes", think("", "no")), drop) == ""  # the empty block of a model that was told not to think
    assert reason(pair("yes", "no"), drop) == ""
