"""A finished run of which one file is damaged: what would be resumed, exported or published is whole, or refused.

python -m pytest tests/integration/test_fuzzed_run_directories.py
FULL_PRODUCTS=1 python -m pytest tests/integration/test_fuzzed_run_directories.py      the night's cases
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray import run
from mipo_ray.pairs import __main__ as pairs
from mipo_ray.publish import __main__ as publish
from tests.helpers.fuzzed_inputs import damaged, fuzzed, must_answer
from tests.helpers.golden_run import GoldenRun

COMMANDS = {
    "resume": (run.main, "--dry-run {recipe} run_dir={run}"),
    "one round more": (run.main, "--dry-run {recipe} run_dir={run} rounds=3"),
    "export": (pairs.main, "export {run} --format trl --output {output}"),
    "export whole": (pairs.main, "export {run} --format parquet --output {output}"),
    "publish": (publish.main, "{run} --to someone/model --dry-run --pairs --results --output {output}"),
}
numbers = itertools.count()  # of the outputs


@pytest.fixture(scope="module")
def finished(golden_run: GoldenRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with its configuration beside it as a recipe."""
    directory = golden_run.copy(tmp_path_factory.mktemp("finished") / "run")
    shutil.copy(directory / "config.yaml", directory.parent / "recipe.yaml")
    return directory


@pytest.mark.parametrize("name", COMMANDS)
@fuzzed
@given(data=st.data())
def test_any_damage(finished: Path, name: str, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(path for path in finished.rglob("*") if path.is_file())))
    whole, output = file.read_bytes(), finished.parent / f"output-{next(numbers)}"
    command, words = COMMANDS[name]
    places = {"recipe": finished.parent / "recipe.yaml", "run": finished, "output": output}
    try:
        file.write_bytes(data.draw(damaged(whole)))
        answer = must_answer(command, [word.format(**places) for word in words.split()], finished)
        assert not answer.is_refused or not (output / "README.md").exists(), "what was refused looks finished"
    finally:
        file.write_bytes(whole)
        shutil.rmtree(output, ignore_errors=True)
