"""Which tokens copy: spans of copied words, looked up in the tokens that were sampled.

python -m pytest tests/unit/evaluation/held_out/test_copies.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.config.recipe import load_config
from mipo_ray.evaluation.held_out.copies import copied_tokens, mark_copies
from mipo_ray.evaluation.held_out.stage import RESPONSE_SCHEMA
from mipo_ray.generation.rendering import load_tokenizer
from mipo_ray.text.statistics import copied_spans
from tests.helpers.tiny_model import END, make_tiny_model

CONTEXT = "My name is Ada, and I like to play the violin in the evening."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return load_tokenizer(str(model))


def said(tokenizer: Any, ids: list[int], copied: list[bool]) -> list[str]:
    """The text of each run of copied tokens."""
    runs: list[list[int]] = []
    for place, (token, is_copied) in enumerate(zip(ids, copied, strict=True)):
        if is_copied:
            if not place or not copied[place - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def test_copied_words_with_the_spaces_that_are_one_token_with_them(tokenizer: Any) -> None:
    text = "Well, I LIKE to play the drums. In the evening? My name is... Bob."
    ids = tokenizer(text + END)["input_ids"]
    assert "".join(said(tokenizer, ids, [True] * len(ids))) == text + END
    copied = said(tokenizer, ids, copied_tokens(tokenizer, ids, CONTEXT))
    assert [run.strip() for run in copied] == ["I LIKE to play the", "In the evening", "My name is"]


def test_a_response_of_few_words_is_one_whole_copy_or_none(tokenizer: Any) -> None:
    for text, expected in (("the violin", True), ("violin the", False), ("", False)):
        ids = tokenizer(text)["input_ids"]
        assert copied_tokens(tokenizer, ids, CONTEXT) == [expected] * len(ids)


PIECES = ["I like to", " play the violin", "name", ". ", " and ", "\u1e9e"]
PIECES += ["\u00e9t\u00e9 \U0001f3bb", " \u6211\u559c\u6b22\u8336"]  # several bytes a character, several tokens
pieces = st.lists(st.sampled_from(PIECES), max_size=9).map("".join)


@settings(deadline=None)
@given(pieces, pieces)
def test_tokens_are_those_whose_text_touches_a_copied_span(tokenizer: Any, text: str, source: str) -> None:
    ids = tokenizer(text)["input_ids"]
    copied = copied_tokens(tokenizer, ids, source)
    # Every token of this tokenizer is some bytes of the text.
    sizes = [len(tokenizer.convert_ids_to_tokens(token)) for token in ids]
    assert sum(sizes) == len(text.encode())
    start, expected = 0, []
    spans = [tuple(len(text[:end].encode()) for end in span) for span in copied_spans(text, source)]
    for size in sizes:
        expected.append(any(start < high and low < start + size for low, high in spans))
        start += size
    assert copied == expected


def test_answers_alone_are_looked_at(model: Path, tokenizer: Any) -> None:
    ids = tokenizer("I like to sing.")["input_ids"]
    rows = [
        {"prompt_id": "a", "kind": kind, "source": CONTEXT, "response_token_ids": ids, "tokens": len(ids)}
        for kind in ("answer", "rejected", "matrix_prompts", "answer")
    ]
    block = pa.Table.from_pylist(rows, schema=RESPONSE_SCHEMA)
    marked = mark_copies(block, config=load_config(None, [f"model.path={model}"]))
    assert marked.schema == RESPONSE_SCHEMA
    first, *others = marked["copied_tokens"].to_pylist()
    assert first == copied_tokens(tokenizer, ids, CONTEXT)
    assert any(first)
    assert others == [None, None, first]
