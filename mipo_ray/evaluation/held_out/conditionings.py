"""Which other conditionings a held-out response is compared with. Pure: no Ray, no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.errors import UserError
from mipo_ray.prompts.rows import with_context
from mipo_ray.seeds import stable_seed

Messages = list[dict[str, str]]


def other_conditionings(
    rows: Sequence[dict[str, Any]], prompts: PromptsConfig, count: int, *, seed: int
) -> list[list[Messages]]:
    """For each prompt row, `count` other prompts that its responses are scored under, drawn with a seed.

    A row with a context gets its own question under other users' contexts; a row without one gets other prompts. All
    differ from the row's own prompt and from each other, and none comes from the row's own group. With `count` one
    below the number of candidates this is the full matrix.

    Raises UserError naming the first row that has fewer than `count` candidates.
    """
    chosen = []
    for row in rows:
        own = as_key(row["context"]) if row["context"] else row["text"]
        candidates: dict[str, Messages] = {}
        for other in rows:
            if row["group"] and other["group"] == row["group"]:
                continue
            if row["context"]:
                key = as_key(other["context"])
                messages = with_context(row["question_messages"], other["context"], prompts) if key else []
            else:
                key, messages = other["text"], other["messages"]
            if key and key != own:
                candidates.setdefault(key, messages)
        if len(candidates) < count:
            what = "contexts of other users" if row["context"] else "other prompts"
            raise UserError(
                f"{prompts.path}, prompt {row['prompt_id']!r}: evaluate.other_prompts asks for {count} {what}, found "
                f"{len(candidates)} among the held-out rows; lower it or add held-out rows"
            )
        random = np.random.default_rng(stable_seed("other conditionings", seed, row["prompt_id"]))
        keys = sorted(candidates)
        chosen.append([candidates[keys[index]] for index in random.choice(len(keys), size=count, replace=False)])
    return chosen


def as_key(context: str) -> str:
    """Contexts that differ in white space only are the same, as are prompts (`PromptRow.text`)."""
    return " ".join(context.split())
