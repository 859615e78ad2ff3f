"""The training objectives as pure functions of log-probabilities; one small function for each.

K is the number of rejected responses of a pair. Means and sums over pairs are the caller's: every function returns one
loss for each pair, in nats, and carries the gradient of the policy's log-probs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from mipo_ray.config.train import TrainConfig


@dataclass(frozen=True)
class PairLogprobs:
    """What policy and reference say of a batch of pairs: log-probs summed over a response's tokens, in nats.

    policy      [pairs, prompts, responses] float32. Prompt 0 is the pair's own, response 0 the chosen one.
    reference   of the same shape and without gradient; None for objectives that have no reference.
    tokens      [pairs, responses], the number of tokens of each response, at least 1.

    There is one prompt, except for sami, where there are the pair's own and the K mismatched ones. There are 1 + K
    responses, except for sft, where there is the chosen one alone.

    Raises ValueError for shapes that do not fit each other, also where torch would broadcast them.
    """

    policy: Tensor
    reference: Tensor | None
    tokens: Tensor

    def __post_init__(self) -> None:
        if self.policy.dim() != 3:
            raise ValueError(f"policy: expected [pairs, prompts, responses], found {list(self.policy.shape)}")
        pairs, _, responses = self.policy.shape
        if self.reference is not None and self.reference.shape != self.policy.shape:
            raise ValueError(
                f"reference: expected the policy's shape {list(self.policy.shape)}, found {list(self.reference.shape)}"
            )
        if self.tokens.shape != (pairs, responses):
            raise ValueError(
                f"tokens: expected [pairs, responses] = {[pairs, responses]}, found {list(self.tokens.shape)}"
            )


def pair_losses(logprobs: PairLogprobs, train: TrainConfig) -> Tensor:
    """The loss of each pair under `train.objective`: [pairs] float32, nats.

    `train.length_normalized` (dpo, ipo, infonce) divides the log-prob ratio of each response by its tokens before
    anything else: with dpo this is the length-normalised DPO of Lambert et al. 2024 ("Tulu 3", arXiv 2411.15124).
    `train.nll_coefficient` (dpo, ipo, infonce) adds that multiple of `sft_losses`: with dpo this is equation 1 of Pang
    et al. 2024 ("Iterative Reasoning Preference Optimization", arXiv 2404.19733).

    Without that term the loss of a policy that equals its reference is ln 2 for dpo, 1 / (4 beta^2) for ipo and
    ln(1 + K) for infonce. sami and sft look at the policy alone, so that their first loss depends on the model.

    Raises ValueError where `logprobs` does not hold the prompts, responses or reference that the objective compares.
    """
    _check_fit(logprobs, train)
    per_token = logprobs.policy / logprobs.tokens[:, None, :]
    if train.objective == "sami":
        return sami_losses(per_token)
    chosen_nll = sft_losses(per_token[:, 0, 0])
    if train.objective == "sft":
        return chosen_nll
    ratios = _log_ratios(logprobs)
    if train.length_normalized:
        ratios = ratios / logprobs.tokens
    if train.objective == "dpo":
        losses = dpo_losses(ratios, beta=train.beta, label_smoothing=train.label_smoothing)
    elif train.objective == "ipo":
        losses = ipo_losses(ratios, tau=train.beta)
    else:
        losses = infonce_losses(ratios, beta=train.beta)
    return losses + train.nll_coefficient * chosen_nll if train.nll_coefficient else losses


def dpo_losses(log_ratios: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO, Rafailov et al. 2023 ("Direct Preference Optimization", arXiv 2305.18290), equation 7: [pairs].

    `log_ratios` is [pairs, 1 + K], log policy / reference of each response in nats, the chosen one first. With
    z = beta * (ratio of chosen - ratio of rejected) and e = `label_smoothing`,

        loss = -(1 - e) * log sigmoid(z) - e * log sigmoid(-z),

    the mean of that over the K rejected responses. e is the assumed share of pairs with swapped labels (conservative
    DPO, Mitchell 2023, "A note on DPO with noisy preferences"); e = 0 is equation 7 itself.
    """
    margins = beta * (log_ratios[:, :1] - log_ratios[:, 1:])
    losses = -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
    return losses.mean(dim=1)


def ipo_losses(log_ratios: Tensor, *, tau: float) -> Tensor:
    """IPO, Azar et al. 2023 ("A General Theoretical Paradigm to Understand Learning from Human Preferences",
    arXiv 2310.12036), equation 17: [pairs].

    `log_ratios` as for `dpo_losses`. With h = ratio of chosen - ratio of rejected, loss = (h - 1 / (2 tau))^2, the mean
    of that over the K rejected responses. The paper's h is of whole responses. TRL's "ipo" divides each ratio by the
    tokens of its response, which is `train.length_normalized` here.
    """
    differences = log_ratios[:, :1] - log_ratios[:, 1:]
    return ((differences - 1 / (2 * tau)) ** 2).mean(dim=1)


def infonce_losses(log_ratios: Tensor, *, beta: float) -> Tensor:
    """InfoNCE, van den Oord et al. 2018 ("Representation Learning with Contrastive Predictive Coding",
    arXiv 1807.03748), equation 4: [pairs].

    `log_ratios` as for `dpo_losses`. With s = beta * ratio as the logarithm of the paper's density ratio f,

        loss = -log(e^{s+} / (e^{s+} + sum_k e^{s-_k})),

    where s+ is the chosen response's and s-_k that of rejected response k. It picks one response out of 1 + K, where
    DPO compares K times two; with K = 1 it is DPO, by which MIPO (Nam, Li and Jaques 2026, arXiv 2603.19294) raises the
    mutual information of prompts and responses.
    """
    return -log_softmax(beta * log_ratios, dim=1)[:, 0]


def sami_losses(mean_logprobs: Tensor) -> Tensor:
    """SAMI, Fraenken et al. 2024 ("Self-Supervised Alignment with Mutual Information", arXiv 2404.14313): [pairs].

    `mean_logprobs` is [pairs, prompts, responses] with as many prompts as responses: the policy's log-prob of response
    j under prompt i in nats per token, m_ij, where response i was sampled under prompt i. Over the n = 1 + K of each,

        loss = 1 / (2n) * sum_i [-log(e^{m_ii} / sum_j e^{m_ij}) - log(e^{m_ii} / sum_j e^{m_ji})],

    which is the mean of the cross-entropies of rows (which of the responses belongs to this prompt) and of columns
    (which of the prompts belongs to this response). It is ln n minus the paper's objective (equation 2) with mean
    log-probs in place of those of whole responses, and ln n where all m are equal. There is no reference: what keeps
    the policy near its start is training little.

    Equal prompts have equal rows, which no policy tells apart: of c equal ones each column costs at least ln c.
    """
    own = mean_logprobs.diagonal(dim1=1, dim2=2)
    rows = mean_logprobs.logsumexp(dim=2) - own
    columns = mean_logprobs.logsumexp(dim=1) - own
    return (rows + columns).mean(dim=1) / 2


def sft_losses(chosen_mean_logprobs: Tensor) -> Tensor:
    """Negative log-likelihood of the chosen response, from its log-prob in nats per token: [pairs] to [pairs]."""
    return -chosen_mean_logprobs


def rewards(logprobs: PairLogprobs, beta: float) -> Tensor:
    """[pairs, responses] float32 without gradient: beta * log(policy / reference) under the pair's own prompt, nats.

    The implicit reward of Rafailov et al. 2023, equation 5, without its constant: of whole responses, whether or not
    the objective divides by their tokens. Raises ValueError without a reference.
    """
    return beta * _log_ratios(logprobs).detach()


def ranked_correctly(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """[pairs] float32: 1 where the chosen response has the larger reward, 0.5 where the rewards tie, else 0.

    A tie counts half, so that a policy equal to its reference scores 0.5, which is chance.
    """
    return 0.5 * (1 + torch.sign(chosen_rewards - rejected_rewards))


def _log_ratios(logprobs: PairLogprobs) -> Tensor:
    """[pairs, responses]: log policy / reference of each response under the pair's own prompt, nats."""
    if logprobs.reference is None:
        raise ValueError("reference: expected log-probs of the reference, found None")
    return logprobs.policy[:, 0] - logprobs.reference[:, 0]


def _check_fit(logprobs: PairLogprobs, train: TrainConfig) -> None:
    """Raises ValueError where the numbers of prompts and responses are not those of the objective."""
    _, prompts, responses = logprobs.policy.shape
    sft, sami = train.objective == "sft", train.objective == "sami"
    if (responses != 1) if sft else (responses < 2):
        expected = "the chosen response alone" if sft else "the chosen and at least one rejected response"
        raise ValueError(f"objective {train.objective}: expected {expected}, found {responses} responses")
    if prompts != (responses if sami else 1):
        expected = f"as many prompts as responses ({responses})" if sami else "one prompt"
        raise ValueError(f"objective {train.objective}: expected {expected}, found {prompts}")
