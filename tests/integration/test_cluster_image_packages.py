"""The project imports without the packages that only the tests add: neither `make demo` nor an image has them.

python -m pytest tests/integration/test_cluster_image_packages.py
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

LEFT_OUT = Path(__file__).parents[2] / "requirements" / "linux-x86_64-cpu-test.txt"

# Imports every module as it would where some top-level modules are not installed.
PROGRAM = """
import importlib, pkgutil, sys, sysconfig
from importlib.machinery import PathFinder

hidden = set(sys.argv[1:])
site = sysconfig.get_paths()["purelib"]

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and name in hidden:
            path = [place for place in sys.path if place != site]  # Ray brings a copy of colorama of its own
        return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder

import mipo_ray

names = [module.name for module in pkgutil.walk_packages(mipo_ray.__path__, "mipo_ray.")]
for name in [*names, "vllm.v1.engine.async_llm", "deepspeed", "ray.data", "ray.train.torch", "ray.dashboard.dashboard"]:
    if not name.endswith("__main__"):
        importlib.import_module(name)
files = {name: str(getattr(module, "__file__", None)) for name, module in list(sys.modules.items())}
loaded = [name for name in hidden & files.keys() if files[name].startswith(f"{site}/{name}")]
assert not loaded, loaded
print(len(names))
"""


def test_every_module_imports_without_the_packages_of_the_tests() -> None:
    left_out = {line.split("==")[0] for line in LEFT_OUT.read_text().split() if "==" in line}
    modules = {
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if {distribution.lower().replace("_", "-") for distribution in distributions} <= left_out
    }
    assert {"pytest", "hypothesis", "trl", "mypy"} <= modules

    done = subprocess.run([sys.executable, "-c", PROGRAM, *modules], capture_output=True, text=True, timeout=600)

    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 60
