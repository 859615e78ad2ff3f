"""Loss and every gradient against TRL's DPOTrainer, for each layout, on pairs of ragged lengths.

python -m pytest tests/integration/test_training_equivalence.py

The trainer's own way is taken from pairs to gradients: micro-batches, layouts, reference, objective.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mipo_ray.config.train import TrainConfig
from mipo_ray.training.attention import use_attention
from mipo_ray.training.deepspeed_engine import compile_layers
from mipo_ray.training.layout import lay_out
from mipo_ray.training.logprobs import response_logprobs
from mipo_ray.training.loss import PairLogprobs, pair_losses
from mipo_ray.training.step import micro_batches
from tests.helpers.tiny_families import VOCABULARY, assert_gradients_agree, tiny_model
from tests.helpers.tiny_training import ragged_pairs, read_all
from tests.helpers.trl_trainer import trl_dpo_trainer

BETA = 0.3
LAYOUTS = ("padded", "packed", "shared")


def few_tokens() -> list[dict[str, Any]]:
    """Responses of 1 token, prompts of 1 token, and two pairs with the same prompt."""
    one, two, three = np.array([3]), np.array([7]), np.array([5, 9, 2])
    return [
        {"pair_id": "a", "prompt_token_ids": one, "chosen_token_ids": two, "rejected_token_ids": [three[:1]]},
        {"pair_id": "b", "prompt_token_ids": three, "chosen_token_ids": one, "rejected_token_ids": [three]},
        {"pair_id": "c", "prompt_token_ids": three, "chosen_token_ids": three, "rejected_token_ids": [two]},
    ]


PAIRS = {"ragged": ragged_pairs(9, seed=3), "of few tokens": few_tokens()}


@pytest.fixture(scope="module")
def reference() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def policy(reference: Any) -> Any:
    """The reference, moved far enough that first losses are left behind and rewards differ between pairs."""
    policy = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def trl_trainer(policy: Any, reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trl_dpo_trainer(
        policy, reference, vocabulary=VOCABULARY, beta=BETA, directory=tmp_path_factory.mktemp("trl")
    )


def by_trl(trainer: Any, pairs: list[dict[str, Any]], loss_type: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of TRL on one batch of these pairs."""
    trainer.loss_types, trainer.loss_weights = [loss_type], [1.0]
    rows = [
        {
            "prompt_ids": pair["prompt_token_ids"].tolist(),
            "chosen_ids": pair["chosen_token_ids"].tolist(),
            "rejected_ids": pair["rejected_token_ids"][0].tolist(),
        }
        for pair in pairs
    ]
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}


def by_layout(
    policy: Any, reference: Any, pairs: list[dict[str, Any]], train: TrainConfig
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the same pairs, summed over micro-batches."""
    policy, reference = copy.deepcopy(policy), copy.deepcopy(reference)
    for model in (policy, reference):
        use_attention(model, train.attention, train.layout)
        if train.torch_compile:
            compile_layers(model)
    read = read_all(pairs, train.objective)
    groups = micro_batches(read, layout=train.layout, most_tokens=train.micro_batch_tokens)
    total = 0.0
    for group in groups:
        trees = [tree for pair in group for tree in pair.trees]
        batch = lay_out(trees, train.layout)
        with torch.no_grad():
            frozen = response_logprobs(reference, batch)
        logprobs = PairLogprobs(
            policy=response_logprobs(policy, batch).view(len(group), 1, 2),
            reference=frozen.view(len(group), 1, 2),
            tokens=torch.tensor([[len(response) for response in tree.responses] for tree in trees]),
        )
        loss = pair_losses(logprobs, train).sum() / len(pairs)
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        ("sigmoid", {"objective": "dpo"}),
        ("sigmoid_norm", {"objective": "dpo", "length_normalized": True}),
        ("ipo", {"objective": "ipo", "length_normalized": True}),
    ],
    ids=["dpo", "length-normalised dpo", "ipo"],
)
def test_loss_and_gradients_agree_with_trl(trl_trainer, policy, reference, layout, pairs, loss_type, options):
    expected, expected_gradients = by_trl(trl_trainer, pairs, loss_type)
    for micro_batch_tokens in (40, 10_000):
        train = TrainConfig(beta=BETA, layout=layout, micro_batch_tokens=micro_batch_tokens, **options)
        found, found_gradients = by_layout(policy, reference, pairs, train)
        assert found == pytest.approx(expected, rel=1e-5)
        assert_gradients_agree(found_gradients, expected_gradients)


def test_compiled_layers_agree_with_trl(trl_trainer, policy, reference):
    """On micro-batches of many lengths, which must not be compiled one by one."""
    expected, expected_gradients = by_trl(trl_trainer, PAIRS["ragged"], "sigmoid")
    train = TrainConfig(beta=BETA, micro_batch_tokens=40, torch_compile=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        found, found_gradients = by_layout(policy, reference, PAIRS["ragged"], train)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # something was compiled
    assert found == pytest.approx(expected, rel=1e-5)
    assert_gradients_agree(found_gradients, expected_gradients)
