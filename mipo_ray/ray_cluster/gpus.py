"""What a GPU must be able to do, told before anything is loaded onto it.

A cluster gives whatever GPU is free: nothing in a request for one says how old it may be. What it lacks would come up
minutes later as an error of a library, in a process that Ray starts again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mipo_ray.errors import UserError

# By NVIDIA's tables (https://developer.nvidia.com/cuda-gpus): Ampere and newer multiply bfloat16.
BFLOAT16_CAPABILITY = (8, 0)

NO_GPU = (
    "expected a GPU that CUDA can use, found none: the driver's libcuda.so.1 must be found by this process "
    "(LD_LIBRARY_PATH; on GKE it lies in /usr/local/nvidia/lib64) and be new enough for CUDA {cuda} (`nvidia-smi` on "
    "the node shows what it supports)"
)


@dataclass(frozen=True)
class Gpu:
    """A GPU by its name and compute capability, as (major, minor)."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (compute capability {shown_capability(self.capability)})"


def shown_capability(capability: tuple[int, int]) -> str:
    """As NVIDIA writes it: 8.0."""
    return ".".join(map(str, capability))


def check_gpu(gpu: Gpu, dtype: str, oldest: tuple[int, int] | None) -> None:
    """Raises UserError, which names the GPU and what it lacks, where it cannot run a model in `dtype`.

    oldest: the lowest compute capability that PyTorch was built for; None: not known.
    """
    if oldest is not None and gpu.capability < oldest:
        raise UserError(
            f"{gpu}: this build of PyTorch has kernels for compute capability {shown_capability(oldest)} and newer; "
            "use newer GPUs (on a cluster by node affinity, see cluster/README.md)"
        )
    if dtype == "bfloat16" and gpu.capability < BFLOAT16_CAPABILITY:
        raise UserError(
            f"{gpu}: it has no bfloat16, which model.dtype asks for (auto on GPUs) and which starts at compute "
            f"capability {shown_capability(BFLOAT16_CAPABILITY)} (A100, A10, L4 and newer); use such GPUs (on a "
            "cluster by node affinity, see cluster/README.md), or set model.dtype=float32, with twice the memory"
        )


def check_torch_gpu(dtype: str) -> None:
    """For a process that works on its GPU through PyTorch itself: `check_gpu` of the GPU that it has.

    Raises UserError also where there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError(NO_GPU.format(cuda=torch.version.cuda))
    index = torch.cuda.current_device()
    gpu = Gpu(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
    check_gpu(gpu, dtype, oldest_capability(torch.cuda.get_arch_list()))


def check_engine_gpus(dtype: str, shards: int) -> None:
    """For an actor whose engine works in processes of its own: `check_gpu` of each of its GPUs, asked through the
    driver's management library, since a CUDA context here would take memory from the engine."""
    import torch
    from vllm.platforms import current_platform

    platform: Any = current_platform
    if not platform.is_cuda_alike():
        raise UserError(NO_GPU.format(cuda=torch.version.cuda))
    oldest = oldest_capability(torch.cuda.get_arch_list()) if platform.is_cuda() else None
    for index in range(shards):
        capability = platform.get_device_capability(index)
        if capability is not None:
            check_gpu(Gpu(platform.get_device_name(index), (capability.major, capability.minor)), dtype, oldest)


def oldest_capability(built_for: Sequence[str]) -> tuple[int, int] | None:
    """The lowest of PyTorch's targets: ["sm_75", "sm_80", "compute_120"] -> (7, 5); None where none is told."""
    found = [re.fullmatch(r"(?:sm|compute)_(\d+)(\d)[a-z]?", target) for target in built_for]
    return min(((int(match[1]), int(match[2])) for match in found if match), default=None)
