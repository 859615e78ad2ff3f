"""In which layout a scorer runs a model.

python -m pytest tests/unit/evaluation/held_out/test_scorer.py
"""

from __future__ import annotations

import pytest
import torch

from mipo_ray.evaluation.held_out.scorer import layout_for
from mipo_ray.training.layout import lay_out
from mipo_ray.training.logprobs import response_logprobs
from tests.helpers.tiny_families import plain_logprobs, random_trees, tiny_model

TREES = random_trees([(5, (3, 1, 4)), (9, (6, 2))])


@pytest.mark.parametrize(
    ("family", "options", "layout"),
    [
        ("Llama", {}, "shared"),
        ("Mistral", {"sliding_window": 4}, "shared"),
        ("Gemma2", {"attn_logit_softcapping": 5.0}, "padded"),  # torch's attention cannot soft-cap scores
        ("Bloom", {}, "padded"),  # adds a bias for positions to its scores
    ],
)
def test_a_model_is_scored_in_a_layout_that_it_can_honour(family: str, options: dict, layout: str) -> None:
    model = tiny_model(family, **options)
    expected = plain_logprobs(model, TREES)
    assert layout_for(model) == layout
    with torch.no_grad():
        found = response_logprobs(model, lay_out(TREES, layout))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
