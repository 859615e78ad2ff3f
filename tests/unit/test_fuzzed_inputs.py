"""Broken configurations, recipes, prompts and pairs: the command uses them, or refuses them by name before any start.

python -m pytest tests/unit/test_fuzzed_inputs.py
FULL_PRODUCTS=1 python -m pytest tests/unit/test_fuzzed_inputs.py      the cases of the night
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from mipo_ray import run
from tests.helpers.fuzzed_inputs import Answer, damaged, fuzzed, must_answer, overrides, tables
from tests.helpers.runs import write_prompts

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = sorted([*(REPOSITORY / "jobs").rglob("*.yaml"), *(REPOSITORY / "mipo_ray/examples").glob("*.yaml")])
PROMPT = {"prompt": "What is moss?", "context": "I like rain.", "group": "user"}
PAIR = {"prompt": "What is moss?", "chosen": "A plant.", "rejected": "A tram."}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    """The folder of a run that would pass every check, in which the commands are called: recipe.yaml has it all."""
    place = tmp_path_factory.mktemp("fuzzed")
    write_prompts(place / "train.jsonl", "train", 12)
    write_prompts(place / "held_out.jsonl", "held_out", 6)
    recipe = {
        "run_dir": f"{place}/run",
        "model": {"path": str(tiny_model), "max_model_len": 256},
        "prompts": {"path": f"{place}/train.jsonl"},
        "evaluate": {"prompts": {"path": f"{place}/held_out.jsonl"}},
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    of_pairs = {name: recipe[name] for name in ("run_dir", "model")} | {"rounds": 1, "evaluate": {"enabled": False}}
    (place / "pairs.yaml").write_text(json.dumps(of_pairs))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield place


def dry_run(place: Path, *given: str) -> Answer:
    return must_answer(run.main, ["--dry-run", *given], place)


def test_the_place_itself_passes(place: Path) -> None:
    assert not dry_run(place, "recipe.yaml").is_refused


@fuzzed
@given(given=overrides())
def test_any_configuration(place: Path, given: list[str]) -> None:
    event("refused" if dry_run(place, "recipe.yaml", *given).is_refused else "used")


@fuzzed
@given(data=st.data())
def test_any_recipe(place: Path, data: st.DataObject) -> None:
    recipe = data.draw(st.sampled_from(RECIPES))
    (place / "broken.yaml").write_bytes(data.draw(damaged(recipe.read_bytes())))
    dry_run(place, "broken.yaml", f"run_dir={place}/run", f"prompts.path={place}/train.jsonl")


@fuzzed
@given(table=tables(PROMPT))
def test_any_prompts(place: Path, table: tuple[str, bytes]) -> None:
    suffix, content = table
    file = place / f"broken{suffix}"
    file.write_bytes(content)
    answer = dry_run(place, "recipe.yaml", f"prompts.path={file}")
    assert answer.is_refused is False or file.name in answer.text or "conditioning" in answer.text, answer.text
    if not answer.is_refused and suffix == ".jsonl":
        rows = [json.loads(line) for line in content.splitlines() if line.strip()]
        assert rows, "accepted a file without rows"
        assert all(row["prompt"] for row in rows), "accepted rows without a prompt"


@fuzzed
@given(table=tables(PAIR))
def test_any_pairs(place: Path, table: tuple[str, bytes]) -> None:
    suffix, content = table
    file = place / f"broken{suffix}"
    file.write_bytes(content)
    answer = dry_run(place, "pairs.yaml", f"pairs.path={file}")
    assert answer.is_refused is False or file.name in answer.text, answer.text
    if not answer.is_refused and suffix == ".jsonl":
        rows = [json.loads(line) for line in content.splitlines() if line.strip()]
        assert rows, "accepted a file without rows"
        assert all(row["chosen"] and row["rejected"] for row in rows), "accepted rows without a pair"
