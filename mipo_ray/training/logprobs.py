"""Log-probabilities of responses under a causal language model, without logits for the prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mipo_ray.training.layout import SequenceBatch

# Positions whose logits are turned into float32 log-probs at a time: bounds the float32 copy to
# POSITIONS_PER_CHUNK x vocabulary x 4 bytes (0.6 GiB for 150k entries) whatever the batch.
POSITIONS_PER_CHUNK = 1024


class ResponseLogprobs(nn.Module):
    """A causal language model whose forward returns the log-probs of responses.

    It is a module, and not only the function below, because DeepSpeed's engine must wrap what is called in training:
    gradient reduction and ZeRO-3's parameter gathering hang on the engine's own forward.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
        """[sequences] float32; see `response_logprobs`. The three inputs are the fields of a `SequenceBatch`."""
        return response_logprobs(self.model, SequenceBatch(input_ids, attention_mask, response_mask))


def response_logprobs(model: Any, batch: SequenceBatch) -> Tensor:
    """Sum over the response tokens of log p(token | everything before it): [sequences], float32, nats.

    `model` is a transformers causal language model on the device of `batch`. The model's own forward runs, so that
    whatever it does to its logits (soft-capping, scaling) is kept; only the rows of hidden states that predict a
    response token are let through to its output head, so that the prompt and the padding cost no logits.

    Raises ValueError for a model whose forward does not apply its output head exactly once, position by position.
    """
    # Position t predicts token t + 1.
    predicting = torch.zeros_like(batch.response_mask)
    predicting[:, :-1] = batch.response_mask[:, 1:]
    logits = _logits_at(model, batch, predicting)
    targets = batch.input_ids[batch.response_mask].to(logits.device)  # a model may end on another device
    token_logprobs = torch.cat(
        [
            _chunk_logprobs(chunk, chunk_targets)
            for chunk, chunk_targets in zip(
                logits.split(POSITIONS_PER_CHUNK), targets.split(POSITIONS_PER_CHUNK), strict=True
            )
        ]
    )
    sequence_of_token = batch.response_mask.nonzero()[:, 0].to(logits.device)
    sums = torch.zeros(batch.input_ids.shape[0], dtype=torch.float32, device=token_logprobs.device)
    return sums.index_add(0, sequence_of_token, token_logprobs)


def _logits_at(model: Any, batch: SequenceBatch, positions: Tensor) -> Tensor:
    """[selected positions, vocabulary]: the model's logits where `positions` ([sequences, tokens], bool) is true."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: expected a causal language model")
    applications = 0

    def keep_selected(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal applications
        applications += 1
        hidden, *others = inputs
        if hidden.shape[:2] != positions.shape:
            raise ValueError(
                f"{type(model).__name__}: expected its output head to see hidden states of {tuple(positions.shape)} "
                f"[sequences, tokens], found {tuple(hidden.shape[:2])}"
            )
        return (hidden[positions.to(hidden.device)].unsqueeze(0), *others)

    handle = head.register_forward_pre_hook(keep_selected)
    try:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    finally:
        handle.remove()
    if applications != 1 or logits.dim() != 3 or logits.shape[:2] != (1, int(positions.sum())):
        raise ValueError(
            f"{type(model).__name__}: expected a forward that applies its output head once and returns one row of "
            f"logits for each position, found {applications} applications and logits of shape {tuple(logits.shape)}"
        )
    return logits[0]


def _chunk_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """[positions] float32 log-softmax of `logits` ([positions, vocabulary]) at `targets` ([positions])."""
    if torch.is_grad_enabled() and logits.requires_grad:
        # Recomputing the float32 softmax in backward is cheaper than keeping it for the whole batch.
        return checkpoint(_target_logprobs, logits, targets, use_reentrant=False, preserve_rng_state=False)
    return _target_logprobs(logits, targets)


def _target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return -nn.functional.cross_entropy(logits.float(), targets, reduction="none")
