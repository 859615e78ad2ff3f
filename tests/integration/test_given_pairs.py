"""A run on pairs that exist: taken, trained on, finished; gone on with where it was cut, begun anew where they changed.

python -m pytest tests/integration/test_given_pairs.py
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.data import DataContext

from mipo_ray import run as run_command
from mipo_ray.config.recipe import load_config
from mipo_ray.errors import UserError
from mipo_ray.generation import given_pairs
from mipo_ray.generation.given_pairs import take_pairs
from mipo_ray.generation.requests import TooManyDroppedError
from mipo_ray.monitoring.events import recording
from mipo_ray.pairs.__main__ import main as pairs_command
from mipo_ray.pairs.given import PairSummary
from mipo_ray.planning.plan import Inputs, check_inputs
from mipo_ray.ray_cluster.resources import resolve
from mipo_ray.session import Session
from mipo_ray.storage.configuration import record_config
from mipo_ray.storage.manifests import GenerateFacts, Manifest
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import open_run
from tests.helpers.runs import events, joined_cluster, read_pairs, snapshot

ROWS = 20
TOO_LONG = 7  # the number of the row


@dataclass(frozen=True)
class FinishedRun:
    directory: Path
    options: tuple[str, ...]
    output: str
    file: Path


def rows(count: int = ROWS) -> list[dict[str, Any]]:
    found = [
        {"prompt": f"Question {i}: what grows?", "chosen": f"Moss and {i} ferns.", "rejected": f"No. {i}"}
        for i in range(count)
    ]
    found[TOO_LONG]["chosen"] = "Moss, " * 200
    return found


def write(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in values))
    return path


@pytest.fixture(scope="module")
def finished(ray_address: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The command as a user gives it, with no recipe, in this process; what Ray's workers print does not count."""
    place = tmp_path_factory.mktemp("given")
    file = write(place / "pairs.jsonl", rows())
    options = (
        f"ray.address={ray_address}",
        f"run_dir={place}/run",
        f"pairs.path={file}",
        f"model.path={tiny_model}",
        "model.max_model_len=256",
        "generation.sampling.max_tokens=16",
        "train.learning_rate=1e-3",
        "train.batch_size=8",
        "train.epochs=2",
    )
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("mipo_ray.session.say", said.append)
        with joined_cluster():
            assert run_command.main(list(options)) == 0
    return FinishedRun(place / "run", options, "\n".join(said), file)


def test_the_run_trains_on_the_rows_that_fit(finished: FinishedRun) -> None:
    pairs = read_pairs(finished.directory, 0)
    assert len(pairs) == ROWS
    assert [pair["prompt_id"] for pair in pairs if pair["dropped"]] == [f"pairs.jsonl:{TOO_LONG + 1}"]
    assert "round 0  generate  done in" in finished.output
    assert f": {ROWS - 1} pairs kept of {ROWS}, 1 too_long" in finished.output
    manifest = json.loads((finished.directory / "rounds/000/train/manifest.json").read_text())
    summary = manifest["summary"]
    assert summary["pairs"] == ROWS - 1
    assert summary["steps"] == 2 * math.ceil((ROWS - 1) / 8)
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert summary["last_loss"] < summary["first_loss"]
    assert (finished.directory / "rounds/000/train/policy/model.safetensors").is_file()


def test_nothing_was_sampled_or_measured(finished: FinishedRun) -> None:
    names = {event["event"] for event in events(finished.directory)}
    assert {"stage_start", "pairs", "train_step", "dropped"} <= names
    assert "engine_start" not in names
    assert not (finished.directory / "base").exists()
    report = (finished.directory / "report.html").read_text()
    assert "pairs that exist" in report
    assert "conditioned rows" not in report
    assert "sampled under" not in report


def test_the_same_command_has_nothing_left_to_do(finished: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(finished.directory)
    assert run_command.main(list(finished.options)) == 0
    assert "finished before, nothing to do" in capsys.readouterr().out
    assert {name: state for name, state in snapshot(finished.directory).items() if name != "lock"} == {
        name: state for name, state in before.items() if name != "lock"
    }


def test_a_killed_training_goes_on_without_reading_the_pairs_again(
    finished: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(finished.directory, directory)
    (directory / "rounds/000/train/manifest.json").unlink()
    generated = snapshot(directory / "rounds/000/generate")
    with joined_cluster():
        assert run_command.main([*finished.options, f"run_dir={directory}"]) == 0
    assert snapshot(directory / "rounds/000/generate") == generated
    assert "round 0  generate  finished before" in capsys.readouterr().out


def test_its_pairs_are_handed_on_as_they_came(finished: FinishedRun, tmp_path: Path) -> None:
    assert pairs_command(["export", str(finished.directory), "--format", "trl", "--output", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out/round_0.jsonl").read_text().splitlines()
    found = sorted((row["prompt"][0]["content"], row["chosen"][0]["content"]) for row in map(json.loads, lines))
    expected = [row for number, row in enumerate(rows()) if number != TOO_LONG]
    assert found == sorted((row["prompt"], row["chosen"]) for row in expected)


# The stage alone


def inputs_of(place: Path, model: Path, *overrides: str) -> Inputs:
    (place / "recipe.yaml").write_text("{}")
    options = [f"run_dir={place}/run", f"model.path={model}", "model.max_model_len=256", "rounds=1"]
    options += [f"pairs.path={place}/pairs.jsonl", "evaluate.enabled=false", "generation.sampling.max_tokens=16"]
    config = load_config(place / "recipe.yaml", [*options, *overrides])
    return check_inputs(config, open_run(config.run_dir))


def take(inputs: Inputs) -> Manifest[GenerateFacts]:
    assert isinstance(inputs.prompts, PairSummary)
    record_config(inputs.run, inputs.config)
    with recording(inputs.run) as sent, DataContext.current(DataContext.get_current().copy()):
        DataContext.get_current().raise_original_map_exception = True  # as `connection.connect` has it
        session = Session(inputs.config, inputs.run, resolve(inputs.config, {"CPU": 6.0}), sent)
        return take_pairs(session, Round(0), inputs.prompts)


def test_a_stage_that_was_cut_writes_what_is_missing_and_another_file_is_another_stage(
    ray_cluster: object, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given_pairs, "_ROWS_PER_BLOCK", 8)
    write(tmp_path / "pairs.jsonl", rows(40))
    whole = inputs_of(tmp_path, tiny_model, "filters.drop_too_long=true")
    facts = take(whole).facts
    assert (facts.statistics.rows, facts.statistics.kept) == (40, 39)
    assert facts.statistics.dropped == {"too_long": 1}
    assert len(facts.pairs) == 5

    # As a kill leaves it: no manifest, one file and its note not written, and half of another file.
    stage = Path(whole.run.path("rounds/000/generate"))
    ids = {pair["prompt_id"]: pair["pair_id"] for pair in read_pairs(tmp_path / "run", 0)}
    (stage / "manifest.json").unlink()
    lost = stage / facts.pairs[0]
    lost.unlink()
    (note,) = [path for path in (stage / "checkpoint").glob("*.parquet") if lost.name.startswith(path.stem)]
    note.unlink()
    others = {name: (stage / name).stat().st_mtime_ns for name in facts.pairs[1:]}
    again = take(whole).facts
    assert again.statistics == facts.statistics
    assert {name: (stage / name).stat().st_mtime_ns for name in others} == others
    assert {pair["prompt_id"]: pair["pair_id"] for pair in read_pairs(tmp_path / "run", 0)} == ids

    # What was begun on other rows is not gone on with.
    (stage / "manifest.json").unlink()
    write(tmp_path / "pairs.jsonl", rows(24))
    assert take(inputs_of(tmp_path, tiny_model, "filters.drop_too_long=true")).facts.statistics.rows == 24


@pytest.mark.parametrize(
    ("change", "overrides", "error", "expected"),
    [
        ({}, (), UserError, r"pairs\.jsonl, line 8: expected at most 256 tokens"),
        ({"chosen": "Moss, " * 200}, ("filters.drop_too_long=true",), TooManyDroppedError, "no row was kept"),
    ],
)
def test_pairs_that_do_not_fit_stop_the_run_with_nothing_finished(
    change: dict[str, Any],
    overrides: tuple[str, ...],
    error: type[UserError],
    expected: str,
    ray_cluster: object,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    write(tmp_path / "pairs.jsonl", [{**row, **change} for row in rows()])
    inputs = inputs_of(tmp_path, tiny_model, *overrides)
    with pytest.raises(error, match=expected):
        take(inputs)
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_file_that_is_edited_after_the_check_is_refused(
    ray_cluster: object, tiny_model: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "pairs.jsonl", rows())
    inputs = inputs_of(tmp_path, tiny_model, "filters.drop_too_long=true")
    file.write_text(file.read_text().replace("3 ferns", "4 ferns", 1))
    with pytest.raises(UserError, match=r"pairs\.jsonl: expected the 20 rows that were checked"):
        take(inputs)
