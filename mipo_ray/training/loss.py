"""The training objectives as pure functions of log-probs; one small function for each.

A pair has one chosen response y+ and K rejected ones y-_k. Every function returns one loss for each pair, [pairs], in
nats, through which the gradient reaches the policy's log-probs. Means and sums over pairs are the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from mipo_ray.config.train import TrainConfig


@dataclass(frozen=True)
class PairLogprobs:
    """What policy and reference say of a batch of pairs: log p(response | prompt), a sum over its tokens, in nats.

    policy      [pairs, prompts, responses] float32; prompt 0 is the pair's own, response 0 the chosen one
    reference   [pairs, prompts, responses] float32, without gradient; None for objectives that have no reference
    tokens      [pairs, responses] int64, the number of tokens of each response, at least 1

    prompts is 1; for sami it is 1 + K, the pair's own and the K mismatched ones. responses is 1 + K; for sft it is 1,
    the chosen one.

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

    dpo, ipo and infonce have two options. `train.length_normalized` divides the log ratio of each response by its
    tokens; with dpo this is the length-normalised DPO of Lambert et al. 2024 ("Tulu 3", arXiv 2411.15124).
    `train.nll_coefficient` adds that multiple of `sft_losses`; with dpo this is equation 1 of Pang et al. 2024
    ("Iterative Reasoning Preference Optimization", arXiv 2404.19733).

    A policy that equals its reference has, without that term, the loss ln 2 under dpo, 1 / (4 beta^2) under ipo and
    ln(1 + K) under infonce. sami and sft look at the policy alone, so that their first loss depends on the model.

    Raises ValueError where `logprobs` lacks the prompts, responses or reference that the objective compares.
    """
    _check_fit(logprobs, train)
    # log p(response | prompt) / tokens of the response: [pairs, prompts, responses]
    per_token = logprobs.policy / logprobs.tokens[:, None, :]
    if train.objective == "sami":
        return sami_losses(per_token)
    chosen_nll = sft_losses(per_token[:, 0, 0])  # [pairs]
    if train.objective == "sft":
        return chosen_nll
    ratios = _log_ratios(logprobs)  # [pairs, 1 + K]
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

    log_ratios        [pairs, 1 + K]: r = log policy(y | x) / reference(y | x) in nats, of y+ first, then of each y-_k
    beta              how much a nat of log ratio counts
    label_smoothing   e, the share of pairs whose labels are taken to be swapped (conservative DPO, Mitchell 2023, "A
                      note on DPO with noisy preferences"); 0 is equation 7 itself
    """
    # z_k = beta * (r+ - r-_k): [pairs, K]
    margins = beta * (log_ratios[:, :1] - log_ratios[:, 1:])
    # loss_k = -(1 - e) * log sigmoid(z_k) - e * log sigmoid(-z_k): [pairs, K]
    losses = -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
    # loss = 1/K * sum_k loss_k: [pairs]
    return losses.mean(dim=1)


def ipo_losses(log_ratios: Tensor, *, tau: float) -> Tensor:
    """IPO, Azar et al. 2023 ("A General Theoretical Paradigm to Understand Learning from Human Preferences",
    arXiv 2310.12036), equation 17: [pairs].

    log_ratios   [pairs, 1 + K], as for `dpo_losses`; the paper's are those of whole responses, and TRL's "ipo" divides
                 each by the tokens of its response, which is `train.length_normalized` here
    tau          1 / (2 tau) is the difference of log ratios, in nats, that the policy is drawn to
    """
    # h_k = r+ - r-_k: [pairs, K]
    differences = log_ratios[:, :1] - log_ratios[:, 1:]
    # loss = 1/K * sum_k (h_k - 1 / (2 tau))^2: [pairs]
    return ((differences - 1 / (2 * tau)) ** 2).mean(dim=1)


def infonce_losses(log_ratios: Tensor, *, beta: float) -> Tensor:
    """InfoNCE, van den Oord et al. 2018 ("Representation Learning with Contrastive Predictive Coding",
    arXiv 1807.03748), equation 4: [pairs].

    log_ratios   [pairs, 1 + K], as for `dpo_losses`
    beta         beta * r is the logarithm of the paper's density ratio f

    It picks one response out of 1 + K, where DPO compares K times two. With K = 1 it is DPO, by which MIPO (Nam, Li and
    Jaques 2026, arXiv 2603.19294) raises the mutual information of prompts and responses.
    """
    # s = beta * r;  loss = -log(exp(s+) / (exp(s+) + sum_k exp(s-_k))): [pairs]
    return -log_softmax(beta * log_ratios, dim=1)[:, 0]


def sami_losses(mean_logprobs: Tensor) -> Tensor:
    """SAMI, Fraenken et al. 2024 ("Self-Supervised Alignment with Mutual Information", arXiv 2404.14313): [pairs].

    mean_logprobs   [pairs, prompts, responses], n = 1 + K of each: m_ij, the policy's log-prob of response j under
                    prompt i in nats per token, where response i was sampled under prompt i

    It is ln n minus the paper's objective (equation 2), with log-probs per token in place of those of whole responses,
    and ln n where all m are equal. There is no reference: what keeps the policy near its start is training little.

    Equal prompts have equal rows, which no policy tells apart: of c equal ones each column costs at least ln c.
    """
    # m_ii: [pairs, n]
    own = mean_logprobs.diagonal(dim1=1, dim2=2)
    # Which response belongs to prompt i: -log(exp(m_ii) / sum_j exp(m_ij)): [pairs, n]
    rows = mean_logprobs.logsumexp(dim=2) - own
    # Which prompt belongs to response i: -log(exp(m_ii) / sum_j exp(m_ji)): [pairs, n]
    columns = mean_logprobs.logsumexp(dim=1) - own
    # loss = 1/(2n) * sum_i (row_i + column_i): [pairs]
    return (rows + columns).mean(dim=1) / 2


def sft_losses(chosen_mean_logprobs: Tensor) -> Tensor:
    """Negative log-likelihood of the chosen response: [pairs].

    chosen_mean_logprobs   [pairs], the policy's log-prob of y+ in nats per token
    """
    # loss = -log p(y+ | x) / tokens of y+: [pairs]
    return -chosen_mean_logprobs


def rewards(logprobs: PairLogprobs, beta: float) -> Tensor:
    """The implicit reward of each response, Rafailov et al. 2023, equation 5, without its constant.

    [pairs, responses] float32, nats, without gradient. It is that of whole responses, whether or not the objective
    divides by their tokens. Raises ValueError without a reference.
    """
    # reward = beta * log(policy(y | x) / reference(y | x))
    return beta * _log_ratios(logprobs).detach()


def ranked_correctly(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """1 where the chosen response has the larger reward, 0.5 where the rewards tie, else 0: as the arguments, float32.

    chosen_rewards, rejected_rewards   of one shape, nats

    A tie counts half, so that a policy equal to its reference scores 0.5, which is chance.
    """
    # (1 + sign(reward+ - reward-)) / 2
    return 0.5 * (1 + torch.sign(chosen_rewards - rejected_rewards))


def _log_ratios(logprobs: PairLogprobs) -> Tensor:
    """The log ratio of each response under the pair's own prompt: [pairs, responses], nats."""
    if logprobs.reference is None:
        raise ValueError("reference: expected log-probs of the reference, found None")
    # r = log policy(y | x) - log reference(y | x)
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
