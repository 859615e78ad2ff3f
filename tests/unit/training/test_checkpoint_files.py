"""Checkpoints of others: what they hold is read, and nothing in them runs.

python -m pytest tests/unit/training/test_checkpoint_files.py
"""

from __future__ import annotations

import argparse
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from mipo_ray.training.checkpoint import CheckpointRefused, load_checkpoint, only_numbers


class Planted:
    """Unpickled, it makes a directory: harmless, and seen."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self._call = (call, arguments)

    def __reduce__(self) -> Any:
        return self._call


def _planted(path: Path) -> dict[str, Planted]:
    return {
        "a function": Planted(os.mkdir, str(path)),
        "a builtin": Planted(exec, f"import os; os.mkdir({str(path)!r})"),
        "torch's own loader": Planted(torch.load, str(path)),
    }


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("kind", ["a function", "a builtin", "torch's own loader"])
def test_a_planted_program_is_refused_by_file_and_does_not_run(tmp_path: Path, kind: str, as_zip: bool) -> None:
    seen, file = tmp_path / "seen", tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = {"optimizer_state_dict": {"state": torch.zeros(3), "more": [_planted(seen)[kind]]}}
    torch.save(content, file, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(CheckpointRefused) as refused, only_numbers():
        torch.load(file, map_location="cpu", weights_only=False)  # as DeepSpeed calls it
    assert str(refused.value).startswith(f"{file}: expected a checkpoint of tensors and plain values, found ")
    assert not seen.exists()


def test_a_plain_pickle_is_refused_too(tmp_path: Path) -> None:
    seen, file = tmp_path / "seen", tmp_path / "mp_rank_00_model_states.pt"
    file.write_bytes(pickle.dumps(Planted(os.mkdir, str(seen))))
    with pytest.raises(CheckpointRefused), only_numbers():
        torch.load(file, weights_only=False)
    assert not seen.exists()


@pytest.mark.parametrize("as_zip", [True, False])
def test_what_deepspeed_writes_is_read(tmp_path: Path, as_zip: bool) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    content = {
        "module": OrderedDict(weight=torch.arange(4.0)),
        "param_shapes": [OrderedDict(weight=torch.Size([2, 2]))],
        "loss_scaler": LossScaler(1.0),
        "zero_stage": ZeroStageEnum.optimizer_states,
        "param_slice_mappings": [OrderedDict(weight=fragment_address(numel=4, start=0))],
        "ds_config": {"zero_optimization": {"stage": 1}},
        "args": argparse.Namespace(a=1),
        "dtype": torch.bfloat16,
        "shared": {1, 2},
    }
    torch.save(content, tmp_path / "states.pt", _use_new_zipfile_serialization=as_zip)
    with only_numbers():
        found = torch.load(tmp_path / "states.pt", weights_only=False)
    assert found["zero_stage"] is ZeroStageEnum.optimizer_states
    assert found["param_slice_mappings"] == content["param_slice_mappings"]
    assert torch.equal(found["module"]["weight"], content["module"]["weight"])


def test_afterwards_torch_reads_as_before() -> None:
    load = torch.load
    with pytest.raises(RuntimeError, match="failed"), only_numbers():
        raise RuntimeError("failed")
    assert torch.load is load


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"engine": "x", "workers": [], "progress": {}}',
        '{"engine": "x", "workers": 1, "progress": {"a": 1}}',
        "[" * 100000,
        '{"engine": "x", "workers": ' + "9" * 5000 + "}",
    ],
)
def test_progress_that_cannot_be_read_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "progress.json").write_text(text)
    with pytest.raises(CheckpointRefused, match=r"progress\.json: expected the progress of a checkpoint") as refused:
        load_checkpoint(None, tmp_path)
    assert len(str(refused.value)) < 1_000
