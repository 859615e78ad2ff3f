"""Several gloo workers load their parts of a model, which together are what transformers loads whole, to the bit.

python -m pytest tests/integration/test_sharded_loading.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from mipo_ray.config.train import TrainConfig
from mipo_ray.errors import UserError
from mipo_ray.training.deepspeed_config import deepspeed_config
from mipo_ray.training.deepspeed_engine import policy_engine, quiet_libraries, reference_module
from mipo_ray.training.sharded_loading import load_own_part
from tests.helpers.model_zoo import make_member
from tests.helpers.tiny_families import tiny_model

# 3 divides few of the sizes, so that parts are filled up; with 4 some biases are smaller than one part.
WORKERS = (3, 4)
DTYPES = ("float32", "bfloat16")


def shards_of(parameter: Any) -> torch.Tensor:
    """What all workers have of a parameter, one behind the other, without what fills the last part up."""
    parts = [torch.empty_like(parameter.ds_tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, parameter.ds_tensor.detach())
    return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)


def load_all(rank: int, workers: int, directory: Path) -> None:
    """One worker's process: raises where a model, policy or reference differs from what `from_pretrained` loads."""
    from transformers import AutoModelForCausalLM

    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    quiet_libraries("cpu")
    distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous-{workers}", rank=rank, world_size=workers
    )
    for model_dir in sorted(path for path in directory.iterdir() if path.is_dir()):
        for dtype in DTYPES:
            whole = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
            config = deepspeed_config(TrainConfig(zero_stage=3), dtype)
            own = load_own_part(str(model_dir), config, getattr(torch, dtype), trust_remote_code=False)
            for name, expected in whole.named_parameters():
                found = own.get_parameter(name)
                assert found.ds_tensor.numel() == -(-expected.numel() // workers), name
                assert torch.equal(shards_of(found), expected), f"{model_dir.name} {dtype} {name}"
    train = TrainConfig(zero_stage=3, layout="padded", lora={"rank": 2})
    for made in (
        policy_engine(str(directory / "tied"), train, "float32", "cpu", trust_remote_code=False),
        reference_module(str(directory / "tied"), train, "float32", "cpu", trust_remote_code=False),
    ):
        import deepspeed

        whole = AutoModelForCausalLM.from_pretrained(directory / "tied")
        found = dict(made.module.model.named_parameters())
        with deepspeed.zero.GatheredParameters(list(found.values())):
            for name, expected in whole.named_parameters():
                place, _, own_name = name.rpartition(".")
                adapted = found.get(f"{place}.base_layer.{own_name}", found.get(name))
                assert adapted is not None, name
                assert torch.equal(adapted, expected), name
    # Another training of the same model on one worker's node.
    own_dir = directory / ("tied" if rank else "other")
    config = deepspeed_config(train, "float32")
    with pytest.raises(UserError, match="same weights on the nodes of all training workers"):
        load_own_part(str(own_dir), config, torch.float32, trust_remote_code=False)
    distributed.destroy_process_group()


@pytest.mark.parametrize("workers", WORKERS)
def test_the_parts_of_all_workers_are_the_model(workers: int, tmp_path: Path) -> None:
    for name in ("biases", "experts"):
        (tmp_path / name).mkdir()
    make_member("Llama, biases", tmp_path / "biases")
    make_member("Mixtral", tmp_path / "experts")
    for name, seed in (("tied", 0), ("other", 1)):
        tiny_model(seed=seed, tie_word_embeddings=True).save_pretrained(tmp_path / name, max_shard_size="20KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 3
    torch.multiprocessing.spawn(load_all, (workers, tmp_path), nprocs=workers)
