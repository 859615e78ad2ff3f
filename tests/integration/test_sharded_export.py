"""Several gloo workers export a policy that is sharded over them; what one of them meets, all raise.

python -m pytest tests/integration/test_sharded_export.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from mipo_ray.config.train import TrainConfig
from mipo_ray.training import export
from mipo_ray.training.deepspeed_engine import policy_engine, quiet_libraries
from mipo_ray.training.export import export_policy
from tests.helpers.model_zoo import make_member

WORKERS = 3
MODELS = {"tied": "Llama, tied", "experts": "Mixtral"}


def export_all(rank: int, directory: Path) -> None:
    """One worker's process: exports every model as rank 0 writes it, then to a place where it cannot be written."""
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(WORKERS), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    quiet_libraries("cpu")
    distributed.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=WORKERS)
    export.MOST_BYTES = "200KB"
    for name in MODELS:
        train = TrainConfig(zero_stage=3, layout="padded")
        engine = policy_engine(str(directory / name), train, "float32", "cpu", trust_remote_code=False)
        output = directory / f"{name} exported"
        # Only the first worker writes: the others have no such place.
        export_policy(engine, directory / name, output if rank == 0 else directory / "nowhere")
        distributed.barrier()
        assert not (directory / "nowhere").exists()
        (directory / f"file {rank}").touch()
        with pytest.raises(OSError, match=r"file 0"):
            export_policy(engine, directory / name, directory / f"file {rank}" / "out")
    distributed.destroy_process_group()


def tensors_of(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_export_is_the_model(tmp_path: Path) -> None:
    for name, member in MODELS.items():
        (tmp_path / name).mkdir()
        make_member(member, tmp_path / name)
    torch.multiprocessing.spawn(export_all, (tmp_path,), nprocs=WORKERS)
    for name in MODELS:
        found, expected = tensors_of(tmp_path / f"{name} exported"), tensors_of(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        assert len(list((tmp_path / f"{name} exported").glob("*.safetensors"))) > 1
