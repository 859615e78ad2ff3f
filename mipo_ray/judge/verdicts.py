"""Reading a judge's verdict from what it wrote. Plain functions; what cannot be read is None and never guessed at."""

from __future__ import annotations

import re

from mipo_ray.text.thoughts import answer_of

# The judge's words -> what they stand for. A and B are the answers in the order in which the judge saw them.
_PAIRWISE = {"a": "first", "b": "second", "tie": "tie", "draw": "tie", "equal": "tie"}

# Markdown, quotes, brackets and the LaTeX box around a label or a verdict.
_ORNAMENT = re.compile(r"\\boxed|\\text(?:bf)?|[*_`#>\[\](){}<>\"'\u2018-\u201d$]")
_LABELLED = re.compile(
    r"(?:my |the |final |overall )*(?:verdict|rating|score)\s*(?:is\b)?\s*[:=\-\u2013\u2014]?\s*(?P<value>.*)\Z",
    re.IGNORECASE,
)
_ANSWER = re.compile(r"(?:(?:answer|response|assistant|option)\s+)?(?P<word>[a-z]+)(?:\s+(?:is better|wins))?", re.I)
_RATING = re.compile(r"(?P<number>[1-5])(?:\.0+)?(?:\s*(?:/|out of|of)\s*5(?:\.0+)?)?(?:\s*(?:points?|stars?))?", re.I)


def pairwise_verdict(text: str) -> str | None:
    """ "first", "second" or "tie"; None where the judgement holds no verdict that can be read.

    The last line that begins with "Verdict" counts ("Verdict: A", "**Final verdict:** [[B]]", "verdict = tie"), or the
    last line of all, where it holds a verdict and nothing else ("B", "[[tie]]"). A line that names both answers or says
    anything else beside the verdict is not read.
    """
    value = _final_value(text)
    if value is None or not (match := _ANSWER.fullmatch(value)):
        return None
    return _PAIRWISE.get(match["word"].lower())


def pointwise_rating(text: str) -> int | None:
    """1 to 5; None where the judgement holds no whole number of these that can be read.

    Found as `pairwise_verdict` finds a verdict, after "Rating" ("Rating: 4", "**Rating:** 4/5", "Score: 4 out of 5").
    """
    value = _final_value(text)
    if value is None or not (match := _RATING.fullmatch(value)):
        return None
    return int(match["number"])


def _final_value(text: str) -> str | None:
    """What follows the label in the last labelled line, or else the whole last line; None of an empty text.

    What a reasoning model thought before it spoke is not read.
    """
    lines = [line for line in map(_plain, answer_of(text).splitlines()) if line]
    for position in range(len(lines) - 1, -1, -1):
        if match := _LABELLED.fullmatch(lines[position]):
            # "Verdict:" may be a heading, with the verdict in the line below it.
            return match["value"] or (lines[position + 1] if position + 1 < len(lines) else None)
    return lines[-1] if lines else None


def _plain(line: str) -> str:
    return _ORNAMENT.sub("", line).strip().strip(".!:;,").strip()
