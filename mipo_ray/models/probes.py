"""Probe sequences: fixed token ids whose log-probs tell one set of weights from another.

The trainer stores the log-probs of these sequences beside the policy that it exports; an engine that says it holds that
policy must give the same ones. They are no text, so that every token is a surprise and every weight has its say.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PROBES = 4
PROMPT_TOKENS = 16
RESPONSE_TOKENS = 16
_SEED = 0


@dataclass(frozen=True)
class Probe:
    """Token ids of a prompt [PROMPT_TOKENS] and of a response to it [RESPONSE_TOKENS], int64."""

    prompt: np.ndarray
    response: np.ndarray


def probes(vocabulary: int) -> list[Probe]:
    """The probes of a model with so many tokens in its vocabulary; the same in every process and version."""
    # PCG64's own stream of integers: numpy keeps it, where it may change the methods of its Generator.
    ids = np.random.PCG64(_SEED).random_raw(PROBES * (PROMPT_TOKENS + RESPONSE_TOKENS)) % vocabulary
    rows = ids.astype(np.int64).reshape(PROBES, -1)
    return [Probe(row[:PROMPT_TOKENS], row[PROMPT_TOKENS:]) for row in rows]
