"""The cache of the reference's log-probs: what is written comes back to the bit, and half a cache is no cache.

python -m pytest tests/unit/training/test_reference.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.training import reference
from mipo_ray.training.layout import Pair, TokenBatch, lay_out, read_pair
from mipo_ray.training.reference import (
    cached_reference,
    colocated_reference,
    compute_logprobs,
    read_logprobs,
    write_logprobs,
)


def write_as(rank: int, directory: str, logprobs: dict[str, np.ndarray], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference.distributed, "get_rank", lambda: rank)
    write_logprobs(directory, logprobs)


def assert_equal(found: dict[str, np.ndarray] | None, expected: dict[str, np.ndarray]) -> None:
    assert found is not None
    assert found.keys() == expected.keys()
    for pair_id, values in expected.items():
        assert found[pair_id].dtype == np.float32
        np.testing.assert_array_equal(found[pair_id], values)


float32 = st.floats(-1e4, 0, width=32)


@settings(max_examples=25)
@given(
    shares=st.lists(st.lists(st.lists(float32, min_size=1, max_size=9), max_size=4), min_size=1, max_size=4),
    scheme=st.sampled_from(["", "memory://"]),
)
def test_what_workers_wrote_is_read_back_to_the_bit(tmp_path_factory, shares, scheme):
    """Also of workers without a pair, and where pairs have different numbers of responses."""
    directory = scheme + str(tmp_path_factory.mktemp("run") / "cache")
    expected = {}
    with pytest.MonkeyPatch.context() as patch:
        for rank, share in enumerate(shares):
            own = {f"{rank}-{number}": np.array(values, np.float32) for number, values in enumerate(share)}
            write_as(rank, directory, own, patch)
            expected |= own
    assert_equal(read_logprobs(directory, len(expected)), expected)


@pytest.mark.parametrize("name", ["pair_id=9", "exp [1]", "100% #1", "a::b", "übung", "what?", "all*"])
def test_the_cache_is_found_wherever_the_run_lies(tmp_path, monkeypatch, name):
    directory = str(tmp_path / name / "cache")
    write_as(0, directory, {"a": np.array([-1.5], np.float32)}, monkeypatch)
    assert_equal(read_logprobs(directory, 1), {"a": np.array([-1.5], np.float32)})
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_cache_that_is_not_there_is_none(tmp_path):
    assert read_logprobs(str(tmp_path / "cache"), 0) is None


def test_a_cache_without_all_pairs_is_none(tmp_path, monkeypatch):
    write_as(1, str(tmp_path), {"a": np.zeros(2, np.float32)}, monkeypatch)
    assert read_logprobs(str(tmp_path), 2) is None
    write_as(0, str(tmp_path), {"b": np.ones(2, np.float32)}, monkeypatch)
    assert_equal(read_logprobs(str(tmp_path), 2), {"a": np.zeros(2), "b": np.ones(2)})


@pytest.mark.parametrize("kept", [0, 1, 100, -5])
def test_a_file_that_a_killed_worker_left_is_no_cache(tmp_path, monkeypatch, kept):
    directory = tmp_path / "cache"
    write_as(0, str(directory), {str(index): np.zeros(2, np.float32) for index in range(50)}, monkeypatch)
    (file,) = Path(directory).iterdir()
    file.write_bytes(file.read_bytes()[:kept])
    assert read_logprobs(str(directory), 50) is None


def test_a_second_attempt_replaces_the_first(tmp_path, monkeypatch):
    write_as(0, str(tmp_path), {"a": np.zeros(2, np.float32)}, monkeypatch)
    write_as(0, str(tmp_path), {"a": np.ones(2, np.float32)}, monkeypatch)
    assert_equal(read_logprobs(str(tmp_path), 1), {"a": np.ones(2)})


def pair(pair_id: str, rejected: int = 2) -> dict:
    prompts = [[5]] * rejected
    return {
        "pair_id": pair_id,
        "prompt_token_ids": [1, 2],
        "chosen_token_ids": [3],
        "rejected_token_ids": [[4]] * rejected,
        "mismatched_prompt_token_ids": prompts,
    }


def micro_batch(*rows: dict, objective: str = "dpo") -> tuple[list[Pair], TokenBatch]:
    pairs = [read_pair(row, objective) for row in rows]
    trees = [tree for one in pairs or [read_pair(pair("placeholder"), "sft")] for tree in one.trees]
    return pairs, lay_out(trees, "shared")


def numbered(batch) -> torch.Tensor:
    """A stand-in for a model: response number and size of the batch, so that no two batches say the same."""
    return torch.arange(batch.response_count, dtype=torch.float32) + 100 * batch.response_count


@pytest.mark.parametrize(("objective", "responses"), [("dpo", 3), ("sft", 1), ("sami", 9)])
def test_stored_logprobs_are_those_of_the_live_reference(objective, responses):
    live = colocated_reference(numbered)
    a, b, c = (pair(name) for name in "abc")
    batches = [micro_batch(a, b, objective=objective), micro_batch(), micro_batch(c, objective=objective)]
    stored = compute_logprobs(live, batches)
    assert {name: len(values) for name, values in stored.items()} == dict.fromkeys("abc", responses)
    cached = cached_reference(stored)
    for pairs, batch in (batches[0], batches[2]):
        torch.testing.assert_close(cached(pairs, batch), live(pairs, batch), rtol=0, atol=0)
    # In other micro-batches than they were computed in: pair by pair.
    together = cached(*micro_batch(c, a, objective=objective))
    torch.testing.assert_close(together, torch.from_numpy(np.concatenate([stored["c"], stored["a"]])), rtol=0, atol=0)


def test_a_micro_batch_without_pairs_has_one_value_for_each_response_it_runs():
    """It keeps a worker in step with the others; nothing looks at what comes out."""
    pairs, batch = micro_batch()
    assert cached_reference({})(pairs, batch).shape == (batch.response_count,)


def test_a_pair_that_is_not_stored_is_an_error():
    with pytest.raises(KeyError, match="b"):
        cached_reference({"a": np.zeros(3, np.float32)})(*micro_batch(pair("b")))


def test_a_live_reference_has_no_gradient():
    module = torch.nn.Linear(1, 1)
    found = colocated_reference(lambda batch: module(torch.ones(1)))(*micro_batch(pair("a")))
    assert not found.requires_grad
