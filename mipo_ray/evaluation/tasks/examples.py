"""From what engines sampled or scored to examples: items with the policy's answer and whether it is right. No Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from mipo_ray.evaluation.tasks.task import Task, extract, verdict

# One row per item. option_logprobs (nats, summed over the option's tokens), option_tokens and extracted_normalized
# (by log-prob per character) are those of likelihood tasks, whose response is the text of the chosen option, as that of
# a choice is: there option_logprobs are those after the conversation with what is known of the user, and option_pmi
# (nats) is how much higher that is than without. user, question: whose item it is and what it asks, where items of one
# are alike; else "".
EXAMPLE_SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("extracted", pa.string()),
        ("answer", pa.string()),
        ("verdict", pa.string()),
        ("sample", pa.int32()),
        ("finish_reason", pa.string()),
        ("tokens", pa.int32()),
        ("option_labels", pa.list_(pa.string())),
        ("option_texts", pa.list_(pa.string())),
        ("option_logprobs", pa.list_(pa.float64())),
        ("option_tokens", pa.list_(pa.int32())),
        ("extracted_normalized", pa.string()),
        ("option_pmi", pa.list_(pa.float64())),
        ("user", pa.string()),
        ("question", pa.string()),
    ]
)
SAMPLED_SCHEMA = pa.schema([("key", pa.string()), ("task", pa.string()), ("position", pa.int32()), *EXAMPLE_SCHEMA])


def options_to_score(block: pa.Table) -> list[list[dict[str, Any]]]:
    """What the engine scores of each row: its options, numbered as `negative`."""
    return [
        [{"sample": 0, "negative": number, **option} for number, option in enumerate(options)]
        for options in block["scored"].to_pylist()
    ]


def examples_of(block: pa.Table, *, tasks: Mapping[str, Task]) -> pa.Table:
    """Sampled and scored rows as examples, with `key`, `task` and `position` beside them."""
    rows = []
    for row in block.to_pylist():
        task = tasks[row["task"]]
        judge = {"generative": _judged_response, "likelihood": _judged_option, "choice": _judged_choice}[task.kind]
        copied = ("key", "task", "position", "item_id", "prompt", "answer", "option_labels", "option_texts")
        alike = {name: row.get(name) or "" for name in ("user", "question")}  # not in an earlier version's requests
        rows.append({**{name: row[name] for name in copied}, **alike, "sample": 0, **judge(task, row)})
    return pa.Table.from_pylist(rows, schema=SAMPLED_SCHEMA)


def _judged_response(task: Task, row: dict[str, Any]) -> dict[str, Any]:
    (response,) = row["responses"]
    tokens = response.get("answer_tokens")
    extracted = extract(task, response["text"], row["option_labels"], row["option_texts"])
    return {
        "response": response["text"],
        "extracted": extracted,
        "verdict": verdict(extracted, row["answer"]),
        "finish_reason": response["finish_reason"],
        "tokens": len(response["token_ids"]) if tokens is None else tokens,
    }


def _judged_option(task: Task, row: dict[str, Any]) -> dict[str, Any]:
    logprobs = [score["logprob"] for score in sorted(row["scores"], key=lambda score: score["negative"])]
    texts = row["option_labels"] if task.continuation == "label" else row["option_texts"]
    tokens = [len(option["response_token_ids"]) for option in row["scored"]]
    best = likeliest(logprobs, texts)
    normalized = likeliest([value / len(text) for value, text in zip(logprobs, texts, strict=True)], texts)
    extracted = None if best is None else row["option_labels"][best]
    return {
        "response": "" if best is None else texts[best],
        "extracted": extracted,
        "verdict": verdict(extracted, row["answer"]),
        "finish_reason": None,
        "tokens": None if best is None else tokens[best],
        "option_logprobs": logprobs,
        "option_tokens": tokens,
        "extracted_normalized": None if normalized is None else row["option_labels"][normalized],
    }


def _judged_choice(task: Task, row: dict[str, Any]) -> dict[str, Any]:
    labels, texts = row["option_labels"], row["option_texts"]
    scores = [score["logprob"] for score in sorted(row["scores"], key=lambda score: score["negative"])]
    told, untold = scores[: len(texts)], scores[len(texts) :]
    pmi = [one - other for one, other in zip(told, untold, strict=True)]
    best = likeliest(pmi, texts)
    extracted = None if best is None else labels[best]
    return {
        "response": "" if best is None else texts[best],
        "extracted": extracted,
        "verdict": verdict(extracted, row["answer"]),
        "finish_reason": None,
        "tokens": None if best is None else len(row["scored"][best]["response_token_ids"]),
        "option_logprobs": told,
        "option_tokens": [len(option["response_token_ids"]) for option in row["scored"][: len(texts)]],
        "option_pmi": pmi,
    }


def likeliest(scores: Sequence[float], texts: Sequence[str]) -> int | None:
    """The number of the option with the highest score; None where the scores choose none.

    Different options that share the highest score are no choice, nor are scores of which one is no number: the first
    option must not win by its place. Options of the same text are one; the first of them stands for it.
    """
    if any(math.isnan(score) for score in scores):
        return None
    highest = max(scores)
    tied = [number for number, score in enumerate(scores) if score == highest]
    return tied[0] if len({texts[number] for number in tied}) == 1 else None
