"""Whether a chat template takes a run's conversations and shows the model all of them, found by rendering them.

A template that has no branch for a role says nothing and leaves the message out: what a run then compares are equal
prompts. So made-up words are rendered in every order of roles that the data has, and looked for; of the first rows the
text itself is. Nothing here imports ray, torch, transformers or vllm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mipo_ray.config.prompts import ChatSettings, PromptsConfig
from mipo_ray.errors import UserError, brief
from mipo_ray.models.chat_template import ChatTemplate, ChatTemplateError, read_chat_template
from mipo_ray.prompts.reading import nearest
from mipo_ray.prompts.rows import Message, PromptRow

ROWS_RENDERED = 32  # whose own text is looked for, not made-up words alone
MOST_SHAPES = 256  # orders of roles that are tried; data with more of them differ in the number of turns alone
# Line ends and control characters as a template writes them that prints JSON.
_ESCAPED = re.compile(r"\\(?:[nrtbf]|u00[0-9a-f]{2}|x[0-9a-f]{2})")
_WORD = re.compile(r"\w+")


class ChatCheck:
    """Looks at the conversations of a run as they go by; what it has seen once it does not render again.

    template: of the model that reads them; None, where its files are not here yet, checks nothing. prompts, section:
    what made the conversations, for messages: `prompts` and where it stands in the configuration.
    """

    def __init__(
        self, template: ChatTemplate | None, chat: ChatSettings, prompts: PromptsConfig, section: str = "prompts"
    ) -> None:
        self._template = template
        self._chat = chat
        self._prompts = prompts
        self._section = section
        self._shapes: set[tuple[str, ...]] = set()
        self._rendered = 0
        self._answers_rendered = 0

    def look(self, where: str, *conversations: Sequence[Message]) -> None:
        """Checks the conversations of one row, `where` it stands.

        Raises UserError, which names the row, the role and the setting that leads there, for a conversation that the
        template refuses or of which it leaves something out, and for a control token where these are refused.
        """
        if self._template is None:
            return
        for messages in conversations:
            roles = tuple(message["role"] for message in messages)
            if roles not in self._shapes and len(self._shapes) < MOST_SHAPES:
                self._shapes.add(roles)
                self._look_at(where, made_up_messages(roles))
            if self._rendered < ROWS_RENDERED:
                self._look_at(where, messages)
            if self._chat.control_tokens == "refuse":
                self._refuse_control_tokens(where, messages)
        self._rendered += 1

    def look_at_answers(
        self, where: str, messages: Sequence[Message], answers: Sequence[str], arguments: Mapping[str, Any]
    ) -> None:
        """Checks, of the first rows, that an answer's turn begins as a prompt for it ends, and shows the whole answer;
        of every row, that the answers hold no control token where these are refused.

        arguments: the row's own, over those of the run. Raises UserError, which names the row, for what does not.
        """
        if self._template is None:
            return
        turns = [{"role": "assistant", "content": answer} for answer in answers]
        for turn in turns:
            if self._answers_rendered < ROWS_RENDERED:
                self._look_at_answer(where, messages, turn, {**self._chat.arguments, **arguments})
            if self._chat.control_tokens == "refuse":
                self._refuse_control_tokens(where, [turn])
        self._answers_rendered += 1

    def _look_at_answer(
        self, where: str, messages: Sequence[Message], turn: Message, arguments: Mapping[str, Any]
    ) -> None:
        assert self._template is not None
        try:
            prompt = self._template.render(messages, arguments)
            whole = self._template.render([*messages, turn], arguments, add_generation_prompt=False)
        except ChatTemplateError as error:
            raise UserError(
                f"{where}: {self._template.shown}: the chat template refuses the prompt with its answer: {error}"
            ) from None
        if not whole.startswith(prompt):
            raise UserError(f"{where}: {self._template.shown}: {another_beginning(prompt)}")
        if lost_message([turn], whole[len(prompt) :]) is not None:
            raise UserError(
                f"{where}: {self._template.shown}: the chat template leaves out a part of the answer "
                f"{brief(turn['content'], 60)}: expected all of its text behind the prompt, found it missing"
            )

    def watch(self, where: str, row: PromptRow) -> None:
        """Looks at both conversations of a prompt row: with its context and without."""
        self.look(where, row["messages"], row["question_messages"])

    def _look_at(self, where: str, messages: Sequence[Message]) -> None:
        assert self._template is not None
        roles = ", ".join(message["role"] for message in messages)
        try:
            text = self._template.render(messages, self._chat.arguments)
        except ChatTemplateError as error:
            raise UserError(
                f"{where}: {self._template.shown}: the chat template refuses a conversation of {roles}: {error}. "
                f"{self._way_out(messages)}"
            ) from None
        if (lost := lost_message(messages, text)) is not None:
            number = f"message {lost + 1} of {len(messages)} ({roles})"
            raise UserError(
                f"{where}: {self._template.shown}: the chat template leaves out the {messages[lost]['role']} message "
                f"or a part of it, {number}: expected all of its text in the prompt, found it missing. "
                f"{self._way_out(messages, lost)}"
            )

    def _way_out(self, messages: Sequence[Message], lost: int | None = None) -> str:
        """The settings that lead to such a conversation, and what to set in their place."""
        prompts, section = self._prompts, self._section
        ways = []
        if messages[0]["role"] == "system" and lost in (None, 0):
            if prompts.context_role == "system":
                ways.append(f"{section}.context_role=system puts the context there (set it to user)")
            if prompts.system:
                ways.append(f"{section}.system is a system message (put it into {section}.context_template, or null)")
            ways.append("a row may bring a system message of its own")
        if len(messages) > 2 and lost != len(messages) - 1 and not (lost == 0 and ways):
            if prompts.exemplars:
                ways.append(f"{section}.exemplars are turns of user and assistant before the prompt")
            ways.append("a row may bring turns of its own")
        if not ways:
            ways.append("this is the last message, which every prompt has: the model needs another chat template")
        return f"What leads there: {'; '.join(ways)}. prompts.template_arguments gives the template its variables."

    def _refuse_control_tokens(self, where: str, messages: Sequence[Message]) -> None:
        assert self._template is not None
        for message in messages:
            refuse_control_tokens(where, message, self._template.control_tokens)


def chat_check(model: str, chat: ChatSettings, prompts: PromptsConfig, section: str = "prompts") -> ChatCheck:
    """The check of a model (any name that the configuration takes) whose files may not be here yet."""
    return ChatCheck(read_chat_template(model), chat, prompts, section)


def check_arguments(templates: Sequence[ChatTemplate], chat: ChatSettings) -> None:
    """Raises UserError for a template argument that no template reads: a wrong name would do nothing, unseen."""
    known = frozenset[str]().union(*(template.variables for template in templates))
    for name in sorted(chat.arguments.keys() - known - {"date_string"}):
        raise UserError(
            f"prompts.template_arguments.{name}: {templates[0].shown}: the chat template has no such variable; it "
            f"reads {', '.join(sorted(known))}{nearest(name, sorted(known))}"
        )


def refuse_control_tokens(where: str, message: Message, control_tokens: Sequence[str]) -> None:
    """Raises UserError where a message holds one of the control tokens (`prompts.control_tokens=refuse`)."""
    for token in control_tokens:
        if token in message["content"]:
            raise UserError(
                f"{where}: the {message['role']} message holds the control token {token!r}: expected none "
                "(prompts.control_tokens=refuse); take it out, or set prompts.control_tokens=text, by which it is "
                "tokenised as text"
            )


def another_beginning(prompt: str) -> str:
    """What to say of a template whose prompt for an answer is not how it begins the turn of one."""
    return (
        "expected the turn of an answer to begin as a prompt for one ends, so that the model is trained on what it is "
        f"asked later; found another beginning than {prompt[-60:]!r}; prompts.template_arguments gives the template "
        "its variables (enable_thinking, ...)"
    )


def made_up_messages(roles: Sequence[str]) -> list[Message]:
    """Messages of words that stand in no template: three lines each, so that a part that is left out is found."""
    return [
        {"role": role, "content": "\n\n".join(f"word{number}{part}of{role}" for part in ("first", "middle", "last"))}
        for number, role in enumerate(roles)
    ]


def lost_message(messages: Sequence[Message], rendered: str) -> int | None:
    """The number of the first message whose words, in their order, are not all in the rendered text; None: all are.

    What a template may do to a text is no loss: other white space or case, punctuation escaped as JSON writes it.
    """
    shown = _words(rendered)
    return next((number for number, message in enumerate(messages) if _words(message["content"]) not in shown), None)


def _words(text: str) -> str:
    return " ".join(_WORD.findall(_ESCAPED.sub(" ", text).casefold()))
