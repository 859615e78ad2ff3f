"""Sampled responses with their thoughts marked, as tokenizers and chat templates hide them.

python -m pytest tests/unit/generation/test_thinking.py
"""

from __future__ import annotations

from typing import Any

import pytest

from mipo_ray.generation.thinking import template_marks, thought_reader
from mipo_ray.text.thoughts import split_thoughts
from tests.helpers.tiny_model import CHAT_TEMPLATE, END, START, make_tokenizer

HARMONY = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>")


def tokenizer_of(*, special: tuple[str, ...] = (), added: tuple[str, ...] = (), template: str = CHAT_TEMPLATE) -> Any:
    tokenizer = make_tokenizer(chat_template=True)
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.add_tokens(list(added))
    tokenizer.chat_template = template
    return tokenizer


def read(tokenizer: Any, written: str, *, marks: Any = (), end: str = END) -> tuple[str, int]:
    """What the sampler says of a response `written` with all its special tokens, to a prompt of the template."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "How many pens?"}], add_generation_prompt=True)
    prompt_ids = prompt if isinstance(prompt, list) else prompt["input_ids"]
    token_ids = tokenizer(written + end, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.decode(token_ids[: -1 if end else None], skip_special_tokens=True)
    return thought_reader(tokenizer, marks).read(prompt_ids, token_ids, decoded, stopped=bool(end))


def count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_without_thoughts_nothing_changes() -> None:
    for tokenizer in (tokenizer_of(), tokenizer_of(special=HARMONY), tokenizer_of(added=("<think>", "</think>"))):
        for text in ("Ten pens.", " <b>ten</b>\n", "Write `<think>` first.", ""):
            assert read(tokenizer, text) == (text, count(tokenizer, text) + 1)


@pytest.mark.parametrize(
    ("options", "written", "marks"),
    [
        ({}, "<think>\nTwelve?\n</think>\n\nTen pens.", ()),
        ({"added": ("<think>", "</think>")}, "<think>\nTwelve?\n</think>\n\nTen pens.", ()),
        ({"special": ("<think>", "</think>")}, "<think>\nTwelve?\n</think>\n\nTen pens.", ()),
        ({"special": ("[THINK]", "[/THINK]")}, "[THINK]Twelve?[/THINK]Ten pens.", ()),
        ({"special": ("<cot>", "</cot>")}, "<cot>Twelve?</cot>Ten pens.", (("<cot>", "</cot>"),)),
        ({}, "Here is my thought: Twelve? Here is my response:Ten pens.",
         (("Here is my thought:", "Here is my response:"),)),
        ({"special": HARMONY},
         "<|channel|>analysis<|message|>Twelve?<|end|><|start|>assistant<|channel|>final<|message|>Ten pens.", ()),
    ],
)  # fmt: skip
def test_marks_are_found_wherever_the_tokenizer_keeps_them(options: Any, written: str, marks: Any) -> None:
    tokenizer = tokenizer_of(**options)
    text, answer_tokens = read(tokenizer, written, marks=marks)
    found = split_thoughts(text)
    assert (found.answer, found.closed) == ("Ten pens.", True)
    assert "Twelve?" in found.thought
    assert 0 <= answer_tokens - count(tokenizer, "Ten pens.") - 1 <= 2  # and the space before it
    if not marks and not options.get("special"):
        assert text == written
    cut = written[: written.index("Twelve") + 4]
    assert read(tokenizer, cut, marks=marks, end="")[1] == 0
    assert split_thoughts(read(tokenizer, cut, marks=marks, end="")[0]).closed is False


@pytest.mark.parametrize("opening", ["<think>", "<think>\n", "[THINK]", "<cot>\n"])
def test_a_thought_that_the_prompt_opens(opening: str) -> None:
    template = CHAT_TEMPLATE.replace("assistant\n'", f"assistant\n{opening}'".replace("\n", "\\n"))
    mark = opening.strip()
    marks = (("<cot>", "</cot>"),)
    tokenizer = tokenizer_of(template=template, special=(mark,))
    closing = f"{mark[0]}/{mark[1:]}"
    text, answer_tokens = read(tokenizer, f"The answer is 12?{closing}\n\nTen.", marks=marks)
    assert split_thoughts(text).answer == "Ten."
    assert answer_tokens == count(tokenizer, "\n\nTen.") + 1
    text, answer_tokens = read(tokenizer, "The answer is 12", marks=marks, end="")
    assert split_thoughts(text).closed is False
    assert answer_tokens == 0
    closed = tokenizer_of(template=template.replace(mark, f"{mark}{closing}"), special=(mark,))
    assert read(closed, "The answer is 12", marks=marks) == ("The answer is 12", count(closed, "The answer is 12") + 1)


@pytest.mark.parametrize("field", ["reasoning_content", "thinking"])
def test_marks_of_the_chat_template(field: str) -> None:
    def template(opening: str, closing: str) -> str:
        thought = f"{{% if message.{field} %}}{opening}\n{{{{ message.{field} }}}}\n{closing}\n{{% endif %}}"
        return (
            "{% for message in messages %}<|im_start|>{{ message.role }}\n" + thought
            + "{{ message.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )  # fmt: skip

    assert template_marks(tokenizer_of()) == ()
    assert template_marks(tokenizer_of(template=template("<think>", "</think>"))) == ()  # known
    assert template_marks(tokenizer_of(template="{{ raise_exception('only users') }}")) == ()
    own = tokenizer_of(template=template("<musing>", "</musing>"))
    assert template_marks(own) == (("<musing>", "</musing>"),)
    text, _ = read(own, "<musing>Twelve?</musing>Ten.")
    assert split_thoughts(text).answer == "Ten."
    assert START not in text
