"""How much a response depends on what it was sampled under: mutual information, rewards and KL, from log-probs.

Every function is pure numpy in float64 and returns one value per response, so that the caller can average by prompt
and put an interval on the average (`mipo_ray.evaluation.intervals`).

Inputs, for R responses that are each scored under their own conditioning and under K others:

    own_logprob     [responses]     log p(y | x), summed over the response's tokens, nats
    other_logprobs  [responses, K]  log p(y | x_k) of the same response under K other conditionings, nats
    token_counts    [responses]     tokens of the response, the end token included

A response without any token has the log-prob 0 under every conditioning; its per-token values are 0 as well.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def leave_one_out_pmi(own_logprob: ArrayLike, other_logprobs: ArrayLike) -> Array:
    """Pointwise mutual information of each response with its own conditioning, nats per response, [responses].

    PMI = log p(y | x) - log p(y), with the marginal p(y) estimated by the mean of p(y | x_k) over the K others; the
    own conditioning is left out of that mean. When p is also the distribution the responses were sampled from and
    the others are independent draws of x, the expectation is at least I(x; y): -log is convex, so by Jensen's
    inequality E[-log mean_k p(y | x_k)] >= -log p(y) (the leave-one-out upper bound of Poole et al. 2019, "On
    variational bounds of mutual information", section 2). Scored by another model than the sampler, it is that
    model's judgement and bounds nothing.

    Raises ValueError on shapes that do not fit, on K = 0 and on values that are not finite.
    """
    own, others = _own_and_others(own_logprob, other_logprobs)
    return own - _log_mean_exp(others)


def leave_one_out_pmi_per_token(own_logprob: ArrayLike, other_logprobs: ArrayLike, token_counts: ArrayLike) -> Array:
    """`leave_one_out_pmi` divided by the response's own length, nats per token, [responses].

    A longer response has more tokens to depend on its prompt with; this figure does not grow with length alone.
    """
    return _per_token(leave_one_out_pmi(own_logprob, other_logprobs), token_counts)


def infonce_per_token(own_logprob: ArrayLike, other_logprobs: ArrayLike, token_counts: ArrayLike) -> Array:
    """The InfoNCE score of each response on per-token mean log-probs, nats, [responses]; its mean is the bound.

    With s = log-prob / tokens: s_own - log(mean of exp(s) over the own and the K other conditionings). This is
    ln(K + 1) minus the loss of van den Oord et al. 2018 (arXiv 1807.03748, equation 4) with exp(s) as the density
    ratio f, and it can never pass `infonce_ceiling`. The expectation bounds I(x; y) from below for any score f (their
    section 2.3), so dividing by the length loses tightness, not validity; summed log-probs would sit at the ceiling
    for any model.
    """
    own, others = _own_and_others(own_logprob, other_logprobs)
    own = _per_token(own, token_counts)
    everything = np.concatenate([own[:, None], _per_token(others, token_counts)], axis=1)
    return own - _log_mean_exp(everything)


def infonce_ceiling(others: int) -> float:
    """The largest value `infonce_per_token` can take with K = `others` other conditionings: ln(K + 1), nats."""
    return math.log(others + 1)


def retrieval_correct(own_logprob: ArrayLike, other_logprobs: ArrayLike) -> Array:
    """Whether the response is likeliest under its own conditioning, share in [0, 1], [responses].

    1.0 where the own conditioning is the strict maximum, 0.0 where another is higher, and 1 / (number tied) where the
    own one shares the maximum: what a fair random choice among the tied ones would score.
    """
    own, others = _own_and_others(own_logprob, other_logprobs)
    tied = 1 + (others == own[:, None]).sum(axis=1)
    return np.where(own >= others.max(axis=1), 1.0 / tied, 0.0)


def pmi_without_context(own_logprob: ArrayLike, none_logprob: ArrayLike) -> Array:
    """Pointwise mutual information of response and user context given the question, nats per response, [responses].

    log p(y | context, question) - log p(y | question), with the model's own answer to the question alone
    (`none_logprob`, [responses]) in the place of the marginal over contexts.
    """
    return _difference(own_logprob, none_logprob, "own_logprob", "none_logprob")


def pmi_without_context_per_token(own_logprob: ArrayLike, none_logprob: ArrayLike, token_counts: ArrayLike) -> Array:
    """`pmi_without_context` divided by the response's own length, nats per token, [responses]."""
    return _per_token(pmi_without_context(own_logprob, none_logprob), token_counts)


def pmi_matrix(logprobs: ArrayLike) -> Array:
    """Pointwise mutual information of each of M answers with each of M conditionings, nats per response, [M, M].

    From logprobs[i, j] = log p(y_i | x_j), where y_i was sampled under x_i:

        pmi[i, j] = log p(y_i | x_j) - log( 1 / (M - 1) * sum over k != i of p(y_i | x_k) ).

    A row is an answer, less its marginal estimated over the conditionings that are not its own. The diagonal is
    therefore `leave_one_out_pmi` with all M - 1 others; a cell off the diagonal says how much likelier the answer is
    under that other conditioning than under the others on average, near 0 or below it where answers fit only their
    own. Raises ValueError for another shape, for M < 2 and for values that are not finite.
    """
    matrix = _finite(logprobs, "logprobs")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise ValueError(f"logprobs: expected shape (M, M) with M of at least 2, found {matrix.shape}")
    others = matrix[~np.eye(len(matrix), dtype=bool)].reshape(len(matrix), -1)
    return matrix - _log_mean_exp(others)[:, None]


def log_ratio(policy_logprob: ArrayLike, initial_logprob: ArrayLike) -> Array:
    """log pi(y | x) - log pi_0(y | x) of each response, nats per response, [responses].

    For responses sampled from pi it is the unbiased single-sample estimate of KL(pi || pi_0) over the whole response.
    `kl_per_token` turns it into nats per token. Single values may be negative, and so may a mean over few responses.
    """
    return _difference(policy_logprob, initial_logprob, "policy_logprob", "initial_logprob")


def kl_per_token(policy_logprob: ArrayLike, initial_logprob: ArrayLike, token_counts: ArrayLike) -> Array:
    """Each response's contribution to the Monte Carlo estimate of KL(pi || pi_0), nats per token, [responses].

    The responses must be sampled from pi (temperature 1 for an exact expectation; a lower one measures the KL on the
    answers that users see). The estimate is a ratio of sums over all R responses,

        KL = sum_i (log pi(y_i | x_i) - log pi_0(y_i | x_i)) / sum_i tokens_i,

    so that every token weighs the same; the mean of the returned contributions, R * log ratio_i / sum_j tokens_j,
    equals it. `intervals.bootstrap_ratio` of the same numerators and denominators gives it with an interval.
    """
    ratios = log_ratio(policy_logprob, initial_logprob)
    total = _counts(token_counts, len(ratios)).sum()
    return ratios * len(ratios) / max(total, 1.0)


def rewards(policy_logprob: ArrayLike, initial_logprob: ArrayLike, beta: float) -> Array:
    """DPO's implicit reward beta * (log pi - log pi_0), nats, [responses] (Rafailov et al. 2023, section 4)."""
    return beta * log_ratio(policy_logprob, initial_logprob)


def reward_margin(chosen_rewards: ArrayLike, rejected_rewards: ArrayLike) -> Array:
    """Chosen minus rejected reward of each pair, nats, [pairs]."""
    return _difference(chosen_rewards, rejected_rewards, "chosen_rewards", "rejected_rewards")


def reward_accuracy(chosen_rewards: ArrayLike, rejected_rewards: ArrayLike) -> Array:
    """1.0 where the chosen reward is the higher one, 0.5 at a tie, 0.0 otherwise, [pairs].

    An untrained policy, all of whose rewards are 0, so scores 0.5: chance.
    """
    return 0.5 + 0.5 * np.sign(reward_margin(chosen_rewards, rejected_rewards))


def _log_mean_exp(values: Array) -> Array:
    """log(mean(exp(values))) over the last axis, without overflow or underflow of the largest term."""
    largest = values.max(axis=-1, keepdims=True)
    return np.log(np.exp(values - largest).mean(axis=-1)) + largest[..., 0]


def _per_token(values: Array, token_counts: ArrayLike) -> Array:
    counts = np.maximum(_counts(token_counts, len(values)), 1.0)
    return values / (counts if values.ndim == 1 else counts[:, None])


def _counts(token_counts: ArrayLike, responses: int) -> Array:
    counts = _finite(token_counts, "token_counts")
    if counts.shape != (responses,):
        raise ValueError(f"token_counts: expected shape ({responses},), found {counts.shape}")
    if (counts < 0).any():
        row = int(np.argmax(counts < 0))
        raise ValueError(f"token_counts: expected at least 0 tokens, found {counts[row]:g} in row {row}")
    return counts


def _own_and_others(own_logprob: ArrayLike, other_logprobs: ArrayLike) -> tuple[Array, Array]:
    own = _finite(own_logprob, "own_logprob")
    others = _finite(other_logprobs, "other_logprobs")
    if own.ndim != 1 or others.ndim != 2 or len(others) != len(own):
        raise ValueError(
            f"expected own_logprob [responses] and other_logprobs [responses, K], found {own.shape} and {others.shape}"
        )
    if others.shape[1] == 0:
        raise ValueError("other_logprobs: expected at least one other conditioning (K >= 1), found K = 0")
    return own, others


def _difference(left: ArrayLike, right: ArrayLike, left_name: str, right_name: str) -> Array:
    first, second = _finite(left, left_name), _finite(right, right_name)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(
            f"expected {left_name} and {right_name} of one shape [responses], found {first.shape} and {second.shape}"
        )
    return first - second


def _finite(values: ArrayLike, name: str) -> Array:
    array = np.asarray(values, dtype=np.float64)
    wrong = ~np.isfinite(array)
    if wrong.any():
        position = tuple(int(index) for index in np.argwhere(wrong)[0])
        raise ValueError(f"{name}: expected finite numbers, found {array[position]} at row {position[0]}")
    return array
