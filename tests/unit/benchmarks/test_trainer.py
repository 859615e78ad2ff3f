"""The trainer benchmark's arithmetic, its workload, and FLOPs against the formula of a Llama.

python -m pytest tests/unit/benchmarks/test_trainer.py
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.trainer_race import compare
from benchmarks.trainer_report import markdown
from benchmarks.trainer_workload import Shape, fixed, mixed, random_pairs, useful_tokens
from mipo_ray.training.profile import count_flops


def figures(seconds: list[float], peak: int, flops: int) -> dict:
    median = sorted(seconds)[len(seconds) // 2]
    return {
        "seconds": seconds,
        "median_seconds": median,
        "pairs_per_second": 2 / median,
        "tokens_per_second": 2000 / median,
        "peak_bytes": peak,
        "flops": flops,
    }


TRL = figures([4.0, 6.0, 5.0], peak=8 * 2**30, flops=3 * 10**12)
OURS = figures([2.0, 2.0, 4.0], peak=2 * 2**30, flops=10**12)


def test_ratios_are_those_of_medians_and_of_single_rounds() -> None:
    assert compare(TRL, OURS) == {
        "speed": 2.5,
        "speed_range": [1.25, 3.0],
        "peak_bytes": 0.25,
        "flops": 3.0,
    }


def test_table_shows_the_ratios() -> None:
    setting = {"shape": "8/8", "pairs": 2, "reference": "cached", "checkpointing": ["ours"]}
    row = {**setting, "trl": TRL, "ours": OURS, "ratio": compare(TRL, OURS)}
    shown = markdown({"trl": {"machine": "a machine", "seed": 3, "threads": 2, "rows": [row]}})
    assert "| 8/8 | 2 | cached | ours | 0.400 | 1.000 | **2.50x** (1.25 - 3.00) | 3.00x |" in shown
    assert "a machine; seed 3." in shown


@pytest.mark.parametrize("shape", [fixed(7, 3, 4), mixed(20), Shape("other", (2, 3), (5, 9), 50)])
def test_pairs_have_the_lengths_of_their_shape(shape: Shape) -> None:
    pairs = random_pairs(shape, vocabulary=100, seed=5)
    assert len(pairs) == shape.pairs
    assert len({pair["pair_id"] for pair in pairs}) == shape.pairs
    prompts = [len(pair["prompt_token_ids"]) for pair in pairs]
    responses = [len(pair["chosen_token_ids"]) for pair in pairs]
    responses += [len(pair["rejected_token_ids"][0]) for pair in pairs]
    for lengths, (low, high) in ((prompts, shape.prompt), (responses, shape.response)):
        assert low <= min(lengths) <= max(lengths) <= high
    assert useful_tokens(pairs) == 2 * sum(prompts) + sum(responses)
    assert pairs == random_pairs(shape, vocabulary=100, seed=5)
    assert pairs != random_pairs(shape, vocabulary=100, seed=6)


def test_flops_of_attention_on_a_cpu_are_counted() -> None:
    """Two products forward, five backward, of 2 * heads * tokens * tokens * head size FLOPs each."""
    heads, tokens, size = 4, 16, 8
    query, key, value = (torch.randn(1, heads, tokens, size, requires_grad=True) for _ in range(3))

    def attend() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()

    assert count_flops(attend) == 7 * 2 * heads * tokens * tokens * size


def test_flops_of_products_are_counted_in_place_and_into_a_buffer() -> None:
    """The forms in which the two trainers' output heads multiply."""
    left, right, total = torch.randn(3, 5), torch.randn(5, 7), torch.zeros(3, 7)
    assert count_flops(lambda: left @ right) == 2 * 3 * 5 * 7
    assert count_flops(lambda: total.addmm_(left, right)) == 2 * 3 * 5 * 7
    assert count_flops(lambda: torch.mm(left, right, out=total)) == 2 * 3 * 5 * 7
