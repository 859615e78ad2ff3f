"""Ray Data reads what it wrote, and leaves out what it had written, in folders of any name.

python -m pytest tests/integration/test_written_tables.py

One folder holds what single names did wrong: a column of the rows and one of the ids, each alone enough for other rows
or for all of them once more.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
import pytest
import ray
import ray.data
from ray.data import ActorPoolStrategy

from mipo_ray.errors import UserError
from mipo_ray.prompts.files import find_files
from mipo_ray.prompts.reading import read_rows as read_prompt_rows
from mipo_ray.ray_cluster import connection
from mipo_ray.ray_cluster.blocks import map_actors, map_blocks, resumed_context
from mipo_ray.ray_cluster.resources import Request
from mipo_ray.ray_cluster.tables import read_rows
from mipo_ray.tables.parquet import open_table
from tests.helpers.planted_tables import PICKLED, write_planted

LOCAL = pyarrow.fs.LocalFileSystem()
NAME = "context=none/prompt_id=9/sample=7/übung 100% #1 [a] 'b' a::b"
ROWS = pa.table(
    {
        "prompt_id": [f"p{number}" for number in range(6)],
        "context": [""] * 6,
        "number": pa.array(range(6), pa.int64()),
    }
)


def test_rows_come_back_as_they_were_written_and_only_once(tmp_path: Path) -> None:
    place = tmp_path / NAME
    ray.data.from_arrow(ROWS).write_parquet(str(place / "rows"), filesystem=LOCAL)
    (file,) = (place / "rows").iterdir()
    found = read_rows(str(place / "rows"), LOCAL)
    assert found.schema().names == ROWS.column_names
    assert found.take_all() == ROWS.to_pylist()
    ids = read_rows([str(file)], LOCAL, ["prompt_id"])
    assert ids.take_all() == ROWS.select(["prompt_id"]).to_pylist()
    with pytest.raises(UserError, match=r"found prompt_id, context, number without sample"):
        read_rows([str(file)], LOCAL, ["prompt_id", "sample"])


def test_files_come_by_name_and_one_of_an_earlier_version_without_its_newer_columns(tmp_path: Path) -> None:
    for number in reversed(range(6)):
        rows = ROWS.slice(number, 1)
        pyarrow.parquet.write_table(
            rows.drop_columns("context") if number == 3 else rows, tmp_path / f"{number}.parquet"
        )
    found = read_rows(str(tmp_path), LOCAL).take_all()
    assert [row["number"] for row in found] == list(range(6))
    assert [row.get("context") for row in found] == ["", "", "", None, "", ""]


def marked(block: pa.Table, *, call: int) -> pa.Table:
    return block.append_column("call", pa.array([call] * block.num_rows, pa.int64()))


def test_what_an_earlier_call_wrote_is_left_out(tmp_path: Path) -> None:
    place = tmp_path / NAME
    (place / "rows").mkdir(parents=True)
    for call, rows in enumerate([ROWS.slice(0, 2), ROWS.slice(2)]):
        pyarrow.parquet.write_table(rows, place / f"rows/part-{call}.parquet")
        with resumed_context(f"{place}/checkpoint", LOCAL, id_column="prompt_id"):
            found = map_blocks(read_rows(str(place / "rows"), LOCAL), marked, call=call)
            found.write_parquet(str(place / "written"), filesystem=LOCAL)
    written = open_table(str(place / "written"), LOCAL).to_table().sort_by("number")
    assert written.select(ROWS.column_names).to_pylist() == ROWS.to_pylist()
    assert written["call"].to_pylist() == [0, 0, 1, 1, 1, 1]


def test_a_death_between_the_copy_and_the_removal_of_a_note_loses_no_rows(tmp_path: Path) -> None:
    """As where a run on an object store is killed, which copies where a disk renames."""
    pyarrow.parquet.write_table(ROWS, tmp_path / "rows.parquet")
    for call in range(2):
        with resumed_context(f"{tmp_path}/checkpoint", LOCAL, id_column="prompt_id"):
            found = map_blocks(read_rows([str(tmp_path / "rows.parquet")], LOCAL), marked, call=call)
            found.write_parquet(str(tmp_path / "written"), filesystem=LOCAL)
        (note,) = (tmp_path / "checkpoint").glob("*.parquet")
        shutil.copy(note, note.with_name(f"{note.stem}.pending.parquet"))
    written = open_table(str(tmp_path / "written"), LOCAL).to_table().sort_by("number")
    assert written.select(ROWS.column_names).to_pylist() == ROWS.to_pylist()
    assert set(written["call"].to_pylist()) == {0}


def user_error(raised: pytest.ExceptionInfo[BaseException]) -> str:
    """What a user is told of an error in one of Ray's tasks."""
    cause = connection.user_error(raised.value)
    assert cause is not None, raised.value
    return str(cause)


@ray.remote
def unpickled_in_a_worker(file: str) -> None:
    pyarrow.parquet.read_table(file).to_pylist()


@ray.remote
def prompts_in_a_worker(file: str) -> int:
    return len(list(read_prompt_rows(find_files(file)[0])))


@pytest.mark.parametrize("place", ["x", "x.y.element.z"])
def test_a_column_that_is_to_be_unpickled_does_not_run_in_a_worker(
    ray_cluster: object, tmp_path: Path, place: str
) -> None:
    """Of a run's files the driver reads the first alone; the workers read them all."""
    rows, mark = tmp_path / "rows", tmp_path / "mark"
    rows.mkdir()
    pyarrow.parquet.write_table(pa.table({"prompt_id": ["a"]}), rows / "a.parquet")
    planted = rows / "b.parquet"
    write_planted(planted, mark, place, prompt_id=["b"])
    told = f"{planted}, column '{place}': expected plain data, found the extension type '{PICKLED}'"
    for columns in (["prompt_id"], None):
        with pytest.raises(Exception, match="extension type") as raised:
            read_rows(str(rows), LOCAL, columns).materialize().take_all()
        assert user_error(raised).startswith(told)
    with pytest.raises(Exception, match="extension type") as raised:
        ray.get(prompts_in_a_worker.remote(str(planted)))
    assert user_error(raised).startswith(told)
    assert not mark.exists()
    # What was planted does run where nobody looks.
    ray.get(unpickled_in_a_worker.remote(str(planted)))
    assert mark.exists()


class Whole:
    """An actor that gives back what it is given."""

    def __call__(self, block: pa.Table) -> pa.Table:
        return block


def test_a_whole_block_goes_to_an_actor_with_gpus_too() -> None:
    """Ray Data's public `map_batches` refuses that, for models that would take the block as their batch."""
    request = Request("generation", "engine", "generation.pool.min_size", 1, 1, 1.0, 1.0, {})
    pool = ActorPoolStrategy(size=1)
    planned = map_actors(ray.data.range(8), Whole, (), request=request, pool=pool, wait_minutes=1.0)
    operator = planned._logical_plan.dag
    assert (operator.ray_remote_args["num_gpus"], operator.batch_size) == (1.0, None)
