"""What a held-out response is scored under: the ids of conditionings, and which others there are. Pure, without Ray.

    own                  what its prompt says, the context included
    other:PROMPT_ID      what it is compared with: another prompt, or its own question with that row's context
    without_context      its own question alone
    prompts:PROMPT_ID    the matrix: the whole prompt of that row
    contexts:PROMPT_ID   the matrix: its own question with that row's context

Tables of responses and of scores carry the ids (`conditioning_ids`) in the order of their lists of token ids and of
log-probs. Nobody looks anything up by its position: `by_conditioning` gives the values by id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.errors import UserError
from mipo_ray.prompts.rows import with_context
from mipo_ray.seeds import stable_seed

Messages = list[dict[str, str]]
Value = TypeVar("Value")

OWN = "own"
OTHER = "other:"
WITHOUT_CONTEXT = "without_context"


def matrix_id(part: str, prompt_id: str) -> str:
    """The conditioning of one column of a part of the matrix."""
    return f"{part}:{prompt_id}"


def by_conditioning(row: Mapping[str, Any], values: Sequence[Value] | None) -> dict[str, Value]:
    """Conditioning id -> value, in the row's order; `values` is a list of the row, empty or None where it has none."""
    if not values:
        return {}
    ids = row.get("conditioning_ids") or _ids_by_position(row, len(values))
    return dict(zip(ids, values, strict=True))


def _ids_by_position(row: Mapping[str, Any], count: int) -> list[str]:
    """The ids of a row that an earlier version wrote, whose lists went by position alone.

    Own first, then the others, and last, for an answer with a context, without it. Which prompts the others were is not
    known any more; they are numbered. Old rows of the matrix are never looked up (their matrix stands in the manifest).
    """
    last = [WITHOUT_CONTEXT] if row["kind"] == "answer" and row["context"] else []
    return [OWN, *(f"{OTHER}{number}" for number in range(count - 1 - len(last))), *last]


def other_conditionings(
    rows: Sequence[dict[str, Any]], prompts: PromptsConfig, count: int, *, seed: int
) -> list[dict[str, Messages]]:
    """For each prompt row, `count` other prompts that its responses are scored under, drawn with a seed.

    Each stands under the id of the row that lends its prompt or its context.

    A row with a context gets its own question under other users' contexts; a row without one gets other prompts. All
    differ from the row's own prompt and from each other, and none comes from the row's own group. With `count` one
    below the number of candidates this is the full matrix.

    Raises UserError naming the first row that has fewer than `count` candidates.
    """
    chosen = []
    for row in rows:
        own = as_key(row["context"]) if row["context"] else row["text"]
        candidates: dict[str, tuple[str, Messages]] = {}
        for other in rows:
            if row["group"] and other["group"] == row["group"]:
                continue
            if row["context"]:
                key = as_key(other["context"])
                messages = with_context(row["question_messages"], other["context"], prompts) if key else []
            else:
                key, messages = other["text"], other["messages"]
            if key and key != own:
                candidates.setdefault(key, (other["prompt_id"], messages))
        if len(candidates) < count:
            what = "contexts of other users" if row["context"] else "other prompts"
            raise UserError(
                f"{prompts.path}, prompt {row['prompt_id']!r}: evaluate.other_prompts asks for {count} {what}, found "
                f"{len(candidates)} among the held-out rows; lower it or add held-out rows"
            )
        random = np.random.default_rng(stable_seed("other conditionings", seed, row["prompt_id"]))
        keys = sorted(candidates)
        chosen.append(dict(candidates[keys[index]] for index in random.choice(len(keys), size=count, replace=False)))
    return chosen


def refuse_equal_prompts(prompt_id: str, own: list[int], others: Mapping[str, list[int]]) -> None:
    """Raises UserError where one of the other conditionings (id -> token ids) is the row's own prompt to the model."""
    for name, token_ids in others.items():
        if token_ids == own:
            other = (
                "its question without the context" if name == WITHOUT_CONTEXT else f"what prompt {name!r} makes of it"
            )
            raise UserError(
                f"held-out prompt {prompt_id!r}: it has the same token ids as {other}: expected different ones, or "
                "what is measured says nothing. A template or the tokenizer leaves out what tells them apart: look at "
                "context_template, context_role and system of evaluate.prompts, and at prompts.template_arguments"
            )


def as_key(context: str) -> str:
    """Contexts that differ in white space only are the same, as are prompts (`PromptRow.text`)."""
    return " ".join(context.split())
