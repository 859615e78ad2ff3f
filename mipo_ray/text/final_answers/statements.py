r"""How a response announces its final answer, in words that the readers of choices and of numbers share."""

from __future__ import annotations

import re

from mipo_ray.text.thoughts import answer_of

# The word "answer", also in the languages that multilingual models fall into.
ANSWER = r"(?:\b(?:answers?|ans|respuesta|resposta|r\u00e9ponse|risposta|antwort)\b|\u7b54\u6848|\u7b54\u3048)"
# What links it with the answer itself.
IS = (
    r"(?:\b(?:is|are|was|were|be|equals|becomes|es|est|ist|\u00e8|\u00e9)\b|[:=\uff1a\u2192]|->"
    r"|\u662f|\u4e3a|\u70ba|\u306f)"
)
END_OF_SENTENCE = re.compile(r"[.!?\u3002](?:\s|\Z)|\n")
# A number that only begins an expression: "3 + 4", "20% of 50".
OPERATOR = re.compile(r"%?\s?(?:\\times|\\cdot|\\div|[-+*/x\u00d7\u00f7\u00b7^])\s?\\?[$(]?\d|%\sof\s\\?[$]?\d")

_TAG = re.compile(r"</?(?:answer|b|i|u|p|em|strong|span|br|code|li|ul|ol)(?:\s?/)?>")
# Looser than the marks of the readers: whether an answer was given, not which one. "To answer this, ..." gives none.
_ANSWERED = re.compile(
    rf"\#{{4}}|\\boxed|(?<!\bto\s){ANSWER}(?:(?!{ANSWER})[^.!?,;\n]){{0,80}}?{IS}"
    rf"|{ANSWER}(?=[^\w.,;\n]{{0,10}}(?:\d|(?-i:[A-J])\b))",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w")
_NEXT_QUESTION = re.compile(
    r"^[ \t>*#]{0,8}+(?:(?:question|problem|exercise|q|human|user|instruction)\b[ \t]?\#?\d{0,4}[*_]{0,2}\s?:"
    r"|<\|(?:im_start|start_header_id|user)\|>|\[INST\])",
    re.IGNORECASE | re.MULTILINE,
)


def own_answer(text: str) -> str:
    """What `text` answers, up to where the model, its answer given, goes on to write the next question itself.

    Thoughts and HTML tags are left out. Few-shot prompts teach small models to write a next question; what follows it
    answers another one. A question that is restated before an answer was given is no next one.
    """
    text = _TAG.sub(lambda tag: "\nanswer: " if tag[0] == "<answer>" else " ", answer_of(text))
    for answered in _ANSWERED.finditer(text):
        following = _NEXT_QUESTION.search(text, answered.end())
        if following is None:
            break
        if _WORD.search(text, answered.end(), following.start()):  # an answer, not the heading of one
            return text[: following.start()]
    return text
