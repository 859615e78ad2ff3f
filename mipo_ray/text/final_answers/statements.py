r"""How a response announces its final answer, in words that the readers of choices and of numbers share."""

from __future__ import annotations

import re

from mipo_ray.text.thoughts import answer_of

# The word "answer", also in the languages that multilingual models fall into.
_ANSWER_WORDS = (
    *("answers?", "ans", "respuesta", "resposta", r"r\u00e9ponse", "risposta", "antwort", "antwoord", "svar(?:et)?"),
    *(r"vastaus(?:\son)?", r"odpov\u011b\u010f(?:\sje)?", r"odpowied\u017a(?:\sto)?", r"v\u00e1lasz"),
    *(r"r\u0103spuns(?:ul)?", "cevap", r"yan\u0131t", r"do\u011fru\s(?:se\u00e7enek|\u015f\u0131k)", "jawaban(?:nya)?"),
    *(r"\u0111\u00e1p \u00e1n", r"c\u00e2u tr\u1ea3 l\u1eddi"),  # Vietnamese
    *(
        r"\u043e\u0442\u0432\u0435\u0442",
        r"\u0432\u0456\u0434\u043f\u043e\u0432\u0456\u0434\u044c",
    ),  # Russian, Ukrainian
    r"\u03b1\u03c0\u03ac\u03bd\u03c4\u03b7\u03c3\u03b7",  # Greek
)
# Of scripts in which a word has no boundary that \b knows, with the particle or the "is" that belongs to it.
_ANSWER_SIGNS = (
    *(r"\u7b54\u6848", r"\u6b63[\u786e\u78ba][\u9009\u9078][\u9879\u9805]"),  # Chinese: answer, right option
    *(r"\u7b54\u3048", r"\u6b63\u89e3", r"\u6b63\u7b54", r"\u6b63\u3057\u3044\u9078\u629e\u80a2"),  # Japanese
    r"(?:\uc815\ub2f5|(?<![\uac00-\ud7af])\ub2f5(?=[\uc740\uc774:\s]))[\uc740\uc774]?",  # Korean
    r"\u0627\u0644(?:\u0625\u062c\u0627\u0628\u0629|\u0627\u062c\u0627\u0628\u0629|\u062c\u0648\u0627\u0628"  # Arabic
    r"|\u062e\u064a\u0627\u0631|\u0627\u062e\u062a\u064a\u0627\u0631)"
    r"(?:\s\u0627\u0644\u0635\u062d\u064a\u062d\u0629?)?(?:\s\u0647[\u064a\u0648])?",
    r"(?:\u067e\u0627\u0633\u062e|\u062c\u0648\u0627\u0628)(?:\s\u062f\u0631\u0633\u062a|\s\u0635\u062d\u06cc\u062d)?",
    r"\u05ea\u05e9\u05d5\u05d1\u05d4(?:\s\u05d4\u05e0\u05db\u05d5\u05e0\u05d4)?(?:\s\u05d4\u05d9\u05d0)?",  # Hebrew
    *(r"\u0909\u0924\u094d\u0924\u0930", r"\u091c\u0935\u093e\u092c"),  # Hindi
    r"\u0938\u0939\u0940\s\u0935\u093f\u0915\u0932\u094d\u092a",
    r"\u0e04\u0e33\u0e15\u0e2d\u0e1a(?:\u0e17\u0e35\u0e48\u0e16\u0e39\u0e01\u0e15\u0e49\u0e2d\u0e07)?"  # Thai
    r"(?:\u0e04\u0e37\u0e2d)?",
    r"\u0e15\u0e2d\u0e1a\s?\u0e02\u0e49\u0e2d",
)
ANSWER = rf"(?:\b(?:{'|'.join(_ANSWER_WORDS)})\b|{'|'.join(_ANSWER_SIGNS)})"
# What links it with the answer itself.
IS = (
    r"(?:\b(?:is|are|was|were|be|equals|becomes|es|est|ist|lautet|\u00e8|\u00e9|\u00e4r|l\u00e0|adalah|\u03b5\u03af\u03bd\u03b1\u03b9)\b"
    r"|[:=\uff1a\u2192]|->|\u662f|\u4e3a|\u70ba|\u306f)"
)
END_OF_SENTENCE = re.compile(r"(?:(?<!i\.e)(?<!e\.g)\.|[!?])(?:\s|\Z)|[\u3002\u0964\uff01\uff1f]|\n")
# A number that only begins an expression: "3 + 4", "20% of 50".
OPERATOR = re.compile(
    r"%?\s?(?:\\times|\\cdot|\\div|[-+*/x\u00d7\u00f7\u00b7^])\s?\\?[$(]?\d|%\sof\s\\?[$]?\d"
    r"|\s(?:times|plus|minus|multiplied by|divided by|(?:more|less|fewer) than)\s\\?[$]?\d"
)

# Scripts whose words stand beside Latin letters and digits without a space, or are no Latin word at all.
_OTHER_SCRIPT = r"\u0590-\u06ff\u0900-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_JOINT = re.compile(rf"(?<=[A-Za-z0-9])(?=[{_OTHER_SCRIPT}])|(?<=[{_OTHER_SCRIPT}])(?=[A-Za-z0-9])")
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
IN_OTHER_SCRIPT = re.compile(rf"\s*[{_OTHER_SCRIPT}]")

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


def with_letters_apart(text: str) -> str:
    """`text` with full-width signs as ASCII, and Latin letters and digits apart from the words of other scripts."""
    return text if text.isascii() else _JOINT.sub(" ", text.translate(_FULL_WIDTH))
