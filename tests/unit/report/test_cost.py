"""What a run cost, as the report says it.

python -m pytest tests/unit/report/test_cost.py
"""

from __future__ import annotations

import pytest

from mipo_ray.report.cost import ShownStage, run_cost


def splits(engines: ShownStage, workers: ShownStage) -> list[str]:
    cost = run_cost([engines, workers])
    assert cost is not None
    return cost.splits


def test_a_streamed_round_is_told_how_its_gpus_would_be_equally_busy() -> None:
    """4 + 4 GPUs for 100 s: engines worked for 300 of 400 GPU seconds, workers for 100."""
    engines = ShownStage(0, "generate", 100.0, 4.0, idle_gpu_seconds=100.0)
    workers = ShownStage(0, "train", 100.0, 4.0, idle_gpu_seconds=300.0, is_streamed=True)
    (sentence,) = splits(engines, workers)
    assert "streamed on 4 GPUs of engines and 4 of workers" in sentence
    assert "no work for 1 min 40 s and 5 min 00 s of GPU time; by what each side did, 6 and 2 would be" in sentence


@pytest.mark.parametrize(("gpus", "is_streamed"), [(4.0, False), (None, True), (0.0, True)])
def test_nothing_is_said_of_a_sequential_round_or_one_without_gpus(gpus: float | None, is_streamed: bool) -> None:
    stages = ShownStage(0, "generate", 1.0, gpus), ShownStage(0, "train", 1.0, gpus, is_streamed=is_streamed)
    assert splits(*stages) == []


def test_idle_time_of_earlier_attempts_never_makes_a_side_less_than_idle() -> None:
    engines = ShownStage(1, "generate", 10.0, 2.0, idle_gpu_seconds=500.0)
    workers = ShownStage(1, "train", 10.0, 2.0, is_streamed=True)
    (sentence,) = splits(engines, workers)
    assert "0 and 4 would be equally busy" in sentence
