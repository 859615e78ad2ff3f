"""The tokens that end an answer, and those that have no place inside one, as a model's files and its template say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mipo_ray.config.prompts import ChatSettings
from mipo_ray.generation.rendering import chat_template_of, control_tokens
from mipo_ray.models.chat_template import ChatTemplateError, declared_end_ids, end_of_turn
from mipo_ray.models.directory import open_directory

# Marks of a model's thoughts are a part of what it says, even where its tokenizer calls them special.
_THOUGHTS = re.compile(r"think|thought|reason", re.IGNORECASE)
_PLAIN = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


@dataclass(frozen=True)
class TurnTokens:
    """Token ids by what they do to an answer.

    ends: those that end it. added: those of them that the model's own files do not call end tokens, though its chat
    template ends a turn with them; the engine must be told. control: those that have no place inside an answer.
    """

    ends: frozenset[int]
    added: tuple[int, ...]
    control: frozenset[int]

    def inside(self, token_ids: Sequence[int]) -> int:
        """How many control tokens stand in an answer, not counting the one that ends it."""
        body = token_ids[:-1] if token_ids and token_ids[-1] in self.ends else token_ids
        return sum(token in self.control for token in body)


def turn_tokens(tokenizer: Any, directory: str, chat: ChatSettings) -> TurnTokens:
    """The turn tokens of a model (a local directory) and its tokenizer."""
    declared = set(declared_end_ids(open_directory(directory)))
    if tokenizer.eos_token_id is not None:
        declared.add(tokenizer.eos_token_id)
    template = chat_template_of(tokenizer, directory)
    end = None if template is None else end_of_turn(template, chat.arguments)
    end_id = None if end is None else tokenizer.convert_tokens_to_ids(end)
    added = () if end_id is None or end_id in declared else (int(end_id),)
    return TurnTokens(
        ends=frozenset(declared | {*added}), added=added, control=frozenset(_control_ids(tokenizer, chat, declared))
    )


def _control_ids(tokenizer: Any, chat: ChatSettings, ends: set[int]) -> set[int]:
    """Special tokens, and of the other ones those that the template writes around plain turns."""
    plain = ""
    if (template := chat_template_of(tokenizer, "")) is not None:
        try:
            plain = template.render(_PLAIN, chat.arguments)
        except ChatTemplateError:
            plain = template.text  # that of one message at most: all that it names
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = [token for token in control_tokens(tokenizer) if token in special or token in plain]
    return ends | {int(tokenizer.convert_tokens_to_ids(token)) for token in tokens if not _THOUGHTS.search(token)}
