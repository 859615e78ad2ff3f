"""Chat messages -> prompt token ids, by the model's own chat template."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from mipo_ray.errors import UserError

DROP_HINT = ", or set filters.drop_too_long=true"


class PromptTooLongError(UserError):
    """A rendered prompt leaves no room for a response in the context window."""


@functools.lru_cache(maxsize=2)
def load_tokenizer(model_path: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model (any name that the configuration takes), one per process."""
    from transformers import AutoTokenizer

    from mipo_ray.models.source import local_model_directory

    directory = local_model_directory(model_path, trust_remote_code=trust_remote_code)
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)


def render_prompts(tokenizer: Any, conversations: Sequence[list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of each conversation up to the point where the assistant's answer begins."""
    return [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        for messages in conversations
    ]


def fits(token_ids: Sequence[int], *, max_tokens: int, max_model_len: int) -> bool:
    """Whether a prompt and the longest response fit the context window together (all in tokens)."""
    return len(token_ids) + max_tokens <= max_model_len


def check_length(
    prompt_id: str,
    token_ids: Sequence[int],
    *,
    max_tokens: int,
    max_model_len: int,
    field: str = "model.max_model_len",
    hint: str = DROP_HINT,
) -> None:
    """Raises PromptTooLongError when a prompt leaves too little of the window (in tokens).

    `field` is the window's name in the configuration; `hint` ends the message.
    """
    if not fits(token_ids, max_tokens=max_tokens, max_model_len=max_model_len):
        raise PromptTooLongError(
            f"prompt {prompt_id!r}: {len(token_ids)} tokens and a response of up to {max_tokens} do not fit the "
            f"context window: expected at most {max_model_len - max_tokens} prompt tokens ({field} "
            f"{max_model_len} - max_tokens {max_tokens}). Shorten it or raise {field}{hint}."
        )
