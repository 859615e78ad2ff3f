"""The model that is loaded is the one that was asked for, and memory is told as the kernel counts it.

python -m pytest tests/unit/benchmarks/test_sharded_loading.py
"""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.sharded_loading import CASES, MIB, as_table, make_model, memory_at_most


def test_the_model_is_whole_in_several_files(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    parameters = make_model(replace(CASES["tiny"], file_bytes=50_000), tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    model, facts = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(facts[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(one.numel() for one in model.parameters()) == parameters
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["0.3B", "1.1B"])
def test_models_have_the_size_of_their_name(name: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**CASES[name].sizes, tie_word_embeddings=False))
    assert sum(one.numel() for one in model.parameters()) / 1e9 == pytest.approx(float(name[:-1]), abs=0.05)


def test_memory_that_was_used_for_a_while_is_counted() -> None:
    with memory_at_most() as memory:
        used = mmap.mmap(-1, 64 * MIB)
        used.write(b"1" * (64 * MIB))
        used.close()
    # A moment's use is in the kernel's count alone; the bytes that were written are there twice while they are.
    assert 64 * MIB * 0.9 < memory["resident_bytes"] < 150 * MIB


def test_the_table_has_the_worst_worker_the_sum_and_the_bound() -> None:
    own = [
        {
            "load": {"resident_bytes": 30 * MIB, "proportional_bytes": 20 * MIB, "seconds": 1.0},
            "export": {"resident_bytes": 9 * MIB, "proportional_bytes": 8 * MIB, "seconds": 3.0},
        },
        {
            "load": {"resident_bytes": 10 * MIB, "proportional_bytes": 25 * MIB, "seconds": 2.0},
            "export": {"resident_bytes": 1 * MIB, "proportional_bytes": 1 * MIB, "seconds": 3.0},
        },
    ]
    sizes = {"weight_bytes": 100 * MIB, "largest_file_bytes": 7 * MIB, "file_bytes": 8 * MIB}
    table = as_table({"machine": "a machine", "workers": 2, "cases": {"one": {**sizes, "ways": {"own part": own}}}})
    assert "| one | 100 | own part | 30 | 25 | 45 | 137 | 2.0 |" in table
    assert "| one | 100 | 8 | own part | 9 | 3.0 |" in table
