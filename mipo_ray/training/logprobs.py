"""Log-probs of responses under a causal language model: log p(y | x) = sum_t log p(y_t | x, y_<t), in nats.

The logits of all tokens would be [tokens, vocabulary]; here they exist for one chunk of response tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mipo_ray.config.train import Layout
from mipo_ray.errors import UserError
from mipo_ray.training.attention import attention_inputs
from mipo_ray.training.layout import TokenBatch, Tree, lay_out

# Bytes of one chunk's float32 logits; backward holds one more buffer of this size. Peak memory does not grow with the
# prompt or the response: more tokens are more chunks. On a GPU small chunks wait for the gradient of the head's weight,
# which each reads and writes whole: 8,192 tokens by 151,936 took 89 ms in chunks of 128 MiB, 59 in such of 512
# (benchmarks/results/gpu_explorations.md).
CHUNK_BYTES = 128 * 1024**2
GPU_CHUNK_BYTES = 512 * 1024**2


@dataclass(frozen=True)
class LogitTreatment:
    """What a family does to the output of its head: logits = softcap * tanh(scale * output / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


class ResponseLogprobs(nn.Module):
    """A causal language model whose forward returns the log-probs of responses.

    It is a module, and not only the function below, because DeepSpeed's engine must wrap what is called in training:
    gradient reduction and ZeRO-3's parameter gathering hang on the engine's own forward.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch) -> Tensor:
        """[responses] float32; see `response_logprobs`."""
        return response_logprobs(self.model, batch)


def response_logprobs(model: Any, batch: TokenBatch) -> Tensor:
    """log p(y | x) of each response: [responses] float32, nats; of `token_logprobs` the sums."""
    return sum_by_response(token_logprobs(model, batch), batch)


def sum_by_response(logprobs: Tensor, batch: TokenBatch) -> Tensor:
    """The sums over each response of the log-probs of its tokens: [response tokens] to [responses] float32."""
    # log p(y | x) = sum_t log p(y_t | x, y_<t): [responses]
    sums = torch.zeros(batch.response_count, dtype=torch.float32, device=logprobs.device)
    return sums.index_add(0, batch.response_index.to(logprobs.device), logprobs)


def token_logprobs(model: Any, batch: TokenBatch) -> Tensor:
    """log p(y_t | x, y_<t) of each token of the responses, one response after the other: [response tokens] float32,
    nats.

    model   a transformers causal language model; for packed and shared rows set up by `attention.use_attention`
    batch   see `TokenBatch`; on the model's device

    The backbone runs over all tokens, the output head over the response tokens only, chunk by chunk; backward computes
    each chunk's logits again.

    Raises ValueError for a model without a linear output head, or without a backbone that runs alone.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{type(model).__name__}: expected a linear output head, found {type(head).__name__}")
    if model.base_model is model:  # how transformers says that there is none under the family's usual name
        raise ValueError(f"{type(model).__name__}: expected a backbone {model.base_model_prefix!r}, found none")
    outputs = model.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **attention_inputs(model, batch)
    )
    # [rows, tokens, hidden] to [response tokens, hidden]: the states that predict a token of a response
    states = outputs.last_hidden_state.flatten(0, 1)[batch.predicting.to(outputs.last_hidden_state.device)]
    states = states.to(head.weight.device)  # a model spread over several devices may have its head on another one
    with _scoring(head, logit_treatment(model.config)):
        logprobs: Tensor = head(states, batch.targets.to(states.device))
    return logprobs


def logit_treatment(config: Any) -> LogitTreatment:
    """How the family of a transformers configuration turns the head's output into logits, by its published fields."""
    text = config.get_text_config()
    scale = 1.0
    if getattr(text, "logit_scale", None) is not None:  # Cohere
        scale = float(text.logit_scale)
    elif getattr(text, "logits_scaling", None) is not None:  # Granite
        scale = 1.0 / float(text.logits_scaling)
    return LogitTreatment(scale=scale, softcap=getattr(text, "final_logit_softcapping", None))  # Gemma 2 and 3


def check_logprobs(model: Any, layout: Layout, device: torch.device | str) -> None:
    """Tries `response_logprobs` on a few tokens in this layout, against the model's own logits of single sequences.

    Families differ in what they do between hidden states and logits, in how they take positions, and in what reaches
    their attention. This finds out before anything is trained.

    Raises UserError, naming the model and the layout, when the two differ.
    """
    ids = np.arange(24) % min(24, model.config.get_text_config().vocab_size)
    trees = [Tree(ids[:5], (ids[5:8], ids[8:9])), Tree(ids[9:11], (ids[11:15], ids[15:24]))]
    # bfloat16 keeps 8 bits: sums over up to 9 tokens differ by some hundredths. Wrong masks differ by more.
    absolute, relative = (1e-3, 0.0) if model.dtype == torch.float32 else (0.25, 0.02)  # nats, and of the log-prob
    try:
        with torch.no_grad():
            found = response_logprobs(model, lay_out(trees, layout).to(device))
            expected = torch.cat(
                [_own_logprob(model, Tree(t.prompt, (r,)), layout, device) for t in trees for r in t.responses]
            ).to(found.device)
    except ValueError as error:
        raise UserError(f"train.layout: {layout} does not fit {type(model).__name__}: {error}") from error
    differences = (found - expected).abs()
    if not bool((differences <= absolute + relative * expected.abs()).all()):  # also for nan
        raise UserError(
            f"train.layout: {type(model).__name__} cannot honour {layout}: log-probs of single sequences differ by "
            f"{differences.max().item():.3g} nats from those of the layout (expected at most {absolute:g}"
            + (f" and {relative:.0%} of each" if relative else "")
            + "); choose layout padded"
        )


def _own_logprob(model: Any, tree: Tree, layout: Layout, device: torch.device | str) -> Tensor:
    """[1] float32: the log-prob of a tree's only response by the model's own forward and its full logits.

    Laid out as one plain causal sequence, also for layout shared, so that a branch's sight of its prompt is checked.
    """
    batch = lay_out([tree], "padded" if layout == "padded" else "packed").to(device)
    logits = model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **attention_inputs(model, batch)
    ).logits
    # [rows, tokens, vocabulary] to [response tokens, vocabulary]
    logprobs = logits.flatten(0, 1)[batch.predicting].float().log_softmax(dim=-1)
    # sum_t log p(y_t | x, y_<t): [1]
    return logprobs.gather(1, batch.targets.to(logprobs.device)[:, None]).sum(dim=0)


def head_logprobs(
    head: nn.Linear, states: Tensor, targets: Tensor, treatment: LogitTreatment = LogitTreatment()
) -> Tensor:
    """log p(target) at each position by an output head: [positions] float32, nats.

    states    [positions, hidden], of the head's dtype
    targets   [positions] int64
    """
    return _TokenLogprobs.apply(states, head.weight, head.bias, targets, treatment)


@contextmanager
def _scoring(head: nn.Linear, treatment: LogitTreatment) -> Iterator[None]:
    """Inside it, calling `head` with (states, targets) gives token log-probs.

    The head itself is called, and not a function of its weight, so that DeepSpeed's ZeRO-3 hooks on it gather the
    weight for forward and backward.
    """

    def forward(states: Tensor, targets: Tensor) -> Tensor:
        return head_logprobs(head, states, targets, treatment)

    before = vars(head).get("forward")
    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before  # type: ignore[method-assign]


class _TokenLogprobs(torch.autograd.Function):
    """log p(target) at each position: [positions] float32, nats.

    states    [positions, hidden]
    weight    [vocabulary, hidden], of the output head
    bias      [vocabulary], or None
    targets   [positions] int64

    With u = states @ weight.T + bias and z = treated(u), both [positions, vocabulary],
    log p(target) = z[target] - log sum_v exp(z[v]). u and z exist for one chunk of positions at a time, in float32;
    backward computes them again from the states, so that nothing of size [positions, vocabulary] is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, treatment: LogitTreatment
    ) -> Tensor:
        logprobs = torch.empty(states.shape[0], dtype=torch.float32, device=states.device)
        normalizers = torch.empty_like(logprobs)
        for chunk in _chunks(states, weight):
            logits = _logits(states[chunk], weight, bias, treatment)  # z: [chunk, vocabulary]
            normalizers[chunk] = logits.logsumexp(dim=-1)  # log sum_v exp(z[v]): [chunk]
            logprobs[chunk] = logits.gather(1, targets[chunk, None]).squeeze(1) - normalizers[chunk]
        ctx.save_for_backward(states, weight, bias, targets, normalizers)
        ctx.treatment = treatment
        return logprobs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, normalizers = ctx.saved_tensors
        treatment: LogitTreatment = ctx.treatment
        for_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        # In float32 whatever the weight's dtype: sums over tokens and chunks would lose bits in bfloat16.
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        for chunk in _chunks(states, weight):
            logits = _logits(states[chunk], weight, bias, treatment)  # z: [chunk, vocabulary]
            slope = None
            if treatment.softcap is not None:
                # tanh(x)' = 1 - tanh(x)^2, where tanh(x) = z / softcap
                slope = 1 - (logits / treatment.softcap).square()
            # p = exp(z - log sum_v exp(z[v])), and of a target's log-prob the gradient at z is onehot(target) - p
            probabilities = logits.sub_(normalizers[chunk, None]).exp_()
            # gradient * (onehot(target) - p): [chunk, vocabulary]
            for_logits = probabilities.mul_(-gradient[chunk, None])
            for_logits.scatter_add_(1, targets[chunk, None], gradient[chunk, None])
            if slope is not None:
                for_logits.mul_(slope)
            if treatment.scale != 1.0:
                for_logits.mul_(treatment.scale)
            for_logits = for_logits.to(weight.dtype)  # G, the gradient at u: [chunk, vocabulary]
            if for_states is not None:
                for_states[chunk] = for_logits @ weight  # G @ weight: [chunk, hidden]
            if for_weight is not None:  # += G.T @ states: [vocabulary, hidden]
                _add_product(for_weight, for_logits.T, states[chunk])
            if for_bias is not None:
                for_bias += for_logits.sum(dim=0)  # sum over positions of G: [vocabulary]
        if for_weight is not None:
            for_weight = for_weight.to(weight.dtype)
        return for_states, for_weight, for_bias, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in float32; the factors may be bfloat16.

    total   [rows, columns] float32
    left    [rows, inner]
    right   [inner, columns]
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)  # CPUs have no such product
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _chunks(states: Tensor, weight: Tensor) -> list[slice]:
    """Of the positions; the float32 logits of each are so many bytes at most, or those of one position."""
    size = max(1, (GPU_CHUNK_BYTES if states.is_cuda else CHUNK_BYTES) // (4 * weight.shape[0]))
    return [slice(start, start + size) for start in range(0, states.shape[0], size)]


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, treatment: LogitTreatment) -> Tensor:
    """z = softcap * tanh(scale * u / softcap), u = states @ weight.T + bias: [positions, vocabulary] float32, new."""
    logits = nn.functional.linear(states, weight, bias).float()
    if treatment.scale != 1.0:
        logits.mul_(treatment.scale)
    if treatment.softcap is not None:
        logits.div_(treatment.softcap).tanh_().mul_(treatment.softcap)
    return logits
