"""Attention in one varlen call: rows against dense masks, the repeated keys' gradient, and the whole way on a fake
kernel, since the real one runs on GPUs only (`python -m benchmarks.gpu --parts agreement` compares that one).

python -m pytest tests/unit/training/test_varlen.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mipo_ray.training import attention, varlen
from mipo_ray.training.attention import use_attention
from mipo_ray.training.layout import lay_out
from mipo_ray.training.logprobs import response_logprobs
from mipo_ray.training.varlen import has_varlen_kernel, varlen_row
from tests.helpers.packed_rows import drawn_trees, visible
from tests.helpers.tiny_families import assert_gradients_agree, gradients, plain_logprobs, random_trees, tiny_model

CPU = torch.device("cpu")
TREES = random_trees([(5, (3, 1, 4, 8)), (1, (1, 1)), (9, (6, 2)), (2, (9,))])


def fake_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """What the kernel's description says, sequence by sequence: causal, aligned at the last query and the last key."""
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for number in range(len(query_ends) - 1):
        own = query[query_ends[number] : query_ends[number + 1]].transpose(0, 1)
        keys, values = (
            of[key_ends[number] : key_ends[number + 1]].transpose(0, 1).repeat_interleave(groups, 0)
            for of in (key, value)
        )
        assert own.shape[1] <= longest_query
        assert keys.shape[1] <= longest_key
        distance = torch.arange(keys.shape[1])[None] - torch.arange(own.shape[1])[:, None]
        distance -= keys.shape[1] - own.shape[1]  # 0 where a query sees itself
        hidden = distance > window_size[1]
        if window_size[0] >= 0:
            hidden |= distance < -window_size[0]
        scores = own @ keys.transpose(1, 2) * (scale or own.shape[-1] ** -0.5)
        outputs.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def fake_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_kernel", lambda: fake_varlen_attn)
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda query, value: True)


@settings(max_examples=50, deadline=None)
@given(drawn_trees(), st.sampled_from(["packed", "shared"]))
def test_each_query_has_the_keys_that_it_may_see(trees: list, layout: str) -> None:
    batch = lay_out(trees, layout)
    row = varlen_row(batch.segments, CPU)
    tokens = batch.input_ids.shape[1]
    found = torch.zeros(tokens, tokens, dtype=torch.bool)
    sources = torch.arange(tokens) if row.sources is None else row.sources
    for number in range(len(batch.segments)):
        queries = range(int(row.query_ends[number]), int(row.query_ends[number + 1]))
        keys = sources[int(row.key_ends[number]) : int(row.key_ends[number + 1])]
        for place, query in enumerate(queries):
            found[query, keys[: len(keys) - len(queries) + place + 1]] = True
    assert torch.equal(found, visible(trees, layout, None))
    assert row.longest_query == max(row.query_ends.diff().tolist())
    assert row.longest_key == max(row.key_ends.diff().tolist())


@settings(max_examples=30, deadline=None)
@given(drawn_trees())
def test_the_gradient_of_a_repeated_key_is_the_sum_over_its_uses(trees: list) -> None:
    row = varlen_row(lay_out(trees, "shared").segments, CPU)
    if row.sources is None:
        return
    states = torch.randn(int(row.query_ends[-1]), 2, 3, dtype=torch.float64, requires_grad=True)
    slopes = torch.randn(len(row.sources), 2, 3, dtype=torch.float64)
    repeated = varlen._Repeated.apply(states, row.sources, row.uses)
    (found,) = torch.autograd.grad((repeated * slopes).sum(), states)
    (expected,) = torch.autograd.grad((states.index_select(0, row.sources) * slopes).sum(), states)
    assert torch.equal(repeated, states[row.sources])
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("fake_kernel")
@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {}),
        ("Llama", {"num_key_value_heads": 1}),
        ("Mistral", {"sliding_window": 4}),
        ("Qwen2", {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1}),
    ],
    ids=["heads", "shared key heads", "a window", "a window in some layers"],
)
def test_log_probs_and_gradients_are_those_of_single_sequences(family: str, options: dict, layout: Any) -> None:
    model = tiny_model(family, **options)
    expected = plain_logprobs(model, TREES)
    expected_gradients = gradients(model, expected)
    model.zero_grad()
    use_attention(model, "sdpa", layout)
    found = response_logprobs(model, lay_out(TREES, layout))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_gradients_agree(gradients(model, found), expected_gradients)


def test_only_a_gpu_has_the_kernel() -> None:
    states = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)
    assert not has_varlen_kernel(states, states)
