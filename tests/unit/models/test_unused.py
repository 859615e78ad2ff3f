"""Fetched models leave the cache by age and by size, and never what is in use.

python -m pytest tests/unit/models/test_unused.py
"""

from __future__ import annotations

import os
from collections import namedtuple
from pathlib import Path

import pytest

from mipo_ray.errors import UserError
from mipo_ray.models import unused
from mipo_ray.models.source import local_model_directory
from mipo_ray.models.unused import LIMIT, make_room, note_use
from tests.unit.models.test_models import write_model

HOUR, DAY, GIB = 3600.0, 86_400.0, 1024**3
NOW = 2_000_000_000.0
# Hours since each was used; the names are of what is fetched, and of what is not.
USED = {"a" * 24: 20, "b" * 24: 30, "c" * 24: 50, "d" * 24: 100, "e" * 24: 200, "SmolLM2-135M-Instruct": 5000}
Usage = namedtuple("Usage", "free")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each a quarter of a GiB, without its blocks."""
    monkeypatch.delenv(LIMIT, raising=False)
    for name, hours in USED.items():
        (tmp_path / name).mkdir()
        with (tmp_path / name / "model.safetensors").open("wb") as file:
            file.truncate(GIB // 4)
        os.utime(tmp_path / name, (0, NOW - hours * HOUR))
    return tmp_path


def left(models: Path) -> str:
    """The first letters of what is left of those that are fetched."""
    names = sorted(path.name for path in models.iterdir() if path.is_dir())
    assert "SmolLM2-135M-Instruct" in names
    return "".join(name[0] for name in names if len(name) == 24)


def test_what_was_not_used_for_a_week_goes(models: Path) -> None:
    make_room(models, 0, NOW)
    assert left(models) == "abcd"


@pytest.mark.parametrize(
    ("limit", "needed", "expected"),
    [
        ("1.25", 0, "abcd"),
        ("1", GIB // 4, "abc"),
        ("0.5", 0, "ab"),
        ("0.5", 1, "a"),  # what was used within the day stays, whatever the limit
        ("0.001", GIB, "a"),
    ],
)
def test_the_longest_unused_goes_where_there_is_too_much(
    limit: str, needed: int, expected: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT, limit)
    make_room(models, needed, NOW)
    assert left(models) == expected


def test_a_disk_without_room_is_given_room(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_usage(path: Path) -> Usage:
        held = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return Usage(free=3 * GIB - held)

    monkeypatch.setattr(unused.shutil, "disk_usage", disk_usage)
    make_room(models, int(1.3 * GIB), NOW)  # and a GiB to spare: 0.7 may stay, of which the embedded model has 0.25
    assert left(models) == "a"
    monkeypatch.setattr(unused.shutil, "disk_usage", lambda _: Usage(free=1000 * GIB))
    make_room(models, int(1.3 * GIB), NOW)
    assert left(models) == "a"


def test_what_killed_processes_left_of_other_models_goes_after_an_hour(models: Path) -> None:
    for name, hours in (("f" * 24 + ".0123.partial", 2.0), ("f" * 24 + ".4567.partial", 0.5)):
        (models / name).mkdir()
        (models / name / "half").touch()
        for path in (models / name / "half", models / name):
            os.utime(path, (0, NOW - hours * HOUR))
    make_room(models, 0, NOW)
    assert [path.name[25:29] for path in models.glob("*.partial")] == ["4567"]


@pytest.mark.parametrize("text", ["much", "0", "-3", "nan"])
def test_a_limit_that_is_none_is_named(text: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, text)
    with pytest.raises(UserError, match=f"{LIMIT}: expected a number of GiB above 0, found '{text}'"):
        make_room(models, 0, NOW)
    assert left(models) == "abcde"


def test_policies_of_rounds_replace_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run's nodes fetch them: the one in use and the newest stay."""
    monkeypatch.setenv("MIPO_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(LIMIT, "1e-9")  # less than one of them
    first, second, third = (
        local_model_directory(f"local://{write_model(tmp_path / f'round {number}')}") for number in range(3)
    )
    assert Path(first).is_dir()
    for directory in (first, second, third):
        os.utime(directory, (0, Path(directory).stat().st_mtime - 30 * HOUR))
    note_use(Path(second))
    local_model_directory(f"local://{write_model(tmp_path / 'round 3')}")
    assert [Path(directory).is_dir() for directory in (first, second, third)] == [False, True, False]


def test_use_of_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    note_use(tmp_path / "gone")
