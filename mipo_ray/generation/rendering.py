"""Chat messages -> prompt token ids, by the model's own chat template."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from mipo_ray.config.prompts import ChatSettings
from mipo_ray.errors import UserError
from mipo_ray.models.chat_template import ChatTemplate, ChatTemplateError
from mipo_ray.prompts.chat_check import refuse_control_tokens
from mipo_ray.text.dates import DATE_STRING, date_of

DROP_HINT = ", or set filters.drop_too_long=true"

# What a template may ask of `strftime_now`.
_DATE_FIELDS = [f"%{flag}{letter}" for flag in "-_" for letter in "demHIMSj"]
_DATE_FIELDS += [f"%{letter}" for letter in "aAbBcCdDeFgGhHIjklmMnprRsStTuUVwWxXyYzZ"]


class PromptTooLongError(UserError):
    """A rendered prompt leaves no room for a response in the context window."""


@functools.lru_cache(maxsize=2)
def load_tokenizer(model_path: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model (any name that the configuration takes), one per process."""
    from transformers import AutoTokenizer

    from mipo_ray.models.source import local_model_directory

    directory = local_model_directory(model_path, trust_remote_code=trust_remote_code)
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)


def render_prompts(
    tokenizer: Any, conversations: Sequence[Sequence[Mapping[str, str]]], chat: ChatSettings
) -> list[list[int]]:
    """Token ids of each conversation up to the point where the assistant's answer begins.

    A control token that stands in a message is tokenised as text, or refused with a UserError, as `chat` says: only
    those that the template writes are control tokens. Raises ChatTemplateError where the template refuses a
    conversation.
    """
    return [_render(tokenizer, messages, chat, tokenize=True) for messages in conversations]


def render_text(tokenizer: Any, messages: Sequence[Mapping[str, str]], chat: ChatSettings) -> str:
    """A conversation as the model sees it up to the point where its answer begins, as text."""
    return str(_render(tokenizer, messages, chat, tokenize=False))


def text_token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a plain text, outside any chat: what the tokenizer puts before a text, then the text's own tokens.

    Nothing follows them: an end token that the tokenizer adds is left out. Control tokens in the text are text.
    """
    token_ids = plain_token_ids(tokenizer, text)
    return token_ids[: len(token_ids) - _added_behind(tokenizer)]


def plain_token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a plain text with all that the tokenizer adds around it; control tokens in it are text."""
    options = {"split_special_tokens": True} if any(token in text for token in control_tokens(tokenizer)) else {}
    return list(tokenizer(text, **options)["input_ids"])


@functools.lru_cache(maxsize=4)
def _added_behind(tokenizer: Any) -> int:
    """How many tokens a tokenizer adds behind a text, as some do with their end token."""
    own, with_added = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    for before in range(len(with_added) - len(own) + 1):
        if with_added[before : before + len(own)] == own:
            return len(with_added) - before - len(own)
    raise UserError(f"{type(tokenizer).__name__}: its tokens of a text change with those that it adds around it")


def chat_template_of(tokenizer: Any, shown: str) -> ChatTemplate | None:
    """The chat template of a loaded tokenizer, `shown` in messages; None for one that renders by other means."""
    text = _template_text(tokenizer)
    if text is None:
        return None
    return ChatTemplate(shown, text, tokenizer.special_tokens_map, control_tokens(tokenizer))


@functools.lru_cache(maxsize=4)
def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of a tokenizer's control tokens: its special tokens, and other added ones that its template writes."""
    template = _template_text(tokenizer) or ""
    return tuple(
        token.content
        for token in getattr(tokenizer, "added_tokens_decoder", {}).values()
        # Some templates write line ends or spaces that are added tokens too: these are text.
        if token.special or (token.content in template and not token.content.isspace())
    )


def _render(tokenizer: Any, messages: Sequence[Mapping[str, str]], chat: ChatSettings, *, tokenize: bool) -> Any:
    copies = [dict(message) for message in messages]
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": tokenize, "return_dict": False}
    options |= _template_options(tokenizer, chat)
    quoted = control_tokens(tokenizer)
    if tokenize and any(token in message["content"] for token in quoted for message in copies):
        if chat.control_tokens == "refuse":
            for message in copies:
                refuse_control_tokens(f"prompt {copies[-1]['content']!r:.60}", message, quoted)
        options["sanitize_control_tokens"] = True
    refuse_costly_template(tokenizer, copies, chat.arguments, add_generation_prompt=True)
    try:
        return tokenizer.apply_chat_template(copies, **options)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        roles = ", ".join(message["role"] for message in copies)
        raise ChatTemplateError(
            f"prompt {copies[-1]['content']!r:.60}: the chat template refuses a conversation of {roles}: "
            f"{type(error).__name__}: {error}"
        ) from error


def refuse_costly_template(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any], *, add_generation_prompt: bool
) -> None:
    """Renders a conversation as the tokenizer is about to, in a process with limits of time and memory.

    Raises TemplateTooCostly where the template passes them. What else it may raise, the tokenizer raises as well.
    """
    template = chat_template_of(
        tokenizer, f"the chat template of {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"
    )
    if template is not None:
        with contextlib.suppress(ChatTemplateError):
            template.render(messages, arguments, add_generation_prompt=add_generation_prompt)


def _template_text(tokenizer: Any) -> str | None:
    return tokenizer.get_chat_template() if getattr(tokenizer, "chat_template", None) else None


def _template_options(tokenizer: Any, chat: ChatSettings) -> dict[str, Any]:
    """What `apply_chat_template` is given beside the messages: the arguments, and a template without a clock."""
    template = _template_text(tokenizer)
    options = dict(chat.arguments)
    if template is None or "date_string" not in template:
        options.pop("date_string", None)  # not every tokenizer takes arguments that its template does not know
    if template is not None and "strftime_now" in template:
        options["chat_template"] = _without_clock(template, str(chat.arguments.get("date_string", DATE_STRING)))
    return options


@functools.lru_cache(maxsize=4)
def _without_clock(template: str, date_string: str) -> str:
    """The template with a `strftime_now` of its own, which hides the one that asks the clock."""
    day = date_of(date_string)
    fields = json.dumps([[field, day.strftime(field)] for field in _DATE_FIELDS])
    return (
        "{%- macro strftime_now(form) -%}{%- set told = namespace(text=form) -%}"
        f"{{%- for field, value in {fields} -%}}{{%- set told.text = told.text.replace(field, value) -%}}"
        "{%- endfor -%}{{- told.text -}}{%- endmacro %}\n"  # this line end is trimmed, as after every block
        f"{template}"
    )


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
