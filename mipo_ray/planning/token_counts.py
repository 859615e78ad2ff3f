"""Prompts that do not fit the window are told before anything starts: long ones are counted as they are rendered.

A text has at most as many tokens as bytes, so that most rows are known to fit without a tokenizer, and none is loaded
for them. Most others fit by the tokens of their texts; only for those that are left the chat template is rendered, with
transformers, whose import takes seconds. MOST_TEXT characters of each set are counted, where the tokenizer is on this
machine already; `--tokens` counts all of them and brings the model here. What the strategy `random_context` makes of
two rows may still be too long; it is told when the round's requests are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

from mipo_ray.config.generation import SamplingConfig
from mipo_ray.config.prompts import ChatSettings
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.evaluation.tasks.items import Item
from mipo_ray.evaluation.tasks.task import Task
from mipo_ray.evaluation.tasks.task_check import TASK_WINDOW, task_window
from mipo_ray.generation.rendering import (
    DROP_HINT,
    PromptTooLongError,
    check_length,
    load_tokenizer,
    render_answer,
    render_prompts,
)
from mipo_ray.models.directory import is_remote, local_path
from mipo_ray.models.source import local_tokenizer
from mipo_ray.prompts.check import ROWS_NAMED
from mipo_ray.prompts.rows import Message, PromptRow

MOST_TEXT = 10_000_000  # characters; a tokenizer reads one to three million a second
TOKENS_HELP = (
    f"count the tokens of all prompts that may be too long (without it: of {MOST_TEXT:,} characters of each set, where "
    "the tokenizer is on this machine)"
)
# Tokens that a chat template adds at most: to each message, and to a conversation (a system message of its own).
_PER_MESSAGE, _PER_CONVERSATION = 64, 256


@dataclass(frozen=True)
class _LongText:
    """A row that may not fit: a conversation or, with options, the text that each of them continues, or the
    conversation that each of them answers (`answers`)."""

    where: str
    name: str
    messages: list[Message]
    options: tuple[str, ...] = ()
    answers: bool = False


@dataclass
class _TextSet:
    """The long rows of one set of prompts or items. Tokens throughout."""

    window: int
    answer: int  # of the longest response; 0 for a likelihood
    window_name: str  # in the configuration
    hint: str
    drops: bool = False  # rows that do not fit are left out of the run
    waiting: list[_LongText] = field(default_factory=list)
    characters: int = 0  # of all rows that were kept for counting
    not_counted: int = 0
    counted: int = 0
    longest: int = 0  # of those that were rendered
    too_long: list[str] = field(default_factory=list)  # the first messages
    too_long_count: int = 0


class TokenCounts:
    """Counts tokens of prompts and items while a check reads them; `notes` says what was found."""

    def __init__(self, config: Config, *, count_all: bool = False) -> None:
        self._config = config
        self._count_all = count_all
        self._sets: dict[str, _TextSet] = {}

    def of_prompts(self, section: str) -> Callable[[str, PromptRow], None]:
        """What a check of prompts calls for each row, with the file and number of the row."""
        sampling, window = self._config.generation.sampling, self._config.model.max_model_len
        drops = section == "prompts" and self._config.filters.drop_too_long
        hint = DROP_HINT if section == "prompts" else "; held-out prompts are never dropped"
        texts = _TextSet(window, sampling.max_tokens, "model.max_model_len", hint, drops)
        self._sets[section] = texts

        def watch(where: str, row: PromptRow) -> None:
            if _may_be_long(row["messages"], window - sampling.max_tokens):
                self._keep(texts, _LongText(where, row["prompt_id"], row["messages"]))

        return watch

    def of_item(self, task: Task, sampling: SamplingConfig | None, item: Item) -> None:
        """What a check of tasks calls for each item."""
        window = task_window(self._config)
        answer = sampling.max_tokens if sampling is not None else 0
        hint = ", or lower the task's max_tokens; items of a task are never dropped" if sampling is not None else ""
        texts = self._sets.setdefault(task.name, _TextSet(window, answer, TASK_WINDOW, hint))
        if sampling is not None:
            if _may_be_long(item.messages, window - answer):
                self._keep(texts, _LongText(item.where, f"{task.name}/{item.item_id}", item.messages))
            return
        options = tuple(item.option_labels if task.continuation == "label" else item.option_texts)
        if task.kind == "choice":
            longest = {"role": "assistant", "content": max(options, key=_bytes)}
            if _may_be_long([*item.messages, longest], window - 1):
                row = _LongText(item.where, f"{task.name}/{item.item_id}", item.messages, options, answers=True)
                self._keep(texts, row)
            return
        # The space before the option, the token that the engine samples while it scores, and a begin token.
        if _bytes(item.messages[-1]["content"]) + max(map(_bytes, options)) + 4 > window:
            self._keep(texts, _LongText(item.where, f"{task.name}/{item.item_id}", item.messages, options))

    def notes(self, names: Container[str] | None = None) -> tuple[str, ...]:
        """A line for each set with rows that needed a look; raises UserError, with file and row, for one too long.

        names: the sets and tasks that are looked at; None: all.
        """
        notes = []
        for name, texts in self._sets.items():
            if names is not None and name not in names:
                continue
            why = self._count(texts)
            if texts.too_long_count and not texts.drops:
                more = texts.too_long_count - len(texts.too_long)
                raise UserError("\n".join(texts.too_long) + (f"\nand {more} more rows" if more else ""))
            if texts.counted:
                room = f" of at most {texts.window - texts.answer:,}"
                longest = f", the longest {texts.longest:,} tokens{room}" if texts.longest else ""
                dropped = f"; {texts.too_long_count:,} do not fit and are dropped" if texts.drops else ""
                notes.append(f"{name}: {texts.counted:,} long rows counted{longest}{dropped}")
            if texts.not_counted:
                notes.append(f"{name}: {texts.not_counted:,} long rows not counted ({why}); --tokens counts them")
        return tuple(notes)

    def _keep(self, texts: _TextSet, row: _LongText) -> None:
        size = sum(len(message["content"]) for message in row.messages)
        texts.characters += size
        if self._count_all and texts.characters > MOST_TEXT:
            self._count(texts)
            texts.characters = size
        if texts.characters <= MOST_TEXT or self._count_all:
            texts.waiting.append(row)
        else:
            texts.not_counted += 1

    def _count(self, texts: _TextSet) -> str:
        """Counts what waits; returns why some rows are not counted, where there are any."""
        why = self._count_rows(texts) if texts.waiting else ""
        if why:
            texts.not_counted += len(texts.waiting)
        texts.waiting.clear()
        return why or f"more than {MOST_TEXT:,} characters"

    def _count_rows(self, texts: _TextSet) -> str:
        model = self._config.model
        directory = local_tokenizer(model.source) or (model.source if self._count_all else None)
        if directory is None:
            return f"the tokenizer of {model.source} is not on this machine"
        try:
            rows = _not_surely_short(texts, directory)
            tokenizer = load_tokenizer(directory, model.trust_remote_code) if rows else None
        except UserError:
            raise
        except Exception as error:  # whatever a broken tokenizer raises
            return f"the tokenizer cannot be loaded: {type(error).__name__}"
        texts.counted += len(texts.waiting)
        for row in rows:
            tokens, answer = _tokens(tokenizer, row, texts.answer, self._config.prompts.chat)
            texts.longest = max(texts.longest, tokens + answer - texts.answer)
            try:
                check_length(
                    row.name,
                    range(tokens),
                    max_tokens=answer,
                    max_model_len=texts.window,
                    field=texts.window_name,
                    hint=texts.hint,
                )
            except PromptTooLongError as error:
                texts.too_long_count += 1
                texts.too_long += [f"{row.where}: {error}"] if len(texts.too_long) < ROWS_NAMED else []
        return ""


def _not_surely_short(texts: _TextSet, directory: str) -> list[_LongText]:
    """The waiting rows that may not fit by the tokens of their texts and what a chat template may add."""
    file = local_path(directory) / "tokenizer.json"
    if is_remote(directory) or not file.is_file():
        return texts.waiting
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    # In a text from data these are the text that they are, and so more than one token each.
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]

    def most(row: _LongText) -> float:
        contents = [message["content"] for message in row.messages]
        if any(token in content for token in added for content in contents):
            return math.inf
        tokens = [len(encoded.ids) for encoded in tokenizer.encode_batch(contents, add_special_tokens=False)]
        return sum(tokens) + _PER_MESSAGE * len(tokens) + _PER_CONVERSATION

    return [row for row in texts.waiting if row.options or most(row) > texts.window - texts.answer]


def _tokens(tokenizer: Any, row: _LongText, answer: int, chat: ChatSettings) -> tuple[int, int]:
    """Tokens of a row's prompt, and of the longest response or option behind it."""
    if not row.options:
        return len(render_prompts(tokenizer, [row.messages], chat)[0]), answer
    from mipo_ray.evaluation.tasks.task_requests import option_token_ids

    context = row.messages[-1]["content"]
    if row.answers:
        pairs = [render_answer(tokenizer, row.messages, option, chat) for option in row.options]
    else:
        pairs = [option_token_ids(tokenizer, context, f" {option}") for option in row.options]
    return max(((len(prompt), len(option) + 1) for prompt, option in pairs), key=sum)


def _may_be_long(messages: list[Message], room: int) -> bool:
    most = sum(_bytes(message["content"]) + _PER_MESSAGE for message in messages) + _PER_CONVERSATION
    return most > room


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
