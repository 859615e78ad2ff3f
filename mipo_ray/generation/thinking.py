"""A sampled response with its thoughts marked in its text, and the tokens of its answer counted.

Decoding leaves special tokens out, marks of thoughts among them, and many chat templates open the thought in the
prompt: the text alone would not tell then what was thought. Such a response is written with `<think>` and `</think>`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mipo_ray.generation.rendering import render_turns
from mipo_ray.models.chat_template import TemplateTooCostly
from mipo_ray.text.thoughts import (
    CLOSING,
    OPENING,
    Marks,
    Span,
    opens_thought,
    split_thoughts,
    thought_spans,
)

_PROMPT_END = 48  # tokens at the end of a prompt in which its template may open the thought
_PROBES = ("pppthoughtppp", "pppanswerppp")
_TAG = r"(?:<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]|\u25c1[^\u25c1\u25b7]{1,40}\u25b7)"


@dataclass(frozen=True)
class ThoughtReader:
    """Reads the responses of one model.

    marks: what encloses thoughts beside the known marks: the configured ones and those of the chat template.
    special: the tokenizer's special tokens. hidden: whether marks are among them, which decoding leaves out.
    """

    tokenizer: Any
    marks: Marks
    special: tuple[str, ...]
    hidden: bool

    def read(
        self, prompt_token_ids: Sequence[int], token_ids: Sequence[int], text: str, *, stopped: bool
    ) -> tuple[str, int]:
        """The text of a response, its thoughts marked, and the tokens of its answer; without thoughts both as given.

        text: as the engine decoded it. stopped: whether the last token is the end token, which is no part of the text.
        """
        inside = self._begins_inside(prompt_token_ids)
        if not (inside or self.hidden or thought_spans(text, self.marks)):
            return text, len(token_ids)
        visible = list(token_ids)[: len(token_ids) - stopped]
        full = self.decode(visible)
        spans = thought_spans(full, self.marks, begins_inside=inside)
        if not spans:
            return text, len(token_ids)
        thought_tokens = sum(self.tokens_of(visible, span.end) - self.tokens_of(visible, span.start) for span in spans)
        answer_tokens = len(token_ids) - thought_tokens if spans[-1].closed else 0
        marked = self._marked(full, spans)
        # As it was decoded where that says the same: the model's own spelling is what people know.
        return (text if split_thoughts(text) == split_thoughts(marked) else marked), answer_tokens

    def spans(self, prompt_token_ids: Sequence[int], text: str) -> list[Span]:
        """The thoughts of a response, given as `decode` writes it."""
        return thought_spans(text, self.marks, begins_inside=self._begins_inside(prompt_token_ids))

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids, with special tokens."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False))

    def tokens_of(self, token_ids: list[int], position: int) -> int:
        """How many tokens the first `position` characters of the decoded text take."""
        low, high = 0, len(token_ids)
        while low < high:
            middle = (low + high) // 2
            if len(self.decode(token_ids[:middle])) < position:
                low = middle + 1
            else:
                high = middle
        return low

    def _begins_inside(self, prompt_token_ids: Sequence[int]) -> bool:
        """Whether the prompt opens a thought that the response goes on with."""
        prompt_end = self.decode(list(prompt_token_ids)[-_PROMPT_END:])
        return opens_thought(prompt_end, self.marks)

    def _marked(self, full: str, spans: list[Span]) -> str:
        text, end = "", 0
        for span in spans:
            text += self._plain(full[end : span.start])
            text += OPENING + self._plain(full[span.inner_start : span.inner_end]) + (CLOSING if span.closed else "")
            end = span.end
        return text + self._plain(full[end:])

    def _plain(self, text: str) -> str:
        """Without special tokens but for marks."""
        for token in self.special:
            if not thought_spans(token, self.marks):
                text = text.replace(token, "")
        return text


def thought_reader(tokenizer: Any, marks: Marks = ()) -> ThoughtReader:
    """A reader for a model's tokenizer; `marks` are those of the configuration."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)} - {""}
    all_marks = (*marks, *template_marks(tokenizer))
    literals = "".join(mark for pair in all_marks for mark in pair) + "<|channel|><|message|>"
    hidden = any(thought_spans(token, all_marks) or token in literals for token in special)
    return ThoughtReader(tokenizer, all_marks, tuple(sorted(special, key=len, reverse=True)), hidden)


def template_marks(tokenizer: Any) -> Marks:
    """The marks that a chat template writes around the thoughts of a message, where they are none of the known ones."""
    thought, answer = _PROBES
    # The names and their order in which transformers gives thoughts to templates, some of which print whole messages.
    message = {"thinking": thought, "role": "assistant", "content": answer, "reasoning_content": thought}
    try:
        text = render_turns(tokenizer, [{"role": "user", "content": "?"}, message])
    except TemplateTooCostly:
        raise
    except Exception:  # a tokenizer with means of its own is a program, and may refuse what it does not know
        return ()
    before, found, after = text.partition(thought)
    between, answered, _ = after.partition(answer)
    opening = re.search(rf"({_TAG})\s*\Z", before[-200:])
    closing = re.match(rf"\s*({_TAG})", between)
    if not (found and answered and opening and closing):
        return ()
    known = split_thoughts(f"{before[-200:]}{thought}{between}{answer}")
    if thought in known.thought and known.answer.endswith(answer):
        return ()
    return ((opening[1], closing[1]),)
