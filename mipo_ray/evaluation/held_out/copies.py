"""Which tokens of a response copy its prompt: those of the word n-grams that `copy_rate` counts.

Text becomes no tokens here: the sampled ids are decoded, and each span of copied text is looked up in what their
beginnings decode to.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from mipo_ray.config.schema import Config
from mipo_ray.generation.rendering import load_tokenizer
from mipo_ray.text.statistics import copied_spans

_UNFINISHED = re.compile("\ufffd+$")
COPIED_TOKENS = ("copied_tokens", pa.list_(pa.bool_()))


def mark_copies(block: pa.Table, *, config: Config) -> pa.Table:
    """A block of responses with COPIED_TOKENS, of answers alone: whether each token of the response copies its source,
    thoughts included, as log-probs are of the whole response."""
    tokenizer = load_tokenizer(config.model.source, config.model.trust_remote_code)
    rows = block.select(["kind", "response_token_ids", "source"]).to_pylist()
    copied = [
        copied_tokens(tokenizer, row["response_token_ids"], row["source"]) if row["kind"] == "answer" else None
        for row in rows
    ]
    name, kind = COPIED_TOKENS
    return block.set_column(block.column_names.index(name), name, pa.array(copied, kind))


def copied_tokens(tokenizer: Any, token_ids: Sequence[int], source: str) -> list[bool]:
    """Of each token, whether it is part of a word n-gram of the response that the source has too, [tokens].

    A token counts as copied where a part of it does: the space before a word, which is one token with it, and the
    punctuation between two copied words. Special tokens have no text and copy nothing.
    """
    ids = list(token_ids)

    def begun(count: int) -> str:
        text = str(tokenizer.decode(ids[:count], skip_special_tokens=True))
        # Bytes of a character that is not whole yet are one replacement for all of them, or for some tokenizers each.
        return _UNFINISHED.sub("\ufffd", text)

    text, counts = begun(len(ids)), range(len(ids) + 1)
    copied = [False] * len(ids)
    for start, end in copied_spans(text, source):
        # The token that reaches beyond the start, and the one with which everything up to the end is there: a character
        # may be bytes of several tokens, which decode to another one until the last of them is there.
        first = bisect_left(counts, True, key=lambda count: len(begun(count)) > start) - 1
        behind = bisect_left(counts, True, key=lambda count: begun(count)[:end] == text[:end])
        copied[first:behind] = [True] * (behind - first)
    return copied
