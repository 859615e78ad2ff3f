"""Whether the sampler and the trainer are the same model: their log-probs of the same response under the same prompt.

vLLM and transformers implement every model anew. Where they read one model directory differently, a round would train
on noise and call it an improvement. Both numbers exist for nothing: the sampler's beside each response, the trainer's
in each forward pass.
"""

from __future__ import annotations

import math
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


# Placeholder of the docstring: figures come from the measurement.
_FLOAT32_ON_CPU = Bound("float32 on a CPU", start=0.02, token=1e-3, nat=0.0, exceptions=0.0)
_FLOAT32_ON_GPU = Bound("float32 on a GPU", start=0.2, token=1e-2, nat=0.0, exceptions=0.5)
_BFLOAT16 = Bound("bfloat16", start=0.5, token=0.05, nat=0.02, exceptions=0.5)


def bound_for(dtype: torch.dtype, device: torch.device | str) -> Bound:
    if dtype != torch.float32:
        return _BFLOAT16
    return _FLOAT32_ON_CPU if torch.device(device).type == "cpu" else _FLOAT32_ON_GPU


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
