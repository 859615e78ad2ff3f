"""What a run wrote is read back as it was written, whatever the folders above it are called.

python -m pytest tests/unit/test_tables.py

Ray Data's side is in tests/integration/test_written_tables.py.
"""

from __future__ import annotations

import ast
import re
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
from mipo_ray.tables.parquet import open_table
from mipo_ray.training.worker import _read_pairs

REPOSITORY = Path(mipo_ray.__file__).parents[1]
LOCAL = pyarrow.fs.LocalFileSystem()
COLUMNS = ["prompt_id", "context", "sample", "tokens"]
ROWS = pa.table({"prompt_id": ["a", "b"], "context": ["", ""], "sample": pa.array([0, 1], pa.int32())})

# What reads tables, with columns of whatever types they ask for: names of pyarrow, pandas, datasets and Ray Data.
READER = re.compile(
    r"((pyarrow|pa|pq|pandas|pd|datasets)\.(\w+\.)*"
    r"(read_\w+|open_\w+|ParquetFile|ParquetDataset|RecordBatch\w+Reader|dataset|\w+_dataset|unregister_extension_type)"
    r"|ray\.data\.(read|from)_(?!(items|arrow)$)\w+)"
)


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


def test_files_on_an_object_store_are_read_too() -> None:
    run = open_run("memory://tables/run")
    filesystem = run.arrow_filesystem()
    filesystem.create_dir(run.path("rows"))
    pyarrow.parquet.write_table(ROWS, run.path("rows/part.parquet"), filesystem=filesystem)
    for paths in (run.path("rows"), [run.path("rows/part.parquet")]):
        assert open_table(paths, filesystem).to_table().equals(ROWS)


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


def _readers(path: Path) -> list[str]:
    """What a module calls, or imports by its own name, that reads tables."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [ast.unparse(node.func)] if isinstance(node, ast.Call) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [name for name in names if READER.fullmatch(name)]
    return found


def test_no_other_code_reads_tables() -> None:
    """In the package and in the benchmarks: neither prompts nor what a run wrote."""
    files = [path for room in ("mipo_ray", "benchmarks") for path in (REPOSITORY / room).rglob("*.py")]
    assert {str(path.relative_to(REPOSITORY)): found for path in files if (found := _readers(path))} == {
        "mipo_ray/tables/parquet.py": ["pyarrow.parquet.ParquetFile", "pyarrow.dataset.dataset"],
        # Sources of their own, which read with mipo_ray.tables.parquet and mipo_ray.prompts.reading.
        "mipo_ray/ray_cluster/tables.py": ["ray.data.read_datasource"],
        "mipo_ray/prompts/dataset.py": ["ray.data.read_datasource"],
    }


@pytest.mark.parametrize(
    "line",
    [
        "import pyarrow.feather as f; pyarrow.feather.read_table(x)",
        "from pyarrow.parquet import read_table",
        "pq.ParquetFile(x)",
        "pa.ipc.open_stream(x)",
        "pd.read_pickle(x)",
        "ray.data.read_webdataset(x)",
        "datasets.load_dataset(x)",
    ],
)
def test_the_test_above_finds_other_readers(tmp_path: Path, line: str) -> None:
    (tmp_path / "code.py").write_text(line)
    assert _readers(tmp_path / "code.py") != []
