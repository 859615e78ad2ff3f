"""Which blocks of a generate stage are written, told from the files that the stage leaves.

python -m pytest tests/unit/pairs/test_written.py
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from mipo_ray.pairs.written import ConditionedBlock, WrittenBlocks, conditioned_as, conditioned_blocks
from mipo_ray.storage.run_directory import RunDirectory

STAGE = "rounds/000/generate"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Three blocks of two rows and one of one, in two files; a row of the second block was dropped."""
    write(tmp_path, "conditioned/x_000000-0.parquet", ["p1", "p2", "p3"], ["one", "one", "two"], ["", "", ""])
    write(
        tmp_path,
        "conditioned/x_000001-0.parquet",
        ["p4", "p5", "p6", "p7"],
        ["two", "three", "three", "four"],
        ["no_context", "", "", ""],
    )
    return RunDirectory(str(tmp_path))


def write(root: Path, name: str, prompts: list[str], blocks: list[str] | None = None, dropped: list[str] | None = None):
    path = root / STAGE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"prompt_id": prompts}
    if blocks is not None and dropped is not None:
        columns |= {"block_id": blocks, "dropped": dropped}
    pyarrow.parquet.write_table(pa.table(columns), path)


def test_blocks_of_conditioned_rows_may_lie_across_files(run: RunDirectory) -> None:
    assert conditioned_blocks(run, STAGE) == [
        ConditionedBlock("p1", 2, 2),
        ConditionedBlock("p3", 2, 1),
        ConditionedBlock("p5", 2, 2),
        ConditionedBlock("p7", 1, 1),
    ]


def test_a_block_is_written_when_it_is_noted_and_told_once(run: RunDirectory, tmp_path: Path) -> None:
    """Pairs whose note is pending may be written again: nobody may train on them."""
    written = WrittenBlocks(run, STAGE, conditioned_blocks(run, STAGE))
    assert written.look() == {}
    write(tmp_path, "y_000002-0.parquet", ["p5", "p6"])
    write(tmp_path, "checkpoint/y_000002.pending.parquet", ["p5", "p6"])
    assert written.look() == {}
    (tmp_path / STAGE / "checkpoint/y_000002.pending.parquet").rename(tmp_path / STAGE / "checkpoint/y_000002.parquet")
    write(tmp_path, "checkpoint/y_000000.parquet", ["p1", "p2"])
    assert written.look() == {
        0: str(tmp_path / STAGE / "y_000000-0.parquet"),
        2: str(tmp_path / STAGE / "y_000002-0.parquet"),
    }
    assert written.look() == {}


def test_rows_that_begin_inside_a_block_are_refused(run: RunDirectory, tmp_path: Path) -> None:
    write(tmp_path, "checkpoint/y_000000.parquet", ["p2"])
    with pytest.raises(
        RuntimeError, match=r"y_000000.parquet: expected the rows of a conditioning block, found .*'p2'"
    ):
        WrittenBlocks(run, STAGE, conditioned_blocks(run, STAGE)).look()


def test_rows_that_are_conditioned_again_have_another_name(run: RunDirectory, tmp_path: Path) -> None:
    assert conditioned_as(run, STAGE) == "x_000000-0"
    assert conditioned_as(run, "rounds/001/generate") is None
