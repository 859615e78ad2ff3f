"""A model's chat template, read from its files and rendered with Jinja2 alone: no torch, no transformers.

A template is a stranger's program. It is rendered nowhere but here, within the limits of `text.limited_templates`: for
the checks before anything starts, and for the prompts of a run, whose tokens are those of this very text
(`generation.rendering`). Nothing that is rendered depends on the clock: `strftime_now`, which templates call for
today's date, tells the day of the argument `date_string`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mipo_ray.errors import UserError
from mipo_ray.models.chat_environment import chat_environment
from mipo_ray.models.directory import ModelDirectory, is_remote, local_path, open_directory, well_formed
from mipo_ray.models.embedded import embedded_directory
from mipo_ray.models.hub import downloaded
from mipo_ray.models.source import EMBEDDED
from mipo_ray.text.dates import DATE_STRING
from mipo_ray.text.limited_templates import LimitPassed, TemplateFailed, literals_of, render, variables_of

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplateError(UserError):
    """A chat template refuses a conversation; the message is the template's own."""


class TemplateTooCostly(UserError):
    """A chat template takes more time or memory than it may."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template as text.

    shown: where it was read. special_tokens: the variables that tokenizers give their template (`bos_token`, ...).
    control_tokens: the tokenizer's special tokens, and its other added ones that the template writes. end_tokens: those
    that the model's files call end tokens.
    """

    shown: str
    text: str
    special_tokens: Mapping[str, str]
    control_tokens: tuple[str, ...]
    end_tokens: tuple[str, ...] = ()

    @property
    def variables(self) -> frozenset[str]:
        """The variables that the template reads; raises UserError where it does not compile."""
        try:
            return variables_of(chat_environment, (DATE_STRING,), self.text)
        except TemplateFailed as error:
            where = self.shown if error.line is None else f"{self.shown}, line {error.line}"
            raise UserError(f"{where}: not a valid chat template: {error.message}") from None

    @property
    def literals(self) -> frozenset[str]:
        """The texts that stand in the template: those between its tags, and string constants; raises as `render`."""
        with self._errors_told():
            return literals_of(chat_environment, (DATE_STRING,), self.text)

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        arguments: Mapping[str, Any],
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a conversation; raises ChatTemplateError, with the template's own message, where it refuses it,
        and TemplateTooCostly, which names the template, where it takes more time or memory than it may.

        arguments: variables beside the messages (`prompts.template_arguments`).
        """
        variables = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            **self.special_tokens,
            **arguments,
        }
        date_string = str(arguments.get("date_string", DATE_STRING))
        with self._errors_told():
            return render(chat_environment, (date_string,), self.text, variables)

    @contextlib.contextmanager
    def _errors_told(self) -> Iterator[None]:
        try:
            yield
        except LimitPassed as error:
            raise TemplateTooCostly(f"{self.shown}: {error.shown}") from None
        except TemplateFailed as error:
            raise ChatTemplateError(error.shown) from None


def end_of_turn(template: ChatTemplate, arguments: Mapping[str, Any]) -> str | None:
    """The control token that the template writes at the end of an assistant's turn; None where it writes none there.

    Templates that leave the last turn open are asked for one in the middle; what begins the next turn ends none.
    """
    asked, answer, next_question = (f"word{number}ofaturn" for number in range(3))
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    for messages in (turns, [*turns, {"role": "user", "content": next_question}]):
        try:
            text = template.render(messages, arguments, add_generation_prompt=False)
        except ChatTemplateError:
            continue
        opening, after = text.partition(asked)[0], text.partition(answer)[2].partition(next_question)[0].strip()
        if found := [token for token in template.control_tokens if after.startswith(token)]:
            return None if opening.strip().endswith(after) and len(messages) > 2 else max(found, key=len)
    return None


def declared_end_ids(directory: ModelDirectory) -> tuple[int, ...]:
    """The ids of the end tokens that a model's generation_config.json names, or config.json where there is none."""
    name = "generation_config.json" if "generation_config.json" in directory.details else "config.json"
    ids = _read_json(directory, name).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    return tuple(number for number in ids if isinstance(number, int))


def read_chat_template(path: str) -> ChatTemplate | None:
    """The chat template of a model that `source.check_model` accepts; None where its files are not here yet."""
    directory = _directory(path)
    if directory is None:
        return None
    with well_formed(directory, "the tokenizer's files"):
        return _chat_template(directory)


def _chat_template(directory: ModelDirectory) -> ChatTemplate | None:
    config = _read_json(directory, "tokenizer_config.json")
    text = _template_text(directory, config)
    if not text:
        return None
    names = {**_read_json(directory, "special_tokens_map.json"), **config}
    special_tokens = {name: _content(names[name]) for name in _TOKEN_NAMES if names.get(name)}
    added = _added_tokens(directory, config)
    control = {token for token, (_, special) in added.items() if special or (token.strip() and token in text)} | set(
        special_tokens.values()
    )
    ids = declared_end_ids(directory)
    ends = {token for token, (number, _) in added.items() if number in ids}
    file = "chat_template.jinja" if "chat_template.jinja" in directory.details else "tokenizer_config.json"
    return ChatTemplate(
        shown=f"{directory.shown}/{file}",
        text=text,
        special_tokens=special_tokens,
        control_tokens=tuple(sorted(control)),
        end_tokens=tuple(sorted(ends | {special_tokens[name] for name in special_tokens if name == "eos_token"})),
    )


def _directory(path: str) -> ModelDirectory | None:
    if path == EMBEDDED:
        return open_directory(str(embedded_directory())) if embedded_directory().is_dir() else None
    if is_remote(path) or local_path(path).is_dir():
        return open_directory(path)
    config_file = downloaded(path, "tokenizer_config.json")
    return None if config_file is None else open_directory(str(config_file.parent))


def _read_json(directory: ModelDirectory, name: str) -> dict[str, Any]:
    return directory.read_json(name) if name in directory.details else {}


def _template_text(directory: ModelDirectory, config: dict[str, Any]) -> str:
    if "chat_template.jinja" in directory.details:
        return directory.read("chat_template.jinja").decode("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    return template or ""


def _content(token: Any) -> str:
    """A token's text, which files give alone or among what else is known of it."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _added_tokens(directory: ModelDirectory, config: dict[str, Any]) -> dict[str, tuple[int, bool]]:
    """The tokens that were added to the vocabulary: text -> its id, and whether it is a special one."""
    listed = [{**token, "id": int(number)} for number, token in (config.get("added_tokens_decoder") or {}).items()]
    if not is_remote(directory.shown):  # of a remote model this large file is not worth its download before the run
        listed += _read_json(directory, "tokenizer.json").get("added_tokens") or []
    return {_content(token): (int(token.get("id", -1)), bool(token.get("special"))) for token in listed}
