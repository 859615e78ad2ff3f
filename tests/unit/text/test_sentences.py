"""Sentences of ugly texts, split by hand; leaving one out loses that sentence and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.text.sentences import (
    informative_sentences,
    sentence_spans,
    whole_sentence_ends,
    without_sentence,
)


def sentences(text: str) -> list[str]:
    return [text[start:end] for start, end in sentence_spans(text)]


# A bar marks each border between two sentences; the white space before it belongs to the text.
@pytest.mark.parametrize(
    "marked",
    [
        "",
        "One sentence",
        "It rains. |It pours.",
        "Tom has 3.14 litres. |He drinks 0.5 of them. |How much is left?",
        "Weng earns $12 an hour. |Yesterday, she did 50 minutes. |How much did she earn?",
        "A pack costs $1.50. |If there is 10% off, what is $.5 of it? |3 friends pay.",
        "Dan has $ 3 . |If he had $ 4 at the start , how much did he spend ?",
        "He ate 5. |She ate 2. |How many are left?",
        "Dr. Smith met Mrs. Jones vs. Mr. Brown. |They left.",
        "Eat fruit, e.g. apples, i.e. Malus. |Then rest.",
        "The U.S. Army moved. |It came from the U.S. The end.".replace("U.S. The", "U.S. |The"),
        "No. 5 is alive. |Is it? |No. |It is Fig. 2 on p. 7.",
        "The shop opens at 9 a.m. and closes at 5 p.m. |She left at 6 p.m. sharp.",
        "J. R. Smith and John F. Kennedy met. |They talked.",
        "Use Plan B. |Machine A. |Machine B follows. |Vitamin C. |Oranges have it.",
        "So do I. |We all do.",
        "He works at Acme Inc. in Ohio and Foo Ltd. |He likes it.",
        "We need apples, pears, etc. for pie. |Bring flour, salt, etc. |Thanks!",
        "It is 20 ft. long. |It weighs 3 lbs. |How long is half of it?",
        "She was born on Jan. 5 in St. Louis. |He was not.",
        "Wait... what? |I do not know... |Maybe.",
        "Hmm\u2026 yes. |Well . . . no.",
        'He said "Stop." |Then he left.',
        '"Stop!" he said. |"Why?" |She ran.',
        "(It was late.) |We went home (by bus, i.e. slowly).",
        "**Stop.** |Then *go!* |Now.",
        "What?! |Really?? |Yes!!! |OK",
        "Stop! |then go. |i like tea. |what now? |tell me",
        "See example.com or mail a.b@c.org about v1.2.3 of file.txt. |Then reply.",
        "Go to https://a.org/x?q=1.2. |Read it.",
        "node.js is fast.No space here",
        "Great! |:) Thanks. ???",
        "... Then he left.",
        "?!",
        "Line one goes\non here. |Line two ends.\n|Line three",
        "No stop here\n\n|New paragraph\n \n\t\n|Third",
        "Dr.\nSmith came.\r\n|He left.\u2028|I stayed.",
        "Buy:\n|- milk. Fresh milk.\n|- bread\n|* eggs\n|\u2022 tea",
        "Steps:\n|1. Mix it. Well.\n|2. Bake 3.5 min.\n|10) Eat\n|Then rest.",
        "Steps: 1. Mix. |2. Bake. |3. Eat.",
        "List\n|- a long\n  item\n|  - nested\n|After it. |Done",
        "# Title\n|Some text\n|## Part 2\n|More",
        "Which one is it?\n|a) fog\n|b) rain\n|Answer:",
        "Which one is it?\n|A. fog\n|B. rain\n|C. dry air. Really dry.",
        "Which one is it?\n|(A) fog\n|(B) rain",
        "Which one is it?\n|A: fog\n|B: rain",
        "Which season is wet? |A) summer B) winter",
        "A. Smith wrote it. |Nobody read it.",
        "I am a baker in a rainy town, I cannot eat dairy. |What should I cook?",
        "I live in Rome (Italy)! |My dog is old. |Suggest a walk, please.",
        "Rate from 1-10. |7 is good.",
        "Use -5 or +3. |-1 is too low.",
        "Q: Who is it?\nA: It is me.".replace("?\nA", "?\n|A"),
        "def f(x):\n    return x.y\n\n|What does it do?",
        "\u4f60\u597d\u3002|\u6211\u662f\u8c01\uff1f|3.5\u5143\uff01|\u597d",
        "\u4ed6\u8bf4\uff1a\u201c\u597d\u3002\u201d\u7136\u540e\u8d70\u4e86\u3002|\u518d\u89c1",
        "\u092f\u0939 \u0939\u0948\u0964 |\u0935\u0939 \u0939\u0948\u0964",
        "¿Qué hora es? |Son las 5. |¡Vamos!",
        "Hello! |😀 is a smile. 😀",
    ],
)
def test_sentences(marked: str) -> None:
    assert sentences(marked.replace("|", "")) == [part.strip() for part in marked.split("|") if part]


@pytest.mark.parametrize(
    ("text", "index", "expected"),
    [
        ("One. Two. Three.", 0, "Two. Three."),
        ("One. Two.  Three.", 1, "One.  Three."),
        ("One. Two. Three.\n", 2, "One. Two."),
        ("Only one.", 0, ""),
        ("One. Two.\n\nThree.", 1, "One.\n\nThree."),
        ("One.\n\nTwo. Three.", 1, "One.\n\nThree."),
        ("Buy:\n- milk\n- eggs\n\nThanks.", 2, "Buy:\n- milk\n\nThanks."),
        ("Buy:\n- milk\n- eggs", 1, "Buy:\n- eggs"),
        ("Buy:\n\n  - milk\n- eggs", 1, "Buy:\n\n- eggs"),
        ("- a\n  - b\n- c", 1, "- a\n- c"),
        ("Which?\nA) fog\nB) rain", 1, "Which?\nB) rain"),
        ("\u597d\u3002\u8d70\u3002\u6765\u3002", 1, "\u597d\u3002\u6765\u3002"),
    ],
)
def test_without_sentence(text: str, index: int, expected: str) -> None:
    assert without_sentence(text, index) == expected


@pytest.mark.parametrize(("text", "index"), [("", 0), ("One. Two.", 2), ("One. Two.", -1)])
def test_without_sentence_refuses_other_indexes(text: str, index: int) -> None:
    with pytest.raises(IndexError, match=f"found {index}"):
        without_sentence(text, index)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I am a baker in a rainy town, I cannot eat dairy. What should I cook?", [0]),
        ("Hello! Please help me. Thanks a lot! Good morning.", []),
        ("Tom has 3. Is it so? How many cows graze?", [0, 2]),
        ("Buy:\n1. Thanks\n2. fresh milk\n3) 5", [2, 3]),
        ("I don't know. We've been there. Don't eat nuts.", [2]),
        ("My name is Ann. I live in Rome.", [0, 1]),
        ("--- !!!", []),
        ("\u4f60\u597d\u3002\u6211\u4f4f\u5728\u7f57\u9a6c\u57ce\u91cc\u3002", [1]),
        ("\u662f3\u3002", [0]),
    ],
)
def test_informative_sentences(text: str, expected: list[int]) -> None:
    assert informative_sentences(text) == expected


# A bar marks each place behind which a text that was cut at its end could have ended whole.
@pytest.mark.parametrize(
    "marked",
    [
        "",
        "no stop at all",
        "It rains.| It pou",
        "It rains.| It pours.|",
        "It rains.| It pours.|\n\n",
        'He said "Stop."| Then he ra',
        '"Why?"|',
        "**Bold and whole.**| Then",
        "I saw Dr. Smith.| He met Dr.",
        "It costs 3.50.| It costs 3.",
        "Is it 3?|",
        "Well...| I do not know...",
        "Well\u2026",
        "We eat apples, pears, etc.",
        "Go to example.com.| Or to example",
        "Here are three:\n\n1. Mi",
        "Here are three:\n\n1. Milk|\n2. Eggs|\n3. Br",
        "Here:\n- Milk is white. |It".replace(" |", "| "),
        "Here:\n- Milk is white.|\n- Eg",
        "# A heading\n\nIt rains.| The",
        "It rains.|\n\n## Another one\n\nThe",
        "It rains.|\n\n- Buy this:\n- mi",
        "A line without a stop\n\nIt rains.| And",
        "1. Mix it.| 2. Bake it.| 3.",
        "?!\n\n...",
        "\u597d\u3002|\u8d70\u3002|\u6765",
        "Yes!|",
        "It rains.| \U0001f600",
        "It rains.\U0001f600",
        "It rains.| **",
        "It rains.| - \n",
        "It rains.|\n\n1",
        "He met Dr. **",
        "So it is.)|",
    ],
)
def test_whole_sentence_ends(marked: str) -> None:
    *before, _ = marked.split("|")
    text = marked.replace("|", "")
    ends, at = [], 0
    for part in before:
        at += len(part)
        ends.append(at)
    assert whole_sentence_ends(text) == ends


WORDS = 'Dr.|e.g.|U.S.|3.14|A.|B.|1.|- |a) |# |word|The|p.m.|...|?!|."|).|:|. |! |\u3002|\u4f60|\u2026|\U0001f600'
SPACES = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u2028", "\u3000"]
pieces = st.sampled_from([*WORDS.split("|"), *SPACES])
texts = st.lists(pieces, max_size=30).map("".join) | st.text(max_size=40)


@given(texts)
def test_spans_are_ordered_and_cover_all_but_white_space(text: str) -> None:
    spans = sentence_spans(text)
    outside, at = "", 0
    for start, end in spans:
        assert at <= start < end
        assert text[start:end] == text[start:end].strip()
        outside += text[at:start]
        at = end
    assert not (outside + text[at:]).strip()
    assert set(informative_sentences(text)) <= set(range(len(spans)))


@given(texts)
def test_whole_ends_are_in_order_and_behind_something(text: str) -> None:
    ends = whole_sentence_ends(text)
    assert ends == sorted(set(ends))
    assert all(text[:end].strip() and not text[end - 1].isspace() for end in ends)


@given(texts)
def test_without_sentence_loses_that_sentence_only(text: str) -> None:
    spans = sentence_spans(text)
    for index, (start, end) in enumerate(spans):
        rest = without_sentence(text, index)
        assert "".join(rest.split()) == "".join((text[:start] + text[end:]).split())
        assert rest == rest.strip()
        kept = [text[s:e] for number, (s, e) in enumerate(spans) if number != index]
        at = 0
        for sentence in kept:  # whole and in order
            at = rest.index(sentence, at) + len(sentence)


@pytest.mark.parametrize(
    "unit", [".", ". ", "a. ", "?) ", ")", " ", "\n", "1. ", "- a\n", "A. x\n", "\u3002", ".)", "... "]
)
def test_long_prompts_take_linear_time(unit: str) -> None:
    # A quadratic pattern would run for minutes here and trip the suite's time limit.
    text = unit * (200_000 // len(unit)) + "x"
    assert sentence_spans(text)[-1][1] == len(text)
    informative_sentences(text)
    without_sentence(text, 0)
    whole_sentence_ends(text)
