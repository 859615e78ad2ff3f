"""Which pairs are not trained on, and why. Plain functions; every reason is a name that is counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mipo_ray.config.filters import FiltersConfig, PatternFilter
from mipo_ray.text.final_answers import same_final_answer
from mipo_ray.text.patterns import is_found
from mipo_ray.text.statistics import copy_rate, distinct_n, words
from mipo_ray.text.thoughts import split_thoughts

# Three words in a row are the least that is a phrase and not grammar.
NGRAM = 3


def drop_reason(pair: dict[str, Any], filters: FiltersConfig, *, with_pmi: bool) -> str:
    """Why a pair is not trained on; empty when it is. The first reason that holds, in the order below.

    `pair` has the form of schema version 2: its rejected side are lists. What a filter says of one of several rejected
    responses decides over the whole pair. An empty response is always a reason, and so are equal texts and a response
    without an answer behind its thoughts. What filters say of texts and lengths they say of answers, without thoughts.
    Without `with_pmi` the pair has not been scored yet, and `filters.min_pmi` is left out.
    """
    responses = [pair["chosen"].strip(), *(text.strip() for text in pair["rejected"])]
    if not all(responses):
        return "empty"
    if filters.control_tokens and pair["control_tokens"]:
        return "control_tokens"
    chosen, *rejected = (split_thoughts(text) for text in [pair["chosen"], *pair["rejected"]])
    if not all(part.answer.strip() for part in (chosen, *rejected)):
        return "no_answer"
    if responses[0] in responses[1:]:
        return "identical"
    if filters.thoughts == "drop" and any(part.thought for part in (chosen, *rejected)):
        return "thoughts"
    return _drop_reason_of_answers(pair, chosen.answer, [part.answer for part in rejected], filters) or (
        _drop_reason_of_pmi(pair, filters) if with_pmi else ""
    )


def _drop_reason_of_answers(pair: dict[str, Any], chosen: str, rejected: list[str], filters: FiltersConfig) -> str:
    if (kind := filters.equal_answers) and any(same_final_answer(kind, chosen, text) for text in rejected):
        return "equal_answers"
    if filters.truncated != "keep" and _has_response_cut_short(pair, filters):
        return "truncated"
    lengths = [pair.get("chosen_answer_tokens"), *pair.get("rejected_answer_tokens", [])]
    if None in lengths:  # thoughts were not told apart when they were sampled
        lengths = [len(ids) for ids in (pair["chosen_token_ids"], *pair["rejected_token_ids"])]
    if not all(_length_fits(lengths[0], tokens, filters) for tokens in lengths[1:]):
        return "length_ratio"
    if filters.max_repetition < 1 and any(repetition(text) > filters.max_repetition for text in (chosen, *rejected)):
        return "repetition"
    if (
        filters.max_copy_rate < 1
        and copy_rate(chosen, prompt_text(pair["messages"], pair["context"])) > filters.max_copy_rate
    ):
        return "copies_prompt"
    for pattern in filters.patterns:
        if _pattern_drops(pattern, chosen, rejected):
            return f"pattern_{pattern.name}"
    return ""


def _drop_reason_of_pmi(pair: dict[str, Any], filters: FiltersConfig) -> str:
    if filters.min_pmi is not None:
        if pair["pmi"] is None:
            return "no_pmi"  # prompt and response fill the context window: nothing is left to score them in
        if pair["pmi"] < filters.min_pmi:
            return "low_pmi"
    return ""


def is_cut_short(finish_reason: str, trimmed_tokens: int | None, filters: FiltersConfig) -> bool:
    """Whether the length limit cut a response and `filters.truncated` leaves such a one out.

    trimmed_tokens: how many were cut off behind its last whole sentence; None where there is none.
    """
    if finish_reason != "length" or filters.truncated == "keep":
        return False
    return filters.truncated == "drop" or trimmed_tokens is None


def prompt_text(messages: Sequence[dict[str, str]], context: str) -> str:
    """What a prompt says that is its own: the last message, below the context where that stands elsewhere.

    Exemplars and a shared system message are left out; an answer in their style copies nothing of its prompt.
    """
    last = messages[-1]["content"] if messages else ""
    return last if context in last else f"{context}\n{last}"


def repetition(text: str) -> float:
    """Share of a response's word 3-grams that repeat an earlier one, in [0, 1)."""
    return 1 - distinct_n(words(text), NGRAM)


def _has_response_cut_short(pair: dict[str, Any], filters: FiltersConfig) -> bool:
    ends = zip(
        (pair["chosen_finish_reason"], *pair["rejected_finish_reason"]),
        (pair["chosen_trimmed_tokens"], *pair["rejected_trimmed_tokens"]),
        strict=True,
    )
    return any(is_cut_short(finish_reason, trimmed, filters) for finish_reason, trimmed in ends)


def _length_fits(chosen_tokens: int, rejected_tokens: int, filters: FiltersConfig) -> bool:
    ratio = chosen_tokens / max(rejected_tokens, 1)
    return filters.min_length_ratio <= ratio and (filters.max_length_ratio is None or ratio <= filters.max_length_ratio)


def _pattern_drops(pattern: PatternFilter, chosen: str, rejected: list[str]) -> bool:
    searched = {"chosen": [chosen], "rejected": rejected, "either": [chosen, *rejected]}[pattern.side]
    found = [is_found(pattern.regex, text) for text in searched]
    return any(found) if pattern.drop_when == "found" else not all(found)
