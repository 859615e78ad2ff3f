"""What an engine is started with; on a GPU node without a CUDA toolkit nothing that vLLM would compile with one.

python -m pytest tests/unit/generation/test_vllm_arguments.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import vllm.platforms
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms.interface import DeviceCapability

from mipo_ray.config.recipe import load_config
from mipo_ray.generation import vllm_arguments
from mipo_ray.generation.vllm_arguments import EngineSettings, engine_arguments, engine_settings
from mipo_ray.ray_cluster.resources import resolve

# vLLM's own checks, as an engine's process makes them on an H100 whose PATH holds no compiler. FlashInfer's backend is
# one that says what the real one says there: it is not installed beside vLLM for CPUs.
CHECKS = """
import os, shutil, sys
from types import ModuleType, SimpleNamespace
from mipo_ray.generation.vllm_arguments import set_environment

if sys.argv[1] == "set":
    set_environment(on_gpu=True)
import vllm.platforms
from vllm.platforms.interface import DeviceCapability

assert not any(map(shutil.which, ("nvcc", "gcc", "g++", "c++", "cc", "clang")))
vllm.platforms.current_platform  # found out before it is replaced
platform = vllm.platforms._current_platform
for name, value in {
    "is_cuda": lambda: True,
    "get_device_capability": lambda index=0: DeviceCapability(9, 0),
    "support_deep_gemm": lambda: True,
}.items():
    setattr(platform, name, value)
flashinfer = ModuleType("vllm.v1.attention.backends.flashinfer")
flashinfer.FlashInferBackend = SimpleNamespace(supports_compute_capability=lambda capability: True)
sys.modules[flashinfer.__name__] = flashinfer

import vllm.utils.deep_gemm as deep_gemm
from vllm import envs
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, flashinfer_sampler_supported

deep_gemm.has_deep_gemm = lambda: True
print(
    flashinfer_sampler_supported(),
    TopKTopPSampler().forward.__name__,
    envs.VLLM_ALLREDUCE_USE_FLASHINFER,
    deep_gemm.is_deep_gemm_supported(),
)
"""


@pytest.mark.parametrize(
    ("environment", "found"),
    [("unset", "True forward_cuda True True"), ("set", "False forward_native False False")],
)
def test_nothing_is_compiled_where_there_is_no_compiler(tmp_path: Path, environment: str, found: str) -> None:
    """vLLM says yes to each without looking for a compiler (vllm-project/vllm#49497); when a newer one does not any
    more, the first row fails and the variables can go."""
    variables = {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", CHECKS, environment], env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines()[-1:] == [found], done.stderr


def test_a_variable_that_somebody_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"VLLM_USE_FLASHINFER_SAMPLER": "1"}
    monkeypatch.setattr(vllm_arguments.os, "environ", environment)
    vllm_arguments.set_environment(on_gpu=True)
    assert environment["VLLM_USE_FLASHINFER_SAMPLER"] == "1"
    assert environment["VLLM_USE_DEEP_GEMM"] == environment["VLLM_ALLREDUCE_USE_FLASHINFER"] == "0"


def gpu_settings(*overrides: str) -> EngineSettings:
    config = load_config(overrides=[*overrides, "generation.pool.gpus_per_engine=1", "train.gpus_per_worker=1"])
    return engine_settings(config, "/models/one", resolve(config, {"CPU": 6, "GPU": 1}))


@pytest.mark.parametrize(
    ("capability", "nvcc", "overrides", "attention"),
    [
        ((10, 0), None, [], "FLASH_ATTN"),
        ((10, 3), None, [], "FLASH_ATTN"),
        ((10, 0), "/usr/local/cuda/bin/nvcc", [], None),
        ((9, 0), None, [], None),
        ((12, 0), None, [], None),
        ((10, 0), None, ["model.dtype=float32"], None),
        ((10, 0), None, ["generation.pool.engine_args={attention_backend: TRITON_ATTN}"], None),
        ((10, 0), None, ["generation.pool.engine_args={attention_config: {backend: TRITON_ATTN}}"], None),
    ],
)
def test_attention_on_gpus_that_prefer_flashinfer(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    nvcc: str | None,
    overrides: list[str],
    attention: str | None,
) -> None:
    platform = SimpleNamespace(get_device_capability=lambda: DeviceCapability(*capability))
    monkeypatch.setattr(vllm.platforms, "_current_platform", platform)
    monkeypatch.setattr(vllm_arguments, "which", lambda _: nvcc)
    assert engine_arguments("/models/one", gpu_settings(*overrides)).get("attention_backend") == attention


def test_data_centre_blackwell_alone_prefers_flashinfer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the arguments above are made by, in vLLM's own order; and it takes the name."""
    for missing_on_cpus in ("vllm._C_stable_libtorch", "vllm._C"):
        monkeypatch.setitem(sys.modules, missing_on_cpus, ModuleType(missing_on_cpus))
    from vllm.platforms.cuda import _get_backend_priorities

    first = {major: _get_backend_priorities(False, DeviceCapability(major, 0))[0].name for major in (8, 9, 10, 12)}
    assert first == {8: "FLASH_ATTN", 9: "FLASH_ATTN", 10: "FLASHINFER", 12: "FLASH_ATTN"}
    assert AsyncEngineArgs(model=str(tmp_path), attention_backend="FLASH_ATTN").attention_backend is not None
