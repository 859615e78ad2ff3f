"""What a run wrote is read back as it was written, whatever the folders above it are called.

python -m pytest tests/unit/test_tables.py

Ray Data's side is in tests/integration/test_written_tables.py.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mipo_ray
from mipo_ray.errors import UserError
from mipo_ray.storage.run_directory import open_run
from mipo_ray.tables import open_table
from mipo_ray.training.worker import _read_pairs

REPOSITORY = Path(mipo_ray.__file__).parents[1]
LOCAL = pyarrow.fs.LocalFileSystem()
COLUMNS = ["prompt_id", "context", "sample", "tokens"]
ROWS = pa.table({"prompt_id": ["a", "b"], "context": ["", ""], "sample": pa.array([0, 1], pa.int32())})

# Calls that take folders named key=value for columns unless they are told not to.
PARTITIONED = {"read_parquet", "read_table", "ParquetDataset", "dataset"}


@settings(max_examples=40)
@given(
    folders=st.lists(
        st.tuples(st.sampled_from(COLUMNS), st.text("ab0 1.-_%#", min_size=1, max_size=5)), min_size=1, max_size=3
    )
)
def test_rows_are_the_files_own_below_any_key_and_value(
    tmp_path_factory: pytest.TempPathFactory, folders: list[tuple[str, str]]
) -> None:
    run = open_run(str(tmp_path_factory.mktemp("run").joinpath(*(f"{key}={value}" for key, value in folders))))
    place = Path(run.path("rounds/000"))
    place.mkdir(parents=True)
    pyarrow.parquet.write_table(ROWS, place / "part.parquet")
    for paths in (str(place), [str(place / "part.parquet")]):
        assert open_table(paths, run.arrow_filesystem(), ROWS.column_names).to_table().equals(ROWS)


def test_a_missing_column_is_named_with_the_place(tmp_path: Path) -> None:
    """A folder that bears the column's name does not stand in for it."""
    place = tmp_path / "tokens=3"
    place.mkdir()
    pyarrow.parquet.write_table(ROWS, place / "part.parquet")
    with pytest.raises(UserError, match=r"tokens=3.*expected the columns prompt_id, tokens, found .* without tokens;"):
        open_table(str(place), LOCAL, ["prompt_id", "tokens"])


def test_pairs_of_the_worker_command_are_the_files_own(tmp_path: Path) -> None:
    from mipo_ray.config.train import TrainConfig

    place = tmp_path / "pair_id=other"
    place.mkdir()
    pairs = {"pair_id": ["p"], "dropped": [""]} | {
        name: pa.array([[1, 2]], pa.list_(pa.int32()))
        for name in ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
    }
    pyarrow.parquet.write_table(pa.table(pairs), place / "pairs.parquet")
    (pair,) = _read_pairs(str(place / "pairs.parquet"), TrainConfig())
    assert pair.pair_id == "p"


def test_no_other_code_reads_tables_with_columns_of_the_path() -> None:
    """In the package and in the benchmarks; `pyarrow.dataset.dataset` is harmless, and yet belongs in one place."""
    calls, wrong = 0, []
    for path in [*(REPOSITORY / "mipo_ray").rglob("*.py"), *(REPOSITORY / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PARTITIONED:
                calls += 1
                told = any(
                    word.arg == "partitioning" and getattr(word.value, "value", "") is None for word in node.keywords
                )
                wrong += [] if told else [f"{path.relative_to(REPOSITORY)}:{node.lineno}"]
    assert calls >= 4
    assert wrong == []
