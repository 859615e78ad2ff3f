"""The wheel in an environment of its own: built, installed, and every recipe dry-run from it.

python -m pytest tests/nightly/test_wheel.py

Its dependencies are those of this environment: they are put beside it by a path, so that nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LEFT_BEHIND = shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", "__pycache__", "tests", ".*_cache")


def program(*words: str | Path, cwd: Path, **variables: str) -> str:
    """Its output, once it ended well. It knows nothing of this repository: no PYTHONPATH, another folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools leaves files where it builds."""
    directory = tmp_path_factory.mktemp("wheel")
    shutil.copytree(REPOSITORY, directory / "source", ignore=LEFT_BEHIND)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    program(*build, "--wheel-dir", directory, directory / "source", cwd=directory)
    (found,) = directory.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment that holds the wheel alone; dependencies stand beside it."""
    directory = tmp_path_factory.mktemp("bare")
    program(sys.executable, "-m", "venv", "--without-pip", directory / "env", cwd=directory)
    programs = directory / "env/bin"
    install = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet", "--no-deps"]
    program(*install, "--no-index", wheel, cwd=directory)
    (packages,) = directory.glob("env/lib/python*/site-packages")
    # A path in a .pth file is searched after the environment's own; .pth files that lie there are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    root = REPOSITORY / "mipo_ray"
    names = {f"mipo_ray/{path.relative_to(root)}" for path in root.rglob("*") if path.is_file()}
    there = {name for name in names if "__pycache__" not in name}
    assert there == {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("mipo_ray/")}


def test_the_command_runs_without_the_repository(bare: Path, tmp_path: Path) -> None:
    """The demo is in the wheel: its recipe, prompts and held-out prompts."""
    assert "commands:" in program(bare / "mipo-ray", "--help", cwd=tmp_path)
    place = program(bare / "python", "-c", "import mipo_ray; print(mipo_ray.__file__)", cwd=tmp_path)
    assert str(bare.parent) in place
    said = program(bare / "mipo-ray", "run", "--dry-run", f"run_dir={tmp_path}/run", cwd=tmp_path)
    assert "dry run: nothing was started" in said


def test_every_recipe_is_dry_run_from_the_wheel(bare: Path, tmp_path: Path) -> None:
    """The tests of recipes, over the wheel: in a folder that has them and the recipes, and no package."""
    for name in ("jobs", "tests"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    said = program(
        bare / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/test_jobs.py", cwd=tmp_path
    )
    assert " passed" in said
    assert "failed" not in said
