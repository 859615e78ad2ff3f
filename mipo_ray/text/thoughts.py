"""What a model thinks before it answers, kept apart from the answer: the one place that does so.

Thoughts stand between marks: `<think>` and `</think>`, `[THINK]`, `<|begin_of_thought|>`, the channels of gpt-oss, and
others of these shapes. A model with other marks names them (`model.thought_marks`); the sampler then writes its
responses with `<think>` and `</think>` in their place, so that a response that was written needs nothing but its text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

OPENING, CLOSING = "<think>", "</think>"  # as the text of a response has them, whatever the model's own are

Marks = Sequence[tuple[str, str]]  # opening and closing, beside those that are known

# gpt-oss: whatever stands in other channels than the final one is no answer.
_CHANNELS: Marks = tuple(
    (f"<|channel|>{name}<|message|>", "<|channel|>final<|message|>") for name in ("analysis", "commentary")
)
_BRACKETED = re.compile(
    r"(?P<left><\|?|<\uff5c|\u25c1|\[)(?P<slash>/?)(?P<body>[A-Za-z][\w:\u2581-]{2,39})(?:\|?>|\uff5c>|\u25b7|\])"
)
_NAME = re.compile(
    r"(?:\w{1,20}:)?(?P<begin>(?:begin|start)_(?:of_)?)?(?P<end>end_(?:of_)?)?(?:inner_|chain_of_)?"
    r"(?P<stem>think|thought|reasoning|reflection|scratchpad|monologue)(?:ing|s)?(?:_(?:begin|start)|(?P<ends>_end))?"
)
_QUOTES = {"`": "`", '"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019"}


@dataclass(frozen=True)
class Answer:
    """A response taken apart: what was thought, what was answered, and whether the thoughts came to an end.

    A response without thoughts is its answer, to the last character. One that was cut inside a thought has none: "".
    """

    thought: str
    answer: str
    closed: bool


@dataclass(frozen=True)
class Span:
    """One thought in a text: text[start:end] with its marks, text[inner_start:inner_end] without them.

    closed: whether its closing mark is there.
    """

    start: int
    inner_start: int
    inner_end: int
    end: int
    closed: bool


@dataclass(frozen=True)
class _Mark:
    start: int
    end: int
    kind: str  # an opening mark is closed by one of the same kind
    closes: bool


def split_thoughts(text: str, marks: Marks = (), *, begins_inside: bool = False) -> Answer:
    """A response as thoughts and answer.

    marks: opening and closing marks beside the known ones. begins_inside: whether the prompt opened the thought. A
    closing mark that nothing opened says so too: all before it was thought. Marks in quotes or backticks are talked
    about and are none.
    """
    spans = thought_spans(text, marks, begins_inside=begins_inside)
    if not spans:
        return Answer("", text, True)
    thought = "\n".join(text[span.inner_start : span.inner_end].strip() for span in spans)
    if not spans[-1].closed:
        return Answer(thought, "", False)
    starts = [0, *(span.end for span in spans)]
    ends = [*(span.start for span in spans), len(text)]
    pieces = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    return Answer(thought, "".join(pieces).strip(), True)


def answer_of(text: str) -> str:
    """What a written response answers; "" where it was cut inside a thought, or nothing follows its thoughts."""
    return split_thoughts(text).answer


def thought_spans(text: str, marks: Marks = (), *, begins_inside: bool = False) -> list[Span]:
    """The thoughts of a text in order; only the last one may be without an end. See `split_thoughts`."""
    spans: list[Span] = []
    opened = _Mark(0, 0, "", False) if begins_inside else None
    for mark in _marks(text, marks):
        if not mark.closes:
            opened = opened or mark
        elif opened is None:
            spans = [Span(0, 0, mark.start, mark.end, True)]
        elif opened.kind in (mark.kind, ""):
            spans.append(Span(opened.start, opened.end, mark.start, mark.end, True))
            opened = None
    if opened is not None:
        spans.append(Span(opened.start, opened.end, len(text), len(text), False))
    return spans


def opens_thought(prompt: str, marks: Marks = ()) -> bool:
    """Whether a prompt ends with an opening mark, so that what is sampled begins inside a thought."""
    last = next(reversed(list(_marks(prompt, marks))), None)
    return last is not None and not last.closes and not prompt[last.end :].strip()


def _marks(text: str, marks: Marks) -> Iterator[_Mark]:
    found = [*_known(text), *_literal(text, (*_CHANNELS, *marks))]
    end = 0
    for mark in sorted(found, key=lambda mark: (mark.start, -mark.end)):
        if mark.start >= end and not _is_quoted(text, mark):
            end = mark.end
            yield mark


def _known(text: str) -> Iterator[_Mark]:
    for found in _BRACKETED.finditer(text):
        if found["left"] == "[" and not found["body"].isupper():
            continue  # [thinking] is a stage direction
        name = _NAME.fullmatch(found["body"].lower().replace("\u2581", "_").replace("-", "_"))
        if name and not (name["begin"] and (name["end"] or found["slash"])):
            closes = bool(found["slash"] or name["end"] or name["ends"])
            yield _Mark(found.start(), found.end(), f"{found['left']}{name['stem']}", closes)


def _literal(text: str, marks: Marks) -> Iterator[_Mark]:
    for opening, closing in marks:
        for mark, closes in ((opening, False), (closing, True)):
            for found in re.finditer(re.escape(mark), text):
                yield _Mark(found.start(), found.end(), closing, closes)


def _is_quoted(text: str, mark: _Mark) -> bool:
    before, after = text[max(0, mark.start - 1) : mark.start], text[mark.end : mark.end + 1]
    return bool(before) and _QUOTES.get(before) == after
