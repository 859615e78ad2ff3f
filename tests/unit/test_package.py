"""The package as others install it: one command for all, and its data files with it.

python -m pytest tests/unit/test_package.py
"""

from __future__ import annotations

import fnmatch
import importlib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

import mipo_ray
from mipo_ray import __main__ as command

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_the_script_is_the_module() -> None:
    assert PROJECT["project"]["scripts"] == {"mipo-ray": "mipo_ray.__main__:main"}


def test_every_command_is_a_module_with_a_main_of_its_own() -> None:
    """`python -m mipo_ray.NAME` and `mipo-ray NAME` are the same function."""
    for name, (module, _) in command.COMMANDS.items():
        assert module.removesuffix(".__main__") == f"mipo_ray.{name}"
        assert callable(importlib.import_module(module).main)


def test_every_program_of_the_top_is_a_command() -> None:
    """A module beside `run.py` that can be started is one that people look for under `mipo-ray`."""
    programs = {
        path.stem
        for path in (REPOSITORY / "mipo_ray").glob("*.py")
        if path.stem != "__main__" and '__name__ == "__main__"' in path.read_text()
    }
    assert programs
    assert programs <= command.COMMANDS.keys()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, "evaluate   measure accuracy tasks"),
        ([], 2, "commands:"),
        (["--version"], 0, f"mipo-ray {mipo_ray.__version__}"),
        (["evalute", "runs/mine"], 2, "found evalute; did you mean evaluate?"),
        (["run", "--dry-run", "nowhere.yaml"], 2, "nowhere.yaml: cannot read the recipe"),
    ],
)
def test_words_find_their_command(
    words: Sequence[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command's own exit code and message come back, and a wrong name is told the nearest."""
    assert command.main(words) == code
    output = capsys.readouterr()
    assert said in output.out + output.err


def test_every_data_file_belongs_to_the_wheel() -> None:
    """What is no Python file is in a wheel only where pyproject.toml names it: a template left out fails at the end of
    somebody's run."""
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["mipo_ray"]
    root = REPOSITORY / "mipo_ray"
    files = [
        path.relative_to(root) for path in root.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    assert len(files) > 20
    left_out = [str(file) for file in files if not any(matches(file, pattern) for pattern in patterns)]
    assert left_out == []
    packages = {path.parent for path in root.rglob("__init__.py")}
    assert {(root / file).parent for file in files} <= packages


def matches(file: Path, pattern: str) -> bool:
    """As setuptools reads a pattern: `*` stays in a folder, `**/` is any number of them."""
    if pattern.startswith("**/"):
        return fnmatch.fnmatch(file.name, pattern.removeprefix("**/"))
    return fnmatch.fnmatch(str(file), pattern) and str(file).count("/") == pattern.count("/")


def test_the_page_names_the_extras_and_commands_that_there_are() -> None:
    page = (REPOSITORY / "docs" / "install.md").read_text()
    extras = PROJECT["project"]["optional-dependencies"].keys()
    groups = re.findall(r"'\.\[([\w,]+)\]'|--extra (\w+)", page)
    used = {name for group in groups for part in group for name in part.split(",")} - {""}
    assert used
    assert used <= extras
    assert all(f"`{extra}`" in page for extra in extras)
    assert all(f"`{name}`" in page for name in command.COMMANDS)
    overrides = (REPOSITORY / "requirements/cpu-overrides.txt").read_text().splitlines()
    assert set(re.findall(r'^    "(.* ; .*)",$', page, flags=re.MULTILINE)) <= set(overrides)
