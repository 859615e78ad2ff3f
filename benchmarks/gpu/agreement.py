"""Losses and gradients of every layout and attention backend beside plain torch, in float32 and bfloat16.

The plain computation is a few lines: each sequence alone through the model with eager attention, all logits, a
log-softmax over them. Its float32 result is what all are compared with; its bfloat16 result shows what that precision
costs anybody.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.trainer_workload import MODEL_SHAPES, Shape, random_pairs

BETA = 0.1
# Layout, attention, and whether the layers are compiled.
SETTINGS = (("padded", "sdpa", False), ("packed", "sdpa", False), ("shared", "sdpa", False), ("shared", "sdpa", True))
GPU_SETTINGS = (("packed", "flex_attention", False), ("shared", "flex_attention", False))
# Ragged, so that padding, other lengths and blocks that are masked in part are in it.
PAIRS = Shape("ragged", (30, 300), (5, 200), 6)
# Largest differences in float32: of a loss in nats, and of the gradient by its norm.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
# In bfloat16 ours may differ from float32 by so many times as much as plain torch in bfloat16 does.
BFLOAT16_FACTOR = 2.0

Gradients = dict[str, Tensor]


def measure(device: str, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of dtype, layout, attention, loss, loss_difference, gradient_difference and whether both are allowed."""
    pairs = random_pairs(PAIRS, vocabulary=MODEL_SHAPES["small"]["vocab_size"], seed=seed)
    expected_loss, expected = _plain(pairs, "float32", device)
    allowed = {"float32": (LOSS_TOLERANCE, GRADIENT_TOLERANCE)}
    for dtype in ("float32", "bfloat16"):
        loss, gradients = _plain(pairs, dtype, device)
        own = abs(loss - expected_loss), _difference(gradients, expected)
        if dtype == "bfloat16":
            allowed[dtype] = (max(BFLOAT16_FACTOR * own[0], 0.01), BFLOAT16_FACTOR * own[1])
        yield _row(dtype, "one by one", "eager (plain torch)", loss, own, allowed[dtype])
        for setting in SETTINGS + (GPU_SETTINGS if device == "cuda" else ()):
            loss, gradients = _ours(pairs, dtype, device, setting)
            found = abs(loss - expected_loss), _difference(gradients, expected)
            layout, attention, compiled = setting
            yield _row(dtype, layout, attention + ", compiled" * compiled, loss, found, allowed[dtype])


def _row(
    dtype: str, layout: str, attention: str, loss: float, found: tuple[float, float], allowed: tuple[float, float]
) -> dict[str, Any]:
    within = all(value <= bound for value, bound in zip(found, allowed, strict=True))
    names = ("loss_difference", "gradient_difference")
    return {
        "dtype": dtype,
        "layout": layout,
        "attention": attention,
        "loss": loss,
        **dict(zip(names, found, strict=True)),
        "allowed": list(allowed),
        "within": within,
    }


def _models(dtype: str, device: str) -> tuple[Any, Any]:
    """Policy and reference: the same random weights, those of the reference moved a little."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**MODEL_SHAPES["small"])
    policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    reference.load_state_dict(policy.state_dict())
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05 * float(parameter.std(correction=0)))
    return tuple(model.to(getattr(torch, dtype)).to(device) for model in (policy, reference))  # type: ignore[return-value]


def _plain(pairs: list[dict[str, Any]], dtype: str, device: str) -> tuple[float, Gradients]:
    policy, reference = _models(dtype, device)
    for model in (policy, reference):
        model.set_attn_implementation("eager")

    def logprob(model: Any, prompt: list[int], response: list[int]) -> Tensor:
        ids = torch.tensor([prompt + response], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum()

    losses = []
    for pair in pairs:
        prompt = pair["prompt_token_ids"]
        ratios = []
        for response in (pair["chosen_token_ids"], pair["rejected_token_ids"][0]):
            with torch.no_grad():
                frozen = logprob(reference, prompt, response)
            ratios.append(logprob(policy, prompt, response) - frozen)
        losses.append(-torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1])))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), _gradients(policy)


def _ours(
    pairs: list[dict[str, Any]], dtype: str, device: str, setting: tuple[str, str, bool]
) -> tuple[float, Gradients]:
    from mipo_ray.config.train import TrainConfig
    from mipo_ray.training.attention import use_attention
    from mipo_ray.training.deepspeed_engine import compile_layers
    from mipo_ray.training.layout import lay_out, read_pair
    from mipo_ray.training.logprobs import response_logprobs
    from mipo_ray.training.loss import PairLogprobs, pair_losses

    layout, attention, compiled = setting
    train = TrainConfig.model_validate({"beta": BETA, "layout": layout, "attention": attention})
    policy, reference = _models(dtype, device)
    for model in (policy, reference):
        use_attention(model, train.attention, train.layout)
        if compiled:
            compile_layers(model)
    trees = [tree for pair in pairs for tree in read_pair(pair, train.objective).trees]
    batch = lay_out(trees, train.layout).to(device)
    with torch.no_grad():
        frozen = response_logprobs(reference, batch).view(-1, 1, 2)
    logprobs = PairLogprobs(
        policy=response_logprobs(policy, batch).view(-1, 1, 2),
        reference=frozen,
        tokens=torch.tensor([tree.lengths.responses for tree in trees], device=device),
    )
    loss = pair_losses(logprobs, train).mean()
    loss.backward()
    return loss.item(), _gradients(policy)


def _gradients(model: Any) -> Gradients:
    return {name: parameter.grad.float() for name, parameter in model.named_parameters()}


def _difference(found: Gradients, expected: Gradients) -> float:
    """The norm of the difference of all gradients, over that of the expected ones."""
    squares = sum(float((found[name] - value).square().sum()) for name, value in expected.items())
    norms = sum(float(value.square().sum()) for value in expected.values())
    return float((squares / norms) ** 0.5)
