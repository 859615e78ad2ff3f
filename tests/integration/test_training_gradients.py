"""Every parameter's gradient of one optimizer step through DeepSpeed, against plain torch and across reference modes.

python -m pytest tests/integration/test_training_gradients.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mipo_ray.config.train import TrainConfig
from mipo_ray.training.deepspeed_engine import join_process_group, policy_and_reference, quiet_libraries
from mipo_ray.training.step import optimizer_step
from tests.helpers.covering import combinations
from tests.helpers.tiny_families import assert_gradients_agree, plain_logprobs, tiny_model
from tests.helpers.tiny_training import ragged_pairs, read_all

BETA = 0.5
LAYOUTS = ("padded", "packed", "shared")
# 7 pairs with 2 rejected responses each.
PAIRS = read_all(
    [
        {**pair, "rejected_token_ids": [*pair["rejected_token_ids"], other["chosen_token_ids"]]}
        for pair, other in zip(ragged_pairs(7), ragged_pairs(7, seed=1), strict=True)
    ]
)


class KeepsGradients:
    """A DeepSpeed engine that keeps the gradients of the step that it takes, unclipped and whole."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.gradients: dict[str, Tensor] = {}

    def __call__(self, batch: Any) -> Tensor:
        return self._engine(batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> None:
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self._engine.module.model.named_parameters():
            if parameter.requires_grad:
                self.gradients[name] = safe_get_full_grad(parameter).clone()
        self._engine.step()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A policy and a reference that differ, so that no loss is ln 2 and no two pairs weigh the same."""
    directory = tmp_path_factory.mktemp("models")
    found = {}
    for seed, name in enumerate(("policy", "reference")):
        tiny_model(seed=seed).save_pretrained(directory / name)
        found[name] = directory / name
    quiet_libraries("cpu")
    join_process_group("cpu")
    return found


def gradients_of(policy: Path, reference: Path, **options: Any) -> dict[str, Tensor]:
    """By name, after one step on all pairs in several micro-batches."""
    torch.manual_seed(0)  # of the adapters
    train = TrainConfig(beta=BETA, batch_size=len(PAIRS), micro_batch_tokens=60, **options)
    engine, frozen = policy_and_reference(
        str(policy),
        str(reference),
        train,
        "float32",
        "cpu",
        trust_remote_code=False,
        steps=lambda: [PAIRS],
        pair_count=len(PAIRS),
        cache=None,
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            if "lora_B" in name:  # at zero, where training starts, the gradient of lora_A would be zero
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    keeper = KeepsGradients(engine)
    optimizer_step(keeper, frozen, PAIRS, train, 1e-6, 0)
    return keeper.gradients


@pytest.fixture(scope="module")
def plain(models) -> dict[str, Tensor]:
    """By single sequences and full logits."""
    from transformers import AutoModelForCausalLM

    policy, reference = (AutoModelForCausalLM.from_pretrained(models[name]) for name in ("policy", "reference"))
    for pair in PAIRS:
        with torch.no_grad():
            frozen = plain_logprobs(reference, pair.trees)
        ratios = plain_logprobs(policy, pair.trees) - frozen
        (-logsigmoid(BETA * (ratios[0] - ratios[1:])).mean() / len(PAIRS)).backward()
    return {name: parameter.grad for name, parameter in policy.named_parameters()}


@pytest.mark.parametrize(
    ("zero_stage", "reference_mode", "layout"), combinations([0, 1, 2, 3], ["colocated", "cached"], LAYOUTS)
)
def test_every_gradient_is_that_of_plain_torch(models, plain, zero_stage, reference_mode, layout):
    found = gradients_of(
        models["policy"], models["reference"], zero_stage=zero_stage, reference_mode=reference_mode, layout=layout
    )
    assert_gradients_agree(found, plain)


def test_every_gradient_of_adapters_is_the_same_with_every_reference_and_layout(models):
    lora = {"zero_stage": 0, "lora": {"rank": 4}}
    expected = gradients_of(models["policy"], models["policy"], reference_mode="adapter", layout="padded", **lora)
    assert len(expected) == 2 * 2 * 7  # a and b, of 7 linear layers in each of 2 layers
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for reference_mode in ("adapter", "colocated", "cached"):
        for layout in LAYOUTS:
            found = gradients_of(
                models["policy"], models["policy"], reference_mode=reference_mode, layout=layout, **lora
            )
            assert_gradients_agree(found, expected)


def bytes_held(weight: Any) -> int:
    """Of a parameter, by a weak reference, and of this worker's shard of it."""
    tensors = [weight(), getattr(weight(), "ds_tensor", None)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_cached_reference_is_gone_before_the_policy_is_loaded(models, monkeypatch, zero_stage):
    import weakref

    from mipo_ray.training import deepspeed_engine as prepare

    weights: list[Any] = []
    load_reference, load_policy = prepare.reference_module, prepare.policy_engine

    def reference_seen(*arguments: Any, **options: Any) -> Any:
        module = load_reference(*arguments, **options)
        weights.extend(weakref.ref(parameter) for parameter in module.parameters())
        assert sum(map(bytes_held, weights)) > 10_000
        return module

    def policy_after(*arguments: Any, **options: Any) -> Any:
        assert sum(map(bytes_held, weights)) == 0
        return load_policy(*arguments, **options)

    monkeypatch.setattr(prepare, "reference_module", reference_seen)
    monkeypatch.setattr(prepare, "policy_engine", policy_after)
    gradients_of(models["policy"], models["reference"], zero_stage=zero_stage, reference_mode="cached")
