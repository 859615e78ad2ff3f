"""One optimizer step of one worker: its pairs in micro-batches, their gradient, and what is said about them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from mipo_ray.config.train import Layout, TrainConfig
from mipo_ray.training.agreement import Comparison, bound_for, check_agreement_of_workers
from mipo_ray.training.layout import Pair, TokenBatch, Tree, TreeLengths, laid_out_tokens, lay_out, token_count
from mipo_ray.training.loss import PairLogprobs, pair_losses, ranked_correctly, rewards
from mipo_ray.training.reference import Reference

# Metrics of a step that are sums over its micro-batches; the others are means over its pairs.
COUNTS = ("pairs", "tokens", "forward_tokens", "padding")

# What a worker runs that has no pairs left while others have: all take part in the same collective operations.
_PLACEHOLDER = Tree(np.zeros(1, dtype=np.int64), (np.zeros(1, dtype=np.int64),))


class TrainingDiverged(RuntimeError):
    """A loss or gradient is no longer a finite number. Training the same pairs again would end the same way."""


@dataclass(frozen=True)
class MicroBatch:
    """Pairs and their laid-out trees. `pairs` is empty for one that only keeps a worker in step with the others."""

    pairs: list[Pair]
    batch: TokenBatch


def plan_micro_batches(pairs: Sequence[Pair], train: TrainConfig, device: torch.device | str) -> list[MicroBatch]:
    """This worker's pairs of one step as micro-batches, equally many on every worker; all workers must call it."""
    groups = micro_batches(pairs, layout=train.layout, most_tokens=train.micro_batch_tokens)
    count = torch.tensor(len(groups), device=device)
    distributed.all_reduce(count, distributed.ReduceOp.MAX)
    planned = []
    for group in in_groups(groups, int(count)):
        trees = [tree for pair in group for tree in pair.trees]
        planned.append(MicroBatch(group, lay_out(trees or [_PLACEHOLDER], train.layout).to(device)))
    return planned


def micro_batches(pairs: Sequence[Pair], *, layout: Layout, most_tokens: int) -> list[list[Pair]]:
    """A worker's pairs of one step in groups of at most `most_tokens` laid-out tokens, padding included.

    Pairs of like length are put together. One larger than `most_tokens` is a group of its own.
    """
    by_length = sorted(pairs, key=lambda pair: laid_out_tokens(pair.lengths, layout))
    groups: list[list[Pair]] = []
    lengths: list[TreeLengths] = []  # of the trees in the last group
    for pair in by_length:
        own = pair.lengths
        if groups and laid_out_tokens(lengths + own, layout) <= most_tokens:
            groups[-1].append(pair)
            lengths += own
        else:
            groups.append([pair])
            lengths = own
    return groups


def in_groups(groups: list[list[Pair]], count: int) -> list[list[Pair]]:
    """The same pairs in `count` groups, at least as many as there are: the largest are halved, then empty ones follow.

    Workers take part in the same collective operations, so that each must run equally many micro-batches.
    """
    groups = list(groups)
    while len(groups) < count:
        largest = max(range(len(groups)), key=lambda index: len(groups[index]), default=None)
        if largest is None or len(groups[largest]) < 2:
            groups.append([])
            continue
        middle = len(groups[largest]) // 2
        groups[largest : largest + 1] = [groups[largest][:middle], groups[largest][middle:]]
    return groups


def optimizer_step(
    engine: Any, reference: Reference | None, pairs: Sequence[Pair], train: TrainConfig, learning_rate: float, step: int
) -> dict[str, float]:
    """One AdamW step on this worker's `pairs` of the step; returns the step's metrics over all workers.

    The gradient is that of the mean loss over the pairs of all workers. Metrics: pairs, tokens (of all sequences,
    without padding), forward_tokens (that went through the policy, prompts shared or not), padding_share, loss, and
    those of `_describe`.

    Raises, on every worker alike, TrainingDiverged, naming `step`, and, before the update, SamplerDisagrees, naming a
    pair.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    workers = distributed.get_world_size()
    pair_count = torch.tensor(len(pairs), device=engine.device)
    distributed.all_reduce(pair_count)
    planned = plan_micro_batches(pairs, train, engine.device)
    sums = torch.zeros(len(_metric_names(train)), dtype=torch.float64, device=engine.device)
    comparisons: list[Comparison] = []
    for index, micro_batch in enumerate(planned):
        # The window is closed here and not by DeepSpeed's counter, so that steps may have any number of micro-batches.
        engine.set_gradient_accumulation_boundary(index == len(planned) - 1)
        # The reference first: what its forward pass needs is gone before the policy's activations are there.
        frozen = None if reference is None else reference(micro_batch.pairs, micro_batch.batch)
        policy = engine(micro_batch.batch)
        if not micro_batch.pairs:
            engine.backward(0.0 * policy.sum(), scale_wrt_gas=False)
            continue
        logprobs = _pair_logprobs(policy, frozen, micro_batch)
        comparisons += _beside_the_sampler(micro_batch.pairs, logprobs, train, step)
        losses = pair_losses(logprobs, train)
        # DeepSpeed averages the gradients of the workers.
        engine.backward(losses.sum() * (workers / pair_count), scale_wrt_gas=False)
        found = _describe(micro_batch, logprobs, losses.detach(), train)
        sums += torch.stack([found[name] for name in _metric_names(train)])
    bound = bound_for(engine.module.model, engine.device)
    check_agreement_of_workers(comparisons, bound, engine.device)
    distributed.all_reduce(sums)
    metrics = dict(zip(_metric_names(train), sums.tolist(), strict=True))
    counts = {name: int(metrics.pop(name)) for name in COUNTS}
    metrics = {name: value / counts["pairs"] for name, value in metrics.items()}
    _check_finite("loss", metrics["loss"], step)
    gradient_norm = _local_gradient_norm(engine)
    engine.step()
    if gradient_norm is None:
        gradient_norm = float(engine.get_global_grad_norm())
        if gradient_norm < 0:  # DeepSpeed's sign for gradients that are not finite
            gradient_norm = math.nan
    _check_finite("gradient norm", gradient_norm, step)
    padding_share = counts.pop("padding") / counts["forward_tokens"]
    return {**counts, "padding_share": padding_share, **metrics, "gradient_norm": gradient_norm}


def _pair_logprobs(policy: Tensor, reference: Tensor | None, micro_batch: MicroBatch) -> PairLogprobs:
    """The log-probs of responses, [responses] in the order of the trees, as [pairs, prompts, responses]."""
    pairs = micro_batch.pairs
    lengths = [pair.trees[0].lengths.responses for pair in pairs]
    if len({len(row) for row in lengths}) > 1:
        raise ValueError(
            f"pair {pairs[0].pair_id!r} and others: expected equally many rejected responses in every pair, found "
            f"{sorted({len(row) - 1 for row in lengths})}"
        )
    shape = (len(pairs), len(pairs[0].trees), len(lengths[0]))
    return PairLogprobs(
        policy=policy.view(shape),
        reference=None if reference is None else reference.view(shape),
        tokens=torch.tensor(lengths, device=policy.device),
    )


def _beside_the_sampler(
    pairs: Sequence[Pair], logprobs: PairLogprobs, train: TrainConfig, step: int
) -> list[Comparison]:
    """The chosen responses' log-probs by what sampled them and by the same model here.

    At step 0 that is the policy, which was not updated yet. Later it is the reference, where that is the round's start.
    Rejected responses were sampled under other prompts than the ones they are scored under.
    """
    is_first = step == 0
    if not is_first and (logprobs.reference is None or train.reference != "round_start"):
        return []
    same = logprobs.policy if is_first else logprobs.reference
    assert same is not None
    return [
        Comparison(f"pair {pair.pair_id!r}", len(pair.trees[0].responses[0]), pair.sampler_logprob, found)
        for pair, found in zip(pairs, same[:, 0, 0].tolist(), strict=True)
        if pair.sampler_logprob is not None
    ]


def _metric_names(train: TrainConfig) -> list[str]:
    names = [*COUNTS, "loss", "chosen_logprob"]
    names += ["rejected_logprob"] if train.objective != "sft" else []
    names += ["chosen_reward", "rejected_reward", "reward_margin", "reward_accuracy"] if train.needs_reference else []
    return names


def _describe(micro_batch: MicroBatch, logprobs: PairLogprobs, losses: Tensor, train: TrainConfig) -> dict[str, Tensor]:
    """Sums over a micro-batch's pairs, float64: COUNTS, the loss, and of policy and reference

    chosen_logprob, rejected_logprob (nats, of the whole response; the mean of the K rejected ones) and, where there is
    a reference, chosen_reward, rejected_reward, reward_margin (nats) and reward_accuracy, the share of rejected ones
    below the chosen one; ties count half.
    """
    own = logprobs.policy[:, 0].detach()
    mask = micro_batch.batch.attention_mask
    forward_tokens = micro_batch.batch.input_ids.numel()
    counts = {
        "pairs": len(micro_batch.pairs),
        "tokens": token_count(tree for pair in micro_batch.pairs for tree in pair.trees),
        "forward_tokens": forward_tokens,
        "padding": 0 if mask is None else forward_tokens - int(mask.sum()),
    }
    per_pair = {"loss": losses, "chosen_logprob": own[:, 0], "rejected_logprob": own[:, 1:].mean(dim=1)}
    if train.needs_reference:
        reward = rewards(logprobs, train.beta)
        chosen, rejected = reward[:, :1], reward[:, 1:]
        per_pair["chosen_reward"] = chosen[:, 0]
        per_pair["rejected_reward"] = rejected.mean(dim=1)
        per_pair["reward_margin"] = (chosen - rejected).mean(dim=1)
        per_pair["reward_accuracy"] = ranked_correctly(chosen.expand_as(rejected), rejected).mean(dim=1)
    sums = {name: value.double().sum() for name, value in per_pair.items()}
    return sums | {name: torch.tensor(value, dtype=torch.float64, device=own.device) for name, value in counts.items()}


def _local_gradient_norm(engine: Any) -> float | None:
    """The norm where DeepSpeed reports none (float32 without ZeRO, where every worker has all gradients), else None."""
    if engine.zero_optimization():
        return None
    return float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))


def _check_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise TrainingDiverged(
            f"step {step}: the {name} is {value}; lower train.learning_rate or train.beta, or train in float32"
        )
