"""The objectives against their formulas, pair by pair, and against TRL's trainer on the same token ids and models.

python -m pytest tests/unit/training/test_loss.py
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from mipo_ray.config.train import TrainConfig
from mipo_ray.training.loss import PairLogprobs, pair_losses, ranked_correctly, rewards
from tests.helpers.trl_trainer import trl_dpo_trainer

BETA = 0.3
VOCABULARY = 128


# The formulas, for one pair, in float64.


def plain_dpo(ratios: Tensor, train: TrainConfig) -> Tensor:
    losses = []
    for rejected in ratios[1:]:
        z = train.beta * (ratios[0] - rejected)
        as_labelled, swapped = -torch.log(torch.sigmoid(z)), -torch.log(torch.sigmoid(-z))
        losses.append((1 - train.label_smoothing) * as_labelled + train.label_smoothing * swapped)
    return sum(losses) / len(losses)


def plain_ipo(ratios: Tensor, train: TrainConfig) -> Tensor:
    losses = [(ratios[0] - rejected - 1 / (2 * train.beta)) ** 2 for rejected in ratios[1:]]
    return sum(losses) / len(losses)


def plain_infonce(ratios: Tensor, train: TrainConfig) -> Tensor:
    positive, *negatives = [torch.exp(train.beta * ratio) for ratio in ratios]
    return -torch.log(positive / (positive + sum(negatives)))


def plain_sami(policy: Tensor, tokens: Tensor) -> Tensor:
    """Rows and columns by torch's own cross-entropy, with the diagonal as targets."""
    means = torch.stack([torch.stack([row[j] / tokens[j] for j in range(len(tokens))]) for row in policy])
    targets = torch.arange(len(tokens))
    rows = torch.nn.functional.cross_entropy(means, targets)
    columns = torch.nn.functional.cross_entropy(means.T, targets)
    return (rows + columns) / 2


def plain_losses(logprobs: PairLogprobs, train: TrainConfig) -> Tensor:
    losses = []
    for pair, (policy, tokens) in enumerate(zip(logprobs.policy, logprobs.tokens, strict=True)):
        nll = -policy[0, 0] / tokens[0]
        if train.objective in ("sami", "sft"):
            losses.append(plain_sami(policy, tokens) if train.objective == "sami" else nll)
            continue
        ratios = []
        for response in range(len(tokens)):
            ratio = policy[0, response] - logprobs.reference[pair, 0, response]
            ratios.append(ratio / tokens[response] if train.length_normalized else ratio)
        formula = {"dpo": plain_dpo, "ipo": plain_ipo, "infonce": plain_infonce}[train.objective]
        losses.append(formula(ratios, train) + train.nll_coefficient * nll)
    return torch.stack(losses)


OBJECTIVES = {
    "dpo": {"objective": "dpo"},
    "conservative dpo": {"objective": "dpo", "label_smoothing": 0.2},
    "length-normalised dpo": {"objective": "dpo", "length_normalized": True},
    "dpo with nll": {"objective": "dpo", "nll_coefficient": 0.7},
    "ipo": {"objective": "ipo"},
    "length-normalised ipo with nll": {"objective": "ipo", "length_normalized": True, "nll_coefficient": 0.7},
    "infonce": {"objective": "infonce"},
    "length-normalised infonce with nll": {"objective": "infonce", "length_normalized": True, "nll_coefficient": 0.7},
    "sami": {"objective": "sami"},
    "sft": {"objective": "sft"},
}
every_objective = pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)


@st.composite
def drawn_logprobs(draw: st.DrawFn, objective: str) -> PairLogprobs:
    """1 to 3 pairs with 1 to 4 rejected responses of 1 to 20 tokens; float64, so that formulas agree closely."""
    pairs = draw(st.integers(1, 3))
    responses = 1 if objective == "sft" else draw(st.integers(2, 5))
    shape = (pairs, responses if objective == "sami" else 1, responses)
    values = arrays(np.float64, shape, elements=st.floats(-60, 0))
    with_reference = objective not in ("sami", "sft")
    return PairLogprobs(
        policy=torch.from_numpy(draw(values)).requires_grad_(),
        reference=torch.from_numpy(draw(values)) if with_reference else None,
        tokens=torch.from_numpy(draw(arrays(np.int64, (pairs, responses), elements=st.integers(1, 20)))),
    )


@every_objective
@given(st.data())
def test_losses_and_gradients_are_those_of_the_formulas(options: dict[str, Any], data: st.DataObject) -> None:
    logprobs = data.draw(drawn_logprobs(options["objective"]))
    train = TrainConfig(beta=data.draw(st.floats(0.05, 2)), **options)
    found, expected = pair_losses(logprobs, train), plain_losses(logprobs, train)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(losses.sum(), logprobs.policy)[0] for losses in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@every_objective
def test_losses_are_float32_and_finite_far_from_the_reference(options: dict[str, Any]) -> None:
    """Where exponentials overflow: log-ratios of thousands of nats."""
    logprobs = made_logprobs(options["objective"], rejected=3, pairs=6, scale=4000.0)
    logprobs = replace(logprobs, tokens=torch.ones_like(logprobs.tokens))
    losses = pair_losses(logprobs, TrainConfig(beta=1.0, **options))
    assert losses.shape == (6,)
    assert losses.dtype == torch.float32
    assert torch.isfinite(losses).all()
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs.policy)
    assert torch.isfinite(gradient).all()


def made_logprobs(objective: str, rejected: int, pairs: int = 4, scale: float = 20.0) -> PairLogprobs:
    generator = torch.Generator().manual_seed(rejected)
    responses = 1 if objective == "sft" else 1 + rejected
    shape = (pairs, responses if objective == "sami" else 1, responses)
    policy, reference = (-scale * torch.rand(shape, generator=generator) for _ in range(2))
    tokens = torch.randint(1, 30, (pairs, responses), generator=generator)
    return PairLogprobs(
        policy=policy.requires_grad_(), reference=None if objective in ("sami", "sft") else reference, tokens=tokens
    )


# A policy that has not moved.


def first_losses(rejected: int, **options: Any) -> list[float]:
    logprobs = made_logprobs(options["objective"], rejected)
    return pair_losses(replace(logprobs, reference=logprobs.policy.detach()), TrainConfig(**options)).tolist()


@pytest.mark.parametrize("length_normalized", [False, True])
@pytest.mark.parametrize("rejected", [1, 3])
def test_first_loss_of_the_objectives_with_a_reference(rejected: int, length_normalized: bool) -> None:
    options = {"beta": BETA, "length_normalized": length_normalized}
    for label_smoothing in (0.0, 0.1):
        losses = first_losses(rejected, objective="dpo", label_smoothing=label_smoothing, **options)
        assert losses == pytest.approx([math.log(2)] * 4)
    assert first_losses(rejected, objective="infonce", **options) == pytest.approx([math.log(1 + rejected)] * 4)
    assert first_losses(rejected, objective="ipo", **options) == pytest.approx([1 / (4 * BETA**2)] * 4)


def test_sami_is_the_logarithm_of_the_responses_where_no_prompt_tells_them_apart() -> None:
    tokens = torch.tensor([[3, 1, 8, 20]])
    policy = -0.7 * tokens[:, None, :].expand(1, 4, 4)  # the same log-prob per token everywhere
    losses = pair_losses(PairLogprobs(policy, None, tokens), TrainConfig(objective="sami"))
    assert losses.tolist() == pytest.approx([math.log(4)])


def test_equal_prompts_bound_sami_from_below() -> None:
    """Three equal prompts: their columns cost ln 3 each at best, on average over rows and columns of 4."""
    m = torch.full((1, 4, 4), -100.0)
    m[0, 0, 0] = m[0, 1:, 1:] = 0.0
    losses = pair_losses(PairLogprobs(m, None, torch.ones(1, 4)), TrainConfig(objective="sami"))
    assert losses.tolist() == pytest.approx([(3 * math.log(3) + 3 * math.log(3)) / 4 / 2])


def test_infonce_against_one_rejected_response_is_dpo() -> None:
    logprobs = made_logprobs("infonce", rejected=1)
    losses = [pair_losses(logprobs, TrainConfig(objective=objective)) for objective in ("infonce", "dpo")]
    torch.testing.assert_close(*losses)


# Rewards and what is refused.


def test_rewards_are_scaled_log_ratios_without_gradient() -> None:
    logprobs = PairLogprobs(
        policy=torch.tensor([[[-3.0, -4.0, -6.0]], [[-5.0, -5.0, -5.0]]], requires_grad=True),
        reference=torch.tensor([[[-3.5, -4.0, -2.0]], [[-4.0, -5.5, -5.0]]]),
        tokens=torch.tensor([[2, 3, 4], [5, 6, 7]]),
    )
    found = rewards(logprobs, beta=0.2)
    torch.testing.assert_close(found, torch.tensor([[0.1, 0.0, -0.8], [-0.2, 0.1, 0.0]]))
    assert not found.requires_grad
    with pytest.raises(ValueError, match=r"reference: expected .* found None"):
        rewards(replace(logprobs, reference=None), beta=0.2)


def test_ties_count_half() -> None:
    accuracy = ranked_correctly(torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.0, 0.0, 0.0]))
    assert accuracy.tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("policy", "reference", "tokens", "message"),
    [
        ((3, 2), (3, 1, 2), (3, 2), r"policy: expected \[pairs, prompts, responses\], found \[3, 2\]"),
        ((3, 1, 2), (1, 1, 2), (3, 2), r"reference: expected the policy's shape \[3, 1, 2\], found \[1, 1, 2\]"),
        ((3, 1, 2), (3, 1, 1), (3, 2), r"reference: expected the policy's shape \[3, 1, 2\], found \[3, 1, 1\]"),
        ((3, 1, 2), (3, 1, 2), (1, 2), r"tokens: expected \[pairs, responses\] = \[3, 2\], found \[1, 2\]"),
        ((3, 1, 2), (3, 1, 2), (3,), r"tokens: expected \[pairs, responses\] = \[3, 2\], found \[3\]"),
    ],
)
def test_shapes_that_would_broadcast_are_refused(
    policy: tuple[int, ...], reference: tuple[int, ...], tokens: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PairLogprobs(torch.zeros(policy), torch.zeros(reference), torch.ones(tokens))


@pytest.mark.parametrize(
    ("objective", "shape", "message"),
    [
        ("dpo", (3, 1, 1), "objective dpo: expected .* at least one rejected response, found 1 responses"),
        ("ipo", (3, 2, 2), "objective ipo: expected one prompt, found 2"),
        ("infonce", (3, 2, 3), "objective infonce: expected one prompt, found 2"),
        ("sami", (3, 1, 3), r"objective sami: expected as many prompts as responses \(3\), found 1"),
        ("sami", (3, 1, 1), "objective sami: expected .* at least one rejected response, found 1"),
        ("sft", (3, 1, 2), "objective sft: expected the chosen response alone, found 2"),
        ("sft", (3, 2, 1), "objective sft: expected one prompt, found 2"),
    ],
)
def test_prompts_and_responses_of_another_objective_are_refused(
    objective: Any, shape: tuple[int, int, int], message: str
) -> None:
    logprobs = PairLogprobs(torch.zeros(shape), torch.zeros(shape), torch.ones(shape[0], shape[2]))
    with pytest.raises(ValueError, match=message):
        pair_losses(logprobs, TrainConfig(objective=objective))


@pytest.mark.parametrize("objective", ["dpo", "ipo", "infonce"])
def test_a_missing_reference_is_refused(objective: Any) -> None:
    with pytest.raises(ValueError, match="reference: expected log-probs of the reference, found None"):
        pair_losses(PairLogprobs(torch.zeros(3, 1, 2), None, torch.ones(3, 2)), TrainConfig(objective=objective))


# TRL.


def tiny_llama(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def ragged_pairs(count: int, seed: int) -> list[dict[str, list[int]]]:
    generator = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return generator.integers(0, VOCABULARY, generator.integers(low, high)).tolist()

    return [{"prompt_ids": ids(2, 9), "chosen_ids": ids(1, 9), "rejected_ids": ids(1, 9)} for _ in range(count)]


@pytest.fixture(scope="module")
def reference() -> Any:
    return tiny_llama(seed=0)


@pytest.fixture(scope="module")
def policy(reference: Any) -> Any:
    """The reference, moved far enough that first losses are left behind and rewards differ between pairs."""
    policy = copy.deepcopy(reference)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return policy


@pytest.fixture(scope="module")
def trl_trainer(policy: Any, reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trl_dpo_trainer(
        policy, reference, vocabulary=VOCABULARY, beta=BETA, directory=tmp_path_factory.mktemp("trl")
    )


def trl_loss(trainer: Any, pairs: list[dict[str, list[int]]], losses: dict[str, float]) -> Tensor:
    """TRL's weighted sum of its losses, {its name: weight}, on the batch of these pairs."""
    trainer.loss_types, trainer.loss_weights = list(losses), list(losses.values())
    return trainer.compute_loss(trainer.model, trainer.data_collator(pairs))


def plain_logprob(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """From the logits of the whole sequence, one sequence at a time."""
    logits = model(torch.tensor([prompt + response])).logits[0, :-1].log_softmax(dim=-1)
    return sum(logits[len(prompt) - 1 + index, token] for index, token in enumerate(response))


def our_loss(policy: Any, reference: Any, pairs: list[dict[str, list[int]]], train: TrainConfig) -> Tensor:
    sides = ("chosen_ids",) if train.objective == "sft" else ("chosen_ids", "rejected_ids")

    def logprobs(model: Any) -> Tensor:
        rows = [torch.stack([plain_logprob(model, pair["prompt_ids"], pair[side]) for side in sides]) for pair in pairs]
        return torch.stack(rows)[:, None, :]

    with torch.no_grad():
        of_reference = logprobs(reference)
    tokens = torch.tensor([[len(pair[side]) for side in sides] for pair in pairs])
    return pair_losses(PairLogprobs(logprobs(policy), of_reference, tokens), train).mean()


def assert_agrees_with_trl(trainer: Any, expected: Tensor, policy: Any, found: Tensor) -> None:
    """The losses and the gradients of every parameter."""
    trainer.model.zero_grad()
    expected.backward()
    policy.zero_grad()
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    trl_gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    for name, parameter in policy.named_parameters():
        scale = trl_gradients[name].abs().max().item()
        assert scale > 0
        torch.testing.assert_close(parameter.grad, trl_gradients[name], atol=1e-5 * max(scale, 1), rtol=0, msg=name)


@pytest.mark.parametrize(
    ("losses", "options"),
    [
        ({"sigmoid": 1.0}, {"objective": "dpo"}),
        ({"sigmoid": 1.0}, {"objective": "infonce"}),
        ({"sigmoid_norm": 1.0}, {"objective": "dpo", "length_normalized": True}),
        ({"ipo": 1.0}, {"objective": "ipo", "length_normalized": True}),
    ],
    ids=["dpo", "infonce", "length-normalised dpo", "ipo"],
)
def test_losses_and_gradients_agree_with_trl(
    trl_trainer: Any, policy: Any, reference: Any, losses: dict[str, float], options: dict[str, Any]
) -> None:
    pairs = ragged_pairs(5, seed=2)
    found = our_loss(policy, reference, pairs, TrainConfig(beta=BETA, **options))
    first = 1 / (4 * BETA**2) if "ipo" in losses else math.log(2)
    assert abs(found.item() - first) > 1e-3
    assert_agrees_with_trl(trl_trainer, trl_loss(trl_trainer, pairs, losses), policy, found)


def test_label_smoothing_agrees_with_trl_on_swapped_labels(trl_trainer: Any, policy: Any, reference: Any) -> None:
    """Conservative DPO is DPO in expectation over labels that are swapped with probability label_smoothing."""
    pairs = ragged_pairs(5, seed=2)
    swapped = [{**pair, "chosen_ids": pair["rejected_ids"], "rejected_ids": pair["chosen_ids"]} for pair in pairs]
    expected = 0.9 * trl_loss(trl_trainer, pairs, {"sigmoid": 1.0})
    expected = expected + 0.1 * trl_loss(trl_trainer, swapped, {"sigmoid": 1.0})
    found = our_loss(policy, reference, pairs, TrainConfig(beta=BETA, label_smoothing=0.1))
    assert_agrees_with_trl(trl_trainer, expected, policy, found)


@pytest.mark.parametrize(
    ("losses", "options"),
    [
        ({"sft": 1.0}, {"objective": "sft"}),
        ({"sigmoid": 1.0, "sft": 0.7}, {"objective": "dpo", "nll_coefficient": 0.7}),
    ],
    ids=["sft", "dpo with nll"],
)
def test_likelihood_of_the_chosen_agrees_with_trl(
    trl_trainer: Any, policy: Any, reference: Any, losses: dict[str, float], options: dict[str, Any]
) -> None:
    """Pair by pair: over a batch TRL averages tokens, here each pair has the same weight whatever its length."""
    pairs = ragged_pairs(3, seed=4)
    expected = sum(trl_loss(trl_trainer, [pair], losses) for pair in pairs) / len(pairs)
    found = our_loss(policy, reference, pairs, TrainConfig(beta=BETA, **options))
    assert_agrees_with_trl(trl_trainer, expected, policy, found)
