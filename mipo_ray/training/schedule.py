"""The learning rate of every optimizer step."""

from __future__ import annotations

import math


def learning_rate_at(step: int, total_steps: int, *, peak: float, warmup_ratio: float, floor_ratio: float) -> float:
    """The rate of optimizer step `step` (0-based) of `total_steps`: a linear warm-up, then a cosine.

    The first w = ceil(warmup_ratio * total_steps) steps rise in equal parts from peak / w to `peak`: no step has rate
    0. The rest falls from `peak` to `floor_ratio * peak`, which the last step has, along half a cosine (Loshchilov
    and Hutter 2017, "SGDR", equation 5, without restarts).

    Raises ValueError when `step` is not in [0, total_steps).
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"expected a step in [0, {total_steps}), found {step}")
    # Rounded first, so that 0.07 * 100 = 7.000000000000001 is 7 steps.
    warmup_steps = math.ceil(round(warmup_ratio * total_steps, 9))
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    # The last warm-up step has the peak already; where there is none, the first step has it.
    first = max(warmup_steps - 1, 0)
    last = total_steps - 1
    progress = (step - first) / (last - first) if last > first else 0.0
    floor = floor_ratio * peak
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
