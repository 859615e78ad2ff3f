"""A response that ran into the length limit, cut back to its last whole sentence: a prefix of the sampled ids, without
an end token, and the log-prob of that prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mipo_ray.generation.thinking import ThoughtReader
from mipo_ray.text.sentences import whole_sentence_ends

_MOST_BYTES = 4  # of a character in UTF-8


def whole_tokens(reader: ThoughtReader, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> int | None:
    """How many tokens of a response that the limit cut its whole sentences take; None where it has no whole one.

    token_ids: as sampled, [tokens]. The prefix consists of whole tokens: a sentence's end inside a token that also
    holds the beginning of the next one (". The") cannot be had, and the sentence before it is the last one. White space
    in the token of the stop stays. Thoughts are no sentences of the answer: they stay in front of it as they are, and a
    response that was cut inside them, or that has no whole sentence behind them, has none.
    """
    ids = list(token_ids)
    text = reader.decode(ids)
    spans = reader.spans(prompt_token_ids, text)
    if spans and not spans[-1].closed:
        return None
    begin = spans[-1].end if spans else 0
    for end in reversed(whole_sentence_ends(text[begin:])):
        first = reader.tokens_of(ids, begin + end)
        # The token of the stop may reach beyond it; and a character may be bytes of several tokens, which decode to one
        # character that stands for them until the last one is there.
        for count in range(first, min(first + _MOST_BYTES, len(ids) + 1)):
            if reader.decode(ids[:count]).rstrip() == text[: begin + end]:
                return count
    return None


def logprob_of(token_ids: Sequence[int], logprobs: Sequence[Any]) -> float:
    """The sum of the sampler's log-probs of `token_ids`, in nats.

    logprobs: for each sampled token, of which there may be more, vLLM's candidates by id, the sampled one among them.
    """
    return float(sum(candidates[token].logprob for token, candidates in zip(token_ids, logprobs, strict=False)))
