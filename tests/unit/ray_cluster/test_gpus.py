"""A GPU that cannot do what a run asks of it is named, with what it lacks, before anything is loaded onto it.

python -m pytest tests/unit/ray_cluster/test_gpus.py
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch
import vllm.platforms
from vllm.platforms.interface import DeviceCapability

from mipo_ray.config.recipe import load_config
from mipo_ray.errors import UserError
from mipo_ray.evaluation.held_out.scorer import Scorer, ScorerSettings
from mipo_ray.generation.embedder import Embedder
from mipo_ray.generation.engine import Engine
from mipo_ray.generation.vllm_arguments import engine_settings
from mipo_ray.ray_cluster.gpus import Gpu, check_engine_gpus, check_gpu, check_torch_gpu, oldest_capability
from mipo_ray.ray_cluster.resources import resolve
from mipo_ray.training.ray_worker import worker_loop

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


def give_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: tuple[str, tuple[int, int]]) -> None:
    """Lets torch and vLLM see these GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpus[index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index][1])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_13)
    platform = {
        "is_cuda": lambda: bool(gpus),
        "is_cuda_alike": lambda: bool(gpus),
        "get_device_name": lambda index=0: gpus[index][0],
        "get_device_capability": lambda index=0: DeviceCapability(*gpus[index][1]) if gpus else None,
    }
    for name, function in platform.items():
        monkeypatch.setattr(vllm.platforms.current_platform, name, function)


@pytest.mark.parametrize(
    ("gpu", "dtype", "lacks"),
    [
        (("Tesla T4", (7, 5)), "bfloat16", "no bfloat16.*starts at compute capability 8.0.*model.dtype=float32"),
        (("Tesla V100-SXM2-16GB", (7, 0)), "float32", "kernels for compute capability 7.5 and newer"),
        (("Tesla T4", (7, 5)), "float32", None),
        (("NVIDIA A10G", (8, 6)), "bfloat16", None),
        (("NVIDIA B200", (10, 0)), "bfloat16", None),
    ],
)
def test_what_a_gpu_lacks(
    monkeypatch: pytest.MonkeyPatch, gpu: tuple[str, tuple[int, int]], dtype: str, lacks: str | None
) -> None:
    """Worker and engine say the same of it."""
    give_gpus(monkeypatch, gpu)
    for check in (lambda: check_torch_gpu(dtype), lambda: check_engine_gpus(dtype, 1)):
        if lacks is None:
            check()
        else:
            named = rf"{gpu[0]} \(compute capability {gpu[1][0]}\.{gpu[1][1]}\)"
            with pytest.raises(UserError, match=rf"^{named}: .*{lacks}"):
                check()


def test_every_gpu_of_an_engine_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    give_gpus(monkeypatch, ("NVIDIA A100", (8, 0)), ("Tesla T4", (7, 5)))
    check_engine_gpus("bfloat16", 1)
    with pytest.raises(UserError, match=r"^Tesla T4"):
        check_engine_gpus("bfloat16", 2)


def test_no_gpu_at_all_says_where_the_driver_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process meets on GKE whose image does not set LD_LIBRARY_PATH, and with a driver that is too old."""
    give_gpus(monkeypatch)
    for check in (lambda: check_torch_gpu("float32"), lambda: check_engine_gpus("float32", 1)):
        with pytest.raises(UserError, match=r"found none: .*libcuda\.so\.1 .*LD_LIBRARY_PATH.*/usr/local/nvidia/lib64"):
            check()


def test_torchs_targets_are_read() -> None:
    assert oldest_capability(CUDA_13) == (7, 5)
    assert oldest_capability(["sm_90a", "sm_100"]) == (9, 0)
    assert oldest_capability(["compute_120"]) == (12, 0)
    assert oldest_capability([]) is None
    check_gpu(Gpu("Tesla K80", (3, 7)), "float32", None)


def test_engines_scorers_and_workers_refuse_before_they_look_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of this run does not exist: whoever got so far would say that."""
    give_gpus(monkeypatch, ("Tesla T4", (7, 5)))
    for user in ("engine", "embedder"):
        monkeypatch.setattr(f"mipo_ray.generation.{user}.set_environment", lambda on_gpu: None)
    config = load_config(overrides=["generation.pool.gpus_per_engine=1", "train.gpus_per_worker=1"])
    settings = engine_settings(config, "/nowhere/model", resolve(config, {"CPU": 6, "GPU": 1}))
    assert settings.dtype == "bfloat16"
    for start in (lambda: Engine(settings), lambda: Embedder(settings, is_policy=True)):
        with pytest.raises(UserError, match=r"^Tesla T4 .*no bfloat16"):
            start()

    events: Any = None
    scorer = ScorerSettings({"policy": "/nowhere/model"}, "bfloat16", 8, on_gpu=True, trust_remote_code=False)
    with pytest.raises(UserError, match=r"^Tesla T4 .*no bfloat16"):
        Scorer(scorer, events)

    context = SimpleNamespace(get_local_world_size=lambda: 1, get_world_size=lambda: 1, get_world_rank=lambda: 0)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "get_dataset_shard", lambda _: [])
    worker = SimpleNamespace(device="cuda", dtype="bfloat16", policy_dir="/nowhere/model")
    with pytest.raises(UserError, match=r"^Tesla T4 .*no bfloat16"):
        worker_loop({"settings": worker, "stage": None, "stream": None})
