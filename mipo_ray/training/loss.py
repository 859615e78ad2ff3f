"""The DPO loss as a pure function of log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class DPOLoss:
    """What DPO says about each pair; every tensor is [pairs], float32.

    `losses` carries the gradient. The rewards are detached: beta * log(policy / reference) of a response, in nats,
    the implicit reward of Rafailov et al. 2023, equation 5, without its constant.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> DPOLoss:
    """DPO, Rafailov et al. 2023 ("Direct Preference Optimization", arXiv 2305.18290), equation 7.

    All inputs are [pairs]: the log-probability of a whole response (summed over its tokens, nats) under the policy or
    the frozen reference. With z = beta * ((policy - reference) of chosen - (policy - reference) of rejected),

        loss = -(1 - e) * log sigmoid(z) - e * log sigmoid(-z),

    where e = `label_smoothing` is the assumed share of pairs with swapped labels (conservative DPO, Mitchell 2023,
    "A note on DPO with noisy preferences"); e = 0 is equation 7 itself. A policy equal to its reference has z = 0, so
    its loss is ln 2 for every e.

    Raises ValueError when the four shapes differ.
    """
    inputs = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    if len({tuple(logps.shape) for logps in inputs}) != 1:
        raise ValueError(f"expected four log-prob tensors of one shape, found {[tuple(x.shape) for x in inputs]}")
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = (logps.float() for logps in inputs)
    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    margins = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
    return DPOLoss(losses=losses, chosen_rewards=chosen_rewards.detach(), rejected_rewards=rejected_rewards.detach())


def ranked_correctly(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """[pairs] float32: 1 where the chosen response has the larger reward, 0.5 where the rewards tie, else 0.

    A tie counts half, so that a policy equal to its reference scores 0.5, which is chance.
    """
    return 0.5 * (1 + torch.sign(chosen_rewards - rejected_rewards))
