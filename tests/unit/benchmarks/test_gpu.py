"""What the GPU check counts and shows: FLOPs against a model's own layers, tables with rows that failed.

python -m pytest tests/unit/benchmarks/test_gpu.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu.report import markdown
from benchmarks.model_flops import step_flops
from benchmarks.trainer_workload import Shape, long_answers, random_pairs
from mipo_ray.models.shape import ModelShape, read_shape
from mipo_ray.training.attention import use_attention
from mipo_ray.training.layout import lay_out, read_pair
from mipo_ray.training.logprobs import response_logprobs
from tests.helpers.packed_rows import visible
from tests.helpers.tiny_families import VOCABULARY, tiny_model


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_flops_of_a_step_are_those_of_the_layers_that_run(layout: Any) -> None:
    """Two for each weight of a linear layer and row that it gets, and two products for each pair of tokens that see
    each other; forward twice, backward twice as much once."""
    model = tiny_model("Llama", head_dim=16)
    pairs = random_pairs(Shape("ragged", (2, 20), (1, 9), 5), vocabulary=VOCABULARY, seed=3)
    trees = [tree for pair in pairs for tree in read_pair(pair, "dpo").trees]
    batch = lay_out(trees, layout)
    products = 0

    def count(layer: Any, inputs: tuple[Any, ...], _: Any) -> None:
        nonlocal products
        products += 2 * inputs[0].numel() // inputs[0].shape[-1] * layer.weight.numel()

    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(count)
    use_attention(model, "sdpa", layout)
    response_logprobs(model, batch)
    config = model.config.to_dict()
    attention = 2 * 2 * int(visible(trees, layout).sum()) * config["num_attention_heads"] * config["head_dim"]
    shape = read_shape(config, sum(parameter.numel() for parameter in model.parameters()))
    assert isinstance(shape, ModelShape)
    expected = 4 * (products + config["num_hidden_layers"] * attention)
    assert step_flops(shape, pairs, shared=layout == "shared") == expected


def test_long_answers_lie_around_their_medians() -> None:
    lengths = [
        len(pair["prompt_token_ids"]) for pair in random_pairs(long_answers(100, 40, 200), vocabulary=50, seed=1)
    ]
    assert min(lengths) >= 50
    assert max(lengths) <= 150
    assert sorted(lengths)[100] == pytest.approx(100, abs=15)


def test_a_contestant_that_failed_is_shown_with_its_reason() -> None:
    place = {"model": "a model", "shape": "8/8", "pairs": 2}
    trl = {"pairs_per_second": 2.0, "utilisation": 0.25, "peak_bytes": 2 * 2**30}
    ours = {"pairs_per_second": 5.0, "utilisation": 0.5, "peak_bytes": 2**30, "estimated_bytes": 1.25 * 2**30}
    rows = [
        {**place, "trainer": "ours", **ours},
        {**place, "trainer": "ours, compiled", "error": "OutOfMemoryError: too much"},
        {**place, "trainer": "trl", **trl},
    ]
    part = {"machine": "a machine", "seed": 3, "repeats": 5, "rows": rows, "error": "stopped after 9 s"}
    shown = markdown({"speed": part})
    assert "| a model | 8/8 | 2 | ours | 5.00 | 2.50x | 50.0% | 1.0 | 0.50x | 1.2 |" in shown
    assert "| ours, compiled | OutOfMemoryError: too much |" in shown
    assert "a machine; seed 3, medians of 5 steps." in shown
    assert "Not whole: stopped after 9 s" in shown
