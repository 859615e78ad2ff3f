"""A run whose pairs another model sampled than the one that is trained ends before an update.

python -m pytest tests/nightly/test_another_sampler.py
"""

from __future__ import annotations

import re
import shutil

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from mipo_ray.pairs.schema import SAMPLER_LOGPROB
from tests.helpers.runs import has_traceback, run_command


def test_a_sampler_that_is_another_model_ends_the_run_before_an_update(golden_run, ray_address, tmp_path):
    run_dir = golden_run.copy(tmp_path / "run")
    for later in ("rounds/000/train", "rounds/000/evaluate", "rounds/001"):
        shutil.rmtree(run_dir / later)
    for path in (run_dir / "rounds/000/generate").glob("*.parquet"):
        table = pyarrow.parquet.read_table(path)
        index = table.schema.get_field_index(SAMPLER_LOGPROB)
        doctored = pc.multiply(table[index], pa.scalar(0.5, pa.float32()))
        pyarrow.parquet.write_table(table.set_column(index, table.schema.field(index), doctored), path)
    code, output = run_command(ray_address, *golden_run.options, f"run_dir={run_dir}")
    assert code == 2, output
    assert re.search("^error: pair '[0-9a-f]{16}': the engine that sampled it gave it a log-prob of -", output, re.M)
    assert "16 of 16 answers that were compared are too far apart" in output
    assert "These are two models" in output
    assert not has_traceback(output)
    assert not (run_dir / "rounds/000/train/manifest.json").exists()
    assert not (run_dir / "rounds/000/train/policy").exists()
