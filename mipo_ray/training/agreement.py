"""Whether the sampler and the trainer are the same model: their log-probs of the same response under the same prompt.

vLLM and transformers implement every model anew. Where they read one model directory differently, a round would train
on noise and call it an improvement. Both numbers exist for nothing: the sampler's beside each response, the trainer's
in each forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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


@dataclass(frozen=True)
class Bound:
    """How far sampler and trainer may be apart where they are one model: `start` nats, `token` for each token of the
    response and `nat` for each nat of its log-prob. Of the responses that are compared at once the share `exceptions`
    may be further apart."""

    shown: str
    start: float
    token: float
    nat: float
    exceptions: float

    def allows(self, comparison: Comparison) -> float:
        """The largest difference, in nats."""
        return self.start + self.token * comparison.tokens + self.nat * abs(comparison.trainer)

    def excess(self, comparison: Comparison) -> float:
        """The difference over what is allowed: above 1 it is too large; infinite where one is no number."""
        difference = abs(comparison.sampler - comparison.trainer)
        return difference / self.allows(comparison) if math.isfinite(difference) else math.inf


_FLOAT32_ON_CPU = Bound("float32 on a CPU", start=0.02, token=1e-3, nat=0.0, exceptions=0.0)
_FLOAT32_ON_GPU = Bound("float32 on a GPU", start=0.2, token=1e-2, nat=0.0, exceptions=0.5)
_BFLOAT16 = Bound("bfloat16", start=0.5, token=0.05, nat=0.02, exceptions=0.5)


def bound_for(model: Any, device: torch.device) -> Bound:
    """The bound for a transformers model on a device.

    What one and the same model was apart in vLLM and transformers, both on a CPU (`benchmarks/results/agreement.json`:
    640 answers and 13,000 tokens in each precision, of the embedded model, of seven dense members of the model zoo and
    of two with experts; nats):

                                          largest of a token   of an answer   of what is allowed    median answer
        float32                                       4e-5          7e-4                  0.8 %            0.6 %
        factors rounded to TF32, dense                0.02          0.05                   12 %              2 %
        factors rounded to TF32, experts              2.3           2.3                   530 %              3 %
        bfloat16, dense                               0.4           1.7                    27 %              5 %
        bfloat16, experts                             1.7           1.0                    22 %              4 %

    So one answer beyond the bound is enough where nothing is rounded and no router can choose another expert. Elsewhere
    it takes more than half of the answers: those of another model are all far apart.

    No GPU was measured. The bounds of bfloat16 hold on a GPU as on a CPU because the numbers have the same 8 bits; that
    of float32 on a GPU is ten times that of a CPU, since products may be TF32, whose row is transformers with the
    factors of its linear layers rounded to 10 bits. Both are estimates. The fault that LongRoPE makes, 1.1 nats of
    every token, is beyond them all; a difference as small as that of dynamic positions (0.09 to 0.24 nats of 24 tokens)
    only beyond that of float32 on a CPU: `models.policy_check` refuses such models by name.
    """
    if model.dtype != torch.float32:
        return _BFLOAT16
    bound = _FLOAT32_ON_CPU if device.type == "cpu" else _FLOAT32_ON_GPU
    return replace(bound, exceptions=0.5) if _has_routers(model.config) else bound


def _has_routers(config: Any) -> bool:
    """Whether tokens are sent to some of several experts, however the family calls their number."""
    facts = config.get_text_config().to_dict()
    return any("experts" in name and isinstance(value, int) and value > 1 for name, value in facts.items())


def check_agreement(comparisons: Sequence[Comparison], bound: Bound) -> None:
    """Raises SamplerDisagrees, naming the worst of them, where more are too far apart than may be."""
    beyond = _beyond(comparisons, bound)
    if len(beyond) <= bound.exceptions * len(comparisons):
        return
    worst = max(beyond, key=bound.excess)
    raise SamplerDisagrees(
        f"{worst.name}: the engine that sampled it gave it a log-prob of {worst.sampler:.4f}, the model that is "
        f"trained and scored gives {worst.trainer:.4f} (nats, {worst.tokens} tokens; expected at most "
        f"{bound.allows(worst):.3g} between them in {bound.shown}; {len(beyond)} of {len(comparisons)} answers that "
        f"were compared are too far apart). {USUAL_CAUSES}"
    )


def check_agreement_of_workers(comparisons: Sequence[Comparison], bound: Bound, device: torch.device) -> None:
    """As `check_agreement`, of the comparisons of all workers; raises on all of them, and all must call it."""
    counts = torch.tensor([len(_beyond(comparisons, bound)), len(comparisons)], device=device)
    distributed.all_reduce(counts)
    beyond, compared = counts.tolist()
    if beyond <= bound.exceptions * compared:
        return
    found: list[Sequence[Comparison]] = [()] * distributed.get_world_size()
    distributed.all_gather_object(found, list(comparisons))
    check_agreement([comparison for of_worker in found for comparison in of_worker], bound)


def _beyond(comparisons: Sequence[Comparison], bound: Bound) -> list[Comparison]:
    return [comparison for comparison in comparisons if bound.excess(comparison) > 1]
