"""A checkpoint that is not as it was written is found out, and the one before it is taken.

python -m pytest tests/unit/training/test_whole_checkpoints.py
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mipo_ray.training.whole_checkpoints import NOTED, PROGRESS, find_damage, first_whole, note_files

WORKERS = 3
pytestmark = pytest.mark.usefixtures("process_group")


def write_checkpoint(directory: Path) -> Path:
    """Shards of three workers, each noted where it was written, brought together."""
    for rank in range(WORKERS):
        shard = directory / "shards" / str(rank)
        (shard / "state").mkdir(parents=True)
        (shard / "state" / f"rank_{rank}.pt").write_bytes(bytes(range(rank, rank + 100)))
        if rank == 0:
            (shard / PROGRESS).write_text(json.dumps({"workers": WORKERS}))
        note_files(shard, rank)
    place = directory / "checkpoint"
    for rank in range(WORKERS):
        for path in (directory / "shards" / str(rank)).rglob("*"):
            if path.is_file():
                target = place / path.relative_to(directory / "shards" / str(rank))
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
    return place


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (
        lambda place: (place / "state/rank_1.pt").write_bytes(b"0" * 40),
        "state/rank_1.pt: expected 100 bytes, found 40",
    ),
    "lost": (lambda place: (place / "state/rank_2.pt").unlink(), "state/rank_2.pt is missing"),
    "other bytes": (
        lambda place: _flip_a_byte(place / "state/rank_1.pt"),
        "state/rank_1.pt: expected what was written, found other bytes",
    ),
    "a shard lost": (lambda place: (place / "files-2.json").unlink(), "files-2.json is missing"),
    "notes cut off": (lambda place: (place / "files-2.json").write_text('{"state/ra'), "cannot be read"),
    "no progress": (lambda place: (place / PROGRESS).unlink(), "cannot be read"),
    "progress of nobody": (lambda place: (place / PROGRESS).write_text("{}"), "cannot be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_as_it_was_written_is_found(fault: str, tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path)
    assert find_damage(place, range(WORKERS)) == ""
    damage, expected = FAULTS[fault]
    damage(place)
    assert expected in find_damage(place, range(WORKERS))


def test_checksums_are_those_of_the_shards_that_are_read(tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path)
    _flip_a_byte(place / "state/rank_1.pt")
    assert find_damage(place, {0, 2}) == ""


def test_a_checkpoint_of_an_earlier_release_has_no_notes(tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path)
    for path in place.glob("files-*.json"):
        path.unlink()
    assert find_damage(place, range(WORKERS)) == ""


def test_the_newest_that_is_whole_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = {name: write_checkpoint(tmp_path / name) for name in ("new", "middle", "old")}
    _flip_a_byte(places["new"] / "state/rank_2.pt")
    (places["middle"] / "state/rank_0.pt").unlink()

    def opened(name: str) -> contextlib.AbstractContextManager[Path]:
        if name == "gone":
            raise FileNotFoundError("no such checkpoint")
        return contextlib.nullcontext(places[name])

    with first_whole("runs/mine", ["gone", *places], opened) as found:
        assert found == places["old"]
    assert capsys.readouterr().err == (
        "warning: training goes on from old, since gone: cannot be read: no such checkpoint; new: state/rank_2.pt: "
        "expected what was written, found other bytes; middle: state/rank_0.pt is missing\n"
    )


def test_without_a_whole_one_training_starts_from_its_beginning_and_says_so(tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path)
    (place / "state/rank_1.pt").unlink()
    told: list[str] = []
    with first_whole("runs/mine", ["new"], lambda _: contextlib.nullcontext(place), told.append) as found:
        assert found is None
    assert told == [
        "warning: training starts from the beginning of the round, since no checkpoint in runs/mine is as it was "
        "written: new: state/rank_1.pt is missing"
    ]
    with first_whole("runs/mine", [], lambda _: contextlib.nullcontext(place), told.append) as found:
        assert found is None
    assert len(told) == 1  # nothing was there


@pytest.mark.parametrize("uploaded", range(1, 2**4))
def test_an_upload_that_was_cut_off_is_never_taken_for_a_checkpoint(uploaded: int, tmp_path: Path) -> None:
    """Of one worker, whatever of its files had arrived; before its notes it looks like an earlier release's."""
    shard = tmp_path / "shard"
    (shard / "state").mkdir(parents=True)
    (shard / "state/rank_0.pt").write_bytes(b"0" * 100)
    (shard / "state/model.pt").write_bytes(b"1" * 100)
    (shard / PROGRESS).write_text(json.dumps({"workers": 1, NOTED: True}))
    note_files(shard, 0)
    files = sorted(path for path in shard.rglob("*") if path.is_file())
    assert find_damage(shard, [0]) == ""
    for number, path in enumerate(files):
        if not uploaded & 1 << number:
            path.unlink()
    assert (find_damage(shard, [0]) == "") == (uploaded == 2**4 - 1)
