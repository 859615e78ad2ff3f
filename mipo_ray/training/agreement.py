"""Whether the sampler and the trainer are the same model: their log-probs of the same response under the same prompt.

vLLM and transformers implement every model anew. Where they read one model directory differently, a round would train
on noise and call it an improvement. Both numbers exist for nothing: the sampler's beside each response, the trainer's
in each forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import distributed

from mipo_ray.errors import UserError

USUAL_CAUSES = (
    "These are two models, and nothing that is trained or measured with both means anything. Usual causes: rotary "
    "positions in config.json that they read differently (rope_scaling, rope_parameters, a window that is too long), "
    "weights or adapters that one of them leaves out, an engine argument (generation.pool.engine_args) that changes "
    "the model, pairs that another policy sampled, or a family that one of them implements differently "
    "(tests/nightly/test_model_zoo.py names those that were compared)"
)


class SamplerDisagrees(UserError):
    """The engine that sampled is another model than the one that is trained. To try again would end the same way."""


@dataclass(frozen=True)
class Comparison:
    """One response's log-prob, in nats, summed over its tokens, by the sampler and by the model that is trained."""

    name: str  # of the pair or the held-out answer, as a message says it
    tokens: int
    sampler: float
    trainer: float

    def excess(self, dtype: torch.dtype) -> float:
        """The difference over what is allowed: above 1 the two are different models; infinite for one that is nan."""
        difference = abs(self.sampler - self.trainer)
        return difference / allowed_difference(self, dtype) if difference == difference else float("inf")


def allowed_difference(comparison: Comparison, dtype: torch.dtype) -> float:
    """How far the two may be apart, in nats, for a response of so many tokens.

    Measured with the models of the zoo and the embedded one (`tests/nightly/test_model_zoo.py`): in float32 kernels sum
    in another order, which changes a token's log-prob by some 1e-5; the bound leaves a hundred times that, and products
    of 10-bit mantissas (TF32) room. In bfloat16 logits have 8 bits, so that those about 20 are 0.1 apart: a token's
    log-prob differs by some 0.02, unlikely ones by a share of their size, and a router may choose another expert. Wrong
    positions, a lost adapter or another scale of attention make tenths of nats or more of every token.
    """
    if dtype == torch.float32:
        return 0.02 + 1e-3 * comparison.tokens
    return 0.5 + 0.05 * comparison.tokens + 0.02 * abs(comparison.trainer)


def check_agreement(comparisons: Sequence[Comparison], dtype: torch.dtype) -> None:
    """Raises SamplerDisagrees, naming the worst of them, where sampler and trainer are too far apart."""
    if (worst := _worst(comparisons, dtype)) is not None and worst.excess(dtype) > 1:
        raise SamplerDisagrees(
            f"{worst.name}: the engine that sampled it gave it a log-prob of {worst.sampler:.4f}, the model that is "
            f"trained and scored gives {worst.trainer:.4f} (nats, {worst.tokens} tokens; expected at most "
            f"{allowed_difference(worst, dtype):.3g} between them in {str(dtype).removeprefix('torch.')}). "
            f"{USUAL_CAUSES}"
        )


def check_agreement_of_workers(comparisons: Sequence[Comparison], dtype: torch.dtype, device: torch.device) -> None:
    """As `check_agreement`, of the comparisons of all workers; raises on all of them, and all must call it."""
    worst = _worst(comparisons, dtype)
    excess = torch.tensor(0.0 if worst is None else worst.excess(dtype), device=device)
    distributed.all_reduce(excess, distributed.ReduceOp.MAX)
    if excess <= 1:
        return
    found: list[Comparison | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, worst)
    check_agreement([comparison for comparison in found if comparison is not None], dtype)


def _worst(comparisons: Sequence[Comparison], dtype: torch.dtype) -> Comparison | None:
    return max(comparisons, key=lambda comparison: comparison.excess(dtype), default=None)
