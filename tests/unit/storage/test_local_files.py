"""What is written beside a file, or before it, is never written through a link; a dry run writes nothing.

python -m pytest tests/unit/storage/test_local_files.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mipo_ray.config.recipe import load_config
from mipo_ray.storage import run_directory
from mipo_ray.storage.configuration import record_config
from mipo_ray.storage.local_files import new_file
from mipo_ray.storage.run_directory import StorageError, open_run


def test_links_in_place_of_temporary_files_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can write to the run directory plants links under every name that could be foreseen, and cannot know
    the others; here he does."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    run = open_run(str(tmp_path / "run"))
    os.makedirs(run.root)
    for name in ("config.yaml.writing", "lock.json.writing", f".probe-{os.getpid()}"):
        os.symlink(precious, run.path(name))
    run.check_writable()
    record_config(run, load_config())
    assert precious.read_text() == "precious"

    monkeypatch.setattr(run_directory.secrets, "token_hex", lambda _: "known")
    os.symlink(precious, run.path("results.json.known.writing"))
    with pytest.raises(StorageError, match=r"results\.json: cannot be written: .*File exists"):
        run.write_text("results.json", "{}")
    os.symlink(precious, run.path(".probe-known"))
    with pytest.raises(StorageError, match=r"cannot write to the run directory"):
        run.check_writable()
    assert precious.read_text() == "precious"


def test_a_file_that_is_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    run = open_run(str(tmp_path / "run"))
    os.makedirs(run.root)
    os.symlink(precious, run.path("results.json"))
    run.write_text("results.json", "{}")
    assert precious.read_text() == "precious"
    assert not os.path.islink(run.path("results.json"))


def test_files_have_the_mode_that_the_user_asks_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_file(str(tmp_path / "file")) as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


# Every file that is opened for writing, and every directory that is made, by the interpreter's own account.
WATCHED = """
import json, os, sys
written = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        flags = arguments[2] if isinstance(arguments[2], int) else 0
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and os.fsdecode(arguments[0]) != os.devnull:
            written.append(os.fsdecode(arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link"):
        written.append(f"{event} {arguments[0]}")
sys.addaudithook(watch)
from mipo_ray.compare import main as compare
from mipo_ray.evaluate import main as evaluate
from mipo_ray.run import main as run
code = {"run": run, "compare": compare, "evaluate": evaluate}[sys.argv[1]](sys.argv[2:])
print(json.dumps([code, written]))
"""

RECIPES = Path(__file__).parents[3] / "jobs"


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--dry-run"],
        ["run", "--dry-run", "--tokens"],
        [
            "run",
            "--dry-run",
            "prompts.path=bundled:instructions",
            "prompts.question_template='{{ row | length }} {{ prompt | upper }}'",
            "conditioning.strategy=random_prompt",
            "evaluate.enabled=false",
        ],
        ["compare", "--dry-run", str(RECIPES / "compare" / "personalization.yaml")],
    ],
)
def test_a_dry_run_writes_nothing_anywhere(tmp_path: Path, arguments: list[str]) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in environment.items() if name not in ("HF_HOME", "MIPO_RAY_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments, f"run_dir={tmp_path}/runs/mine", "model.path=embedded"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=home,
        timeout=300,
    )
    code, written = json.loads(done.stdout.splitlines()[-1])
    assert (code, written) == (0, []), done.stderr
    assert "dry run: nothing was started" in done.stdout
    assert list(tmp_path.rglob("*")) == [home]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_dry_run_tells_of_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match=r"cannot write to the run directory: .*Permission denied"):
        open_run(str(tmp_path / "run")).check_place()
