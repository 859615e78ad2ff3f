"""The learning-rate schedule's shape, for every length of training.

python -m pytest tests/unit/training/test_schedule.py
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.training.schedule import learning_rate_at

ratios = st.floats(0, 1)


def rates(total: int, warmup_ratio: float, floor_ratio: float, peak: float = 1.0) -> list[float]:
    return [
        learning_rate_at(step, total, peak=peak, warmup_ratio=warmup_ratio, floor_ratio=floor_ratio)
        for step in range(total)
    ]


@given(st.integers(1, 200), ratios, ratios)
def test_rises_to_the_peak_then_falls_to_the_floor(total, warmup_ratio, floor_ratio):
    found = rates(total, warmup_ratio, floor_ratio)
    top = found.index(max(found))
    assert found[0] > 0
    assert max(found) == pytest.approx(1.0)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert min(found[top:]) >= floor_ratio - 1e-12
    if top < total - 1:
        assert found[-1] == pytest.approx(floor_ratio, abs=1e-12)


def test_values_of_a_short_run():
    # 2 of 10 steps warm up; 8 more fall along half a cosine from the peak at step 1 to the floor at step 9.
    found = rates(10, warmup_ratio=0.2, floor_ratio=0.1, peak=2.0)
    cosine = [0.2 + 1.8 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(1, 9)]
    assert found == pytest.approx([1.0, 2.0, *cosine])


def test_a_share_that_is_whole_in_decimal_is_whole():
    found = rates(100, warmup_ratio=0.07, floor_ratio=0.0)
    assert found.index(max(found)) == 6


@pytest.mark.parametrize("step", [-1, 5])
def test_a_step_outside_the_run_is_refused(step):
    with pytest.raises(ValueError, match=rf"\[0, 5\), found {step}"):
        learning_rate_at(step, 5, peak=1.0, warmup_ratio=0.1, floor_ratio=0.1)
