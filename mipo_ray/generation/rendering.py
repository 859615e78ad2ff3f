"""Chat messages -> prompt token ids, by the model's own chat template.

The template is rendered within limits (`models.chat_template`), and its text becomes tokens here. That makes the token
ids of transformers' `apply_chat_template`, which would render the template in this process, where nothing limits it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from mipo_ray.config.prompts import ChatSettings
from mipo_ray.errors import UserError
from mipo_ray.models.chat_template import ChatTemplate, ChatTemplateError, TemplateTooCostly
from mipo_ray.prompts.chat_check import another_beginning, refuse_control_tokens

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


def render_prompts(
    tokenizer: Any, conversations: Sequence[Sequence[Mapping[str, str]]], chat: ChatSettings
) -> list[list[int]]:
    """Token ids of each conversation up to the point where the assistant's answer begins.

    A control token that stands in a message is tokenised as text, or refused with a UserError, as `chat` says: only
    those that the template writes are control tokens. Raises ChatTemplateError where the template refuses a
    conversation, and TemplateTooCostly where it takes more time or memory than it may.
    """
    renderer = _Renderer(tokenizer, chat)
    return [renderer.token_ids(messages) for messages in conversations]


def render_text(tokenizer: Any, messages: Sequence[Mapping[str, str]], chat: ChatSettings) -> str:
    """A conversation as the model sees it up to the point where its answer begins, as text; raises the same."""
    return _Renderer(tokenizer, chat).text(messages)


def render_turns(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation whose answer is its last message, as text; raises the same."""
    return _Renderer(tokenizer, ChatSettings({})).text(messages, add_generation_prompt=False)


def render_answer(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], answer: str, chat: ChatSettings
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, as `render_prompts` gives them, and of an answer behind it, with all that the template
    writes around the answer.

    Together they are those of the whole conversation, unless a token would reach over the end of the prompt: then the
    answer's turn is tokenised by itself, since no model is ever asked with half of that token. Raises the same, and
    ChatTemplateError where the conversation does not begin with the prompt.
    """
    return _Renderer(tokenizer, chat).answer_ids(messages, {"role": "assistant", "content": answer})


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


class _Rendered(NamedTuple):
    """A conversation as text, "" where it was rendered by other means, and as token ids; options: the tokenizer's."""

    text: str
    token_ids: list[int]
    options: dict[str, bool]


class _Renderer:
    """Renders conversations for one tokenizer: by its chat template within limits, or by other means that it has."""

    def __init__(self, tokenizer: Any, chat: ChatSettings) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._template = _limited_template(tokenizer)

    def text(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, in which control tokens look the same whoever wrote them."""
        with _refusals_told(messages):
            if self._template is None:
                return str(self._by_other_means(messages, add_generation_prompt=add_generation_prompt, tokenize=False))
            return self._template.render(messages, self._chat.arguments, add_generation_prompt=add_generation_prompt)

    def token_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids of a conversation; raises UserError where it has control tokens and these are refused."""
        return self._rendered(messages).token_ids

    def answer_ids(self, messages: Sequence[Mapping[str, str]], turn: Mapping[str, str]) -> tuple[list[int], list[int]]:
        """Those of a prompt, and of the turn that answers it; see `render_answer`."""
        prompt = self._rendered(messages)
        whole = self._rendered([*messages, turn], add_generation_prompt=False)
        length = len(prompt.token_ids)
        if not whole.text.startswith(prompt.text):
            raise ChatTemplateError(f"{_begun(messages)}: {another_beginning(prompt.text)}")
        if whole.token_ids[:length] == prompt.token_ids:
            return prompt.token_ids, whole.token_ids[length:]
        if self._template is None:
            raise ChatTemplateError(f"{_begun(messages)}: {another_beginning(self.text(messages))}")
        rest = self._tokenizer(whole.text[len(prompt.text) :], add_special_tokens=False, **whole.options)
        return prompt.token_ids, list(rest["input_ids"])

    def _rendered(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> _Rendered:
        copies = [dict(message) for message in messages]
        quotes = any(token in message["content"] for token in self._quoted for message in copies)
        if quotes and self._chat.control_tokens == "refuse":
            for message in copies:
                refuse_control_tokens(_begun(copies), message, self._quoted)
        options = {"sanitize_control_tokens": True} if quotes else {}
        with _refusals_told(copies):
            if self._template is None:
                token_ids: list[int] = self._by_other_means(
                    copies, add_generation_prompt=add_generation_prompt, tokenize=True, **options
                )
                return _Rendered("", token_ids, options)
            arguments = self._chat.arguments
            if quotes:
                copies, arguments = self._marked(copies), self._marked(arguments)
            text = self._template.render(copies, arguments, add_generation_prompt=add_generation_prompt)
            ids = self._tokenizer(text, add_special_tokens=False, **options)["input_ids"]
            return _Rendered(text, list(ids), options)

    @functools.cached_property
    def _quoted(self) -> tuple[str, ...]:
        """What is text where a message holds it, and a control token where the template writes it."""
        written = () if self._template is None else _written_tokens(self._tokenizer, self._template.text)
        return tuple(dict.fromkeys((*control_tokens(self._tokenizer), *written)))

    def _marked(self, values: Any) -> Any:
        """Messages or arguments, the control tokens in them marked, so that the tokenizer knows them as text."""
        from transformers.utils.chat_template_utils import _get_control_token_patterns, mark_control_tokens

        assert self._template is not None
        if isinstance(values, Mapping):  # a day with marks is none
            return {name: value if name == "date_string" else self._marked(value) for name, value in values.items()}
        pattern, _ = _get_control_token_patterns(_written_tokens(self._tokenizer, self._template.text))
        return mark_control_tokens(values, pattern)

    def _by_other_means(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Any:
        arguments = dict(self._chat.arguments)
        if "date_string" not in (_template_text(self._tokenizer) or ""):
            arguments.pop("date_string", None)  # not every tokenizer takes arguments that its template does not know
        copies = [dict(message) for message in messages]
        return self._tokenizer.apply_chat_template(copies, return_dict=False, **options, **arguments)


@contextlib.contextmanager
def _refusals_told(messages: Sequence[Mapping[str, str]]) -> Iterator[None]:
    """Raises ChatTemplateError, which names the conversation, for what a template or a tokenizer raises."""
    try:
        yield
    except TemplateTooCostly:
        raise
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        said = str(error) if isinstance(error, ChatTemplateError) else f"{type(error).__name__}: {error}"
        roles = ", ".join(message["role"] for message in messages)
        raise ChatTemplateError(
            f"{_begun(messages)}: the chat template refuses a conversation of {roles}: {said}"
        ) from error


def _begun(messages: Sequence[Mapping[str, str]]) -> str:
    return f"prompt {messages[-1]['content']!r:.60}"


def _limited_template(tokenizer: Any) -> ChatTemplate | None:
    """The template that is rendered within limits; None for a tokenizer that renders by code of its own class.

    Such a class is one of transformers, or the model's own, whose code is trusted (`model.trust_remote_code`).
    """
    template = chat_template_of(tokenizer, _shown(tokenizer))
    if template is None:
        return None
    from transformers import PreTrainedTokenizerBase

    own = type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    return None if own else template


def _shown(tokenizer: Any) -> str:
    return f"the chat template of {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"


@functools.lru_cache(maxsize=4)
def _written_tokens(tokenizer: Any, template: str) -> tuple[str, ...]:
    """The control tokens that transformers tells apart from the same text in a message (`sanitize_control_tokens`).

    They are the special tokens, and those that the tokenizer's files name or else that stand in the template's texts.
    """
    named = getattr(tokenizer, "chat_control_tokens", None)
    if named is None:
        literals = "\0".join(_literals(_shown(tokenizer), template))
        named = [token for token in tokenizer.added_tokens_encoder if token in literals and not token.isspace()]
    return tuple(
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special or token.content in named
    )


def _literals(shown: str, template: str) -> frozenset[str]:
    try:
        return ChatTemplate(shown, template, {}, ()).literals
    except ChatTemplateError:
        return frozenset()  # it does not compile, which the first conversation is told


def _template_text(tokenizer: Any) -> str | None:
    return tokenizer.get_chat_template() if getattr(tokenizer, "chat_template", None) else None


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
