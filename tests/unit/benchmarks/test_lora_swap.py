"""Both ways that are measured are one policy, and a policy that is another one is told apart.

python -m pytest tests/unit/benchmarks/test_lora_swap.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.lora_swap import compare, make_policies
from tests.helpers.tiny_model import make_tiny_model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[5, 9, 17, 40, 3, 77]])).logits


def test_the_sum_of_two_rounds_adapters_is_one_adapter_of_the_initial_model(tmp_path: Path) -> None:
    """By peft itself, which knows nothing of the merge."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    make_policies(make_tiny_model(tmp_path / "tiny"), 4, tmp_path)
    initial = AutoModelForCausalLM.from_pretrained(tmp_path / "initial", dtype=torch.float32)
    before = logits(initial)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    adapted = logits(PeftModel.from_pretrained(initial, str(tmp_path / "adapter")))
    torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-4)
    assert (merged - before).abs().max() > 0.1


def test_what_the_engines_found_is_compared_request_by_request() -> None:
    merged = {
        "initial_tokens": [[1], [2], [3], [4]],
        "initial_logprobs": [-5.0, -5.0, -5.0, -5.0],
        "tokens": [[1], [8], [9], [7]],
        "logprobs": [-4.0, -6.5, -9.0, -3.0],
    }
    adapter = {
        "tokens": [[1], [8], [9], [6]],
        "logprobs": [-4.0, -6.25, -9.0, -3.0],
        "beside_adapter": [[1], [2], [3], [4]],
        "mixed": [[1], [8], [9], [5]],
    }
    assert compare(merged, adapter) == {
        "greedy_equal": 0.75,
        "greedy_unmoved": 0.25,
        "largest_logprob_difference": 0.25,
        "smallest_logprob_move": 1.0,
        "base_equal": 1.0,
        "base_equal_in_mixed_batch": 0.5,
        "adapter_equal_in_mixed_batch": 0.5,
    }
