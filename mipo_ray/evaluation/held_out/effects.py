"""What a policy gained beyond length and verbatim copies: a PMI's change at equal lengths, and without copied words.

A PMI is a sum over a response's tokens, of what each adds to the PMI of those before it: with the PMIs P_t of its
prefixes, d_t = P_t - P_(t-1). So an answer that is cut, or whose copied words are left out, needs no further scoring:
the d_t of the tokens that stay are summed up.

Everything here is pure numpy in float64. Values are by prompt or by response, so that their means get intervals as
those of all held-out measures do; a figure that is no mean (an intercept, a ratio) is given as values whose mean it is
and whose differences from it are its influences, by how much each prompt moves it to first order, times their number
(Hampel 1974, "The influence curve and its role in robust estimation"). The interval of their mean has the variance of
the figure by the delta method, with clusters as any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mipo_ray.evaluation.held_out.mutual_information import leave_one_out_pmi
from mipo_ray.evaluation.intervals import group_means
from mipo_ray.evaluation.significance import item_changes

Array = NDArray[np.float64]
Column = tuple[Sequence[str], Array]  # the prompt of each value, and the values
Kept = NDArray[np.bool_] | slice  # which tokens of a response stay

# Of prompts, for a line with an intercept and a slope to leave anything over.
_FEWEST = 3


@dataclass(frozen=True)
class TokenScores:
    """The log-probs of the tokens of one response by the frozen initial model, nats."""

    own: NDArray[np.floating]  # [tokens], under its own conditioning
    others: NDArray[np.floating]  # [K, tokens], under the K others
    none: NDArray[np.floating] | None  # [tokens], under the question alone; None: it has no context
    copied: NDArray[np.bool_]  # [tokens], whether each is part of a word n-gram of the prompt

    def pmi(self, kept: Kept) -> float:
        """What the tokens that are kept add to the leave-one-out PMI: for a prefix, its PMI."""
        if not len(self.own):
            return 0.0
        prefixes = np.cumsum(self.own, dtype=np.float64), np.cumsum(self.others, axis=1, dtype=np.float64).T
        return float(np.diff(leave_one_out_pmi(*prefixes), prepend=0.0)[kept].sum())

    def context_pmi(self, kept: Kept) -> float:
        """What the tokens that are kept add to the PMI with the context; nan without a context."""
        if self.none is None:
            return math.nan
        return float((self.own[kept].astype(np.float64) - self.none[kept]).sum())

    def of(self, kind: str, kept: Kept) -> float:
        """One of the two by its name."""
        return self.context_pmi(kept) if kind == "context_pmi" else self.pmi(kept)


@dataclass(frozen=True)
class ScoredAnswers:
    """The answers of one policy that have a PMI of some kind ("pmi", "context_pmi"), by the initial model."""

    kind: str
    prompts: Sequence[str]  # [answers]
    pmi: Array  # [answers], of whole answers, nats
    lengths: Array  # [answers], tokens
    tokens: Sequence[TokenScores] | None  # [answers]; None: an earlier version kept sums alone

    def without_copies(self) -> Array:
        """The PMI of each answer over its tokens that copy nothing, [answers]; needs `tokens`."""
        return np.array([scores.of(self.kind, ~scores.copied) for scores in self.tokens or ()])


def effect_columns(answers: ScoredAnswers, base: ScoredAnswers | None) -> dict[str, Column]:
    """Measure -> values, of those of `measures.HELD_OUT` that are about a PMI's gain; None: the answers are the base's.

    The values of lengths matched, or equal, are the base's PMI plus the effect, so that the change from the base is the
    effect. What cannot be told is left out: without log-probs of tokens, or where `at_equal_length` or `echo_values`
    gives None.
    """
    kind, whole = answers.kind, (answers.prompts, answers.pmi)
    columns: dict[str, Column] = {}
    if answers.tokens is not None:
        columns[f"{kind}_copy_free"] = (answers.prompts, answers.without_copies())
    if base is None:
        columns[f"{kind}_adjusted"] = whole
        if answers.tokens is not None:
            columns[f"{kind}_matched"] = whole
        return columns
    prompts, changes, longer, before = _by_prompt(answers, base)
    if (effects := at_equal_length(changes, longer)) is not None:
        columns[f"{kind}_adjusted"] = (prompts, before + effects)
    if answers.tokens is not None and base.tokens is not None:
        matched = matched_changes(answers, base)
        columns[f"{kind}_matched"] = (prompts, before + np.array([matched[prompt] for prompt in prompts]))
        free = item_changes((base.without_copies(), base.prompts), (answers.without_copies(), answers.prompts))
        if (echo := echo_values(changes, np.array([free[prompt] for prompt in prompts]))) is not None:
            columns[f"{kind}_echo"] = (prompts, echo)
    return columns


def matched_changes(answers: ScoredAnswers, base: ScoredAnswers) -> dict[str, float]:
    """Prompt -> mean change of the PMI from the base's answers to the policy's, each two cut to the tokens of the
    shorter one.

    Answers to a prompt are compared in their order: they were sampled with the same seeds.
    """
    changes: dict[str, list[float]] = {}
    for row, before in paired_answers(answers.prompts, base.prompts):
        new, old = (answers.tokens or ())[row], (base.tokens or ())[before]
        kept = slice(min(len(new.own), len(old.own)))
        changes.setdefault(answers.prompts[row], []).append(new.of(answers.kind, kept) - old.of(base.kind, kept))
    return {prompt: float(np.mean(values)) for prompt, values in changes.items()}


def paired_answers(prompts: Sequence[str], base_prompts: Sequence[str]) -> list[tuple[int, int]]:
    """The rows of a policy and of the base that answer the same prompt, the first of a prompt with the first."""
    before: dict[str, list[int]] = {}
    for row, prompt in enumerate(base_prompts):
        before.setdefault(prompt, []).append(row)
    return [(row, before[prompt].pop(0)) for row, prompt in enumerate(prompts) if before.get(prompt)]


def at_equal_length(changes: Array, longer: Array) -> Array | None:
    """Values whose mean is the change at equal length: the intercept a of changes = a + b * longer by least squares.

    changes, longer [prompts]: of the PMI, nats, and of the length, tokens. The differences of the values from their
    mean are the influences on a, e_i * (1 - n * m * (x_i - m) / S) with the residuals e, m the mean of x = longer and
    S = sum of (x_i - m)^2, times sqrt((n - 1) / (n - 2)) for the slope, which took one more degree of freedom.

    None where the line is not known: all lengths change by the same number of tokens, or there are fewer than 3
    prompts. Where no length changes the values are the changes.
    """
    if not longer.any():
        return changes
    count, middle = len(changes), longer.mean()
    centred = longer - middle
    spread = (centred**2).sum()
    if count < _FEWEST or spread <= 1e-9 * (longer**2).sum():
        return None
    slope = (centred * changes).sum() / spread
    intercept = changes.mean() - slope * middle
    influences = (changes - intercept - slope * longer) * (1 - count * middle * centred / spread)
    return np.asarray(intercept + influences * math.sqrt((count - 1) / (count - 2)))


def echo_values(changes: Array, copy_free: Array) -> Array | None:
    """Values whose mean is the echo share: how much of the rise of a PMI sits in copied tokens.

    changes, copy_free [prompts]: of the whole answers' PMI, and of that without copied tokens, nats. The share is
    1 - (sum of copy_free) / (sum of changes): above 1 where the PMI fell without copies, below 0 where that of the
    copies fell. The differences from it are the influences on the ratio. None where the PMI did not rise.
    """
    rise = changes.mean()
    if rise <= 0:
        return None
    in_copies = changes - copy_free
    share = in_copies.mean() / rise
    return np.asarray(share + (in_copies - share * changes) / rise)


def _by_prompt(answers: ScoredAnswers, base: ScoredAnswers) -> tuple[list[str], Array, Array, Array]:
    """The prompts that both have, and of each the change of PMI and of length, and the base's PMI."""
    changes = item_changes((base.pmi, base.prompts), (answers.pmi, answers.prompts))
    longer = item_changes((base.lengths, base.prompts), (answers.lengths, answers.prompts))
    names, means = group_means(base.pmi, base.prompts)
    before = dict(zip(names.tolist(), means.tolist(), strict=True))
    prompts = list(changes)

    def ordered(values: Mapping[str, float]) -> Array:
        return np.array([values[prompt] for prompt in prompts])

    return prompts, ordered(changes), ordered(longer), ordered(before)
