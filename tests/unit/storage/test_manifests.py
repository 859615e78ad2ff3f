"""Manifests and the files of results as records: what runs wrote is read and written again to the last byte, and what
is no such file is refused by file and field.

written/ holds files of runs that this project's tests made before there were records, with other paths of data.

python -m pytest tests/unit/storage/test_manifests.py
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.comparison.records import Outcome
from mipo_ray.config.recipe import load_config
from mipo_ray.errors import UserError
from mipo_ray.storage.entries import Entry, Evaluated, Evaluation, Results
from mipo_ray.storage.manifests import (
    EvaluateFacts,
    GenerateFacts,
    GuardFacts,
    JudgeFacts,
    TaskFacts,
    TrainFacts,
    kind_of,
    read_manifest,
)
from mipo_ray.storage.records import RecordError, read_record, to_json, to_text
from mipo_ray.storage.results import read_evaluation, read_results
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory, StorageError
from mipo_ray.storage.verdicts import good_ones, last_good, verdicts
from tests.helpers.guard_figures import broken_bound
from tests.helpers.stages import commit

WRITTEN = Path(__file__).parent / "written"
NAMES = sorted(path.stem for path in WRITTEN.glob("*.json"))
OTHERS: dict[str, Any] = {"results": Results, "evaluation": Evaluation, "comparison": Outcome}
MANIFESTS = [name for name in NAMES if name not in OTHERS]


def text_of(name: str) -> str:
    return (WRITTEN / f"{name}.json").read_text()


def values_of(name: str) -> Any:
    return json.loads(text_of(name))


def read(name: str, text: str) -> Any:
    if name in OTHERS:
        return read_record(OTHERS[name], text, f"{name}.json")
    return read_manifest(kind_of(values_of(name)["stage"]), text, f"{name}.json")


def test_files_of_every_kind_are_there() -> None:
    assert {kind_of(values_of(name)["stage"]) for name in MANIFESTS} == {
        GenerateFacts,
        TrainFacts,
        EvaluateFacts,
        TaskFacts,
        JudgeFacts,
    }
    assert set(OTHERS) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_run_wrote_is_written_again_to_the_last_byte(name: str) -> None:
    record = read(name, text_of(name))
    again = to_text(record) if name in OTHERS else json.dumps(record.to_json(), indent=2)
    assert again == text_of(name).rstrip("\n")


@pytest.mark.parametrize("name", NAMES)
def test_a_record_that_was_written_is_read_again(name: str) -> None:
    record = read(name, text_of(name))
    assert read(name, json.dumps(record.to_json() if name in MANIFESTS else to_json(record))) == record


def test_every_kind_of_manifest_is_found_out_where_it_changed() -> None:
    for name in MANIFESTS:
        text = read(name, text_of(name)).to_text()
        assert read(name, text) == read(name, text_of(name))  # which has no checksum, being of an earlier version
        assert read(name, json.dumps(json.loads(text), sort_keys=True)) == read(name, text)  # that is no change
        with pytest.raises(RecordError, match=rf"^{name}\.json: expected what was written, with the che"):
            read(name, text.replace('"seed": ', '"seed": 1', 1))


OLDER = {
    "generate": ["gpus", "rows_per_block", "statistics.by_strategy", "statistics.histograms", "statistics.pmi_mean"],
    "train": ["gpus", "reference"],
    "evaluate": ["gpus", "matrix", "generated_tokens"],
    "tasks_likelihood": ["definition.extraction", "definition.metric", "definition.items_hash"],
    "judge_base_pointwise": ["reference_column", "endpoint"],
}


@pytest.mark.parametrize("name", OLDER)
def test_files_of_an_earlier_version_lack_some_fields_and_may_have_others(name: str) -> None:
    values = values_of(name)
    for field in OLDER[name]:
        *places, last = field.split(".")
        inner = values
        for place in places:
            inner = inner[place]
        del inner[last]
    values["pairs_unused"] = 3
    facts = read(name, json.dumps(values)).facts
    for field in OLDER[name]:
        found = facts
        for place in field.split("."):
            found = getattr(found, place)
        assert found in (None, {}), field


def changed(name: str, field: str, value: Any) -> str:
    values = values_of(name)
    *places, last = field.split(".")
    inner = values
    for place in places:
        inner = inner[place]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("generate", "statistics", ..., "generate.json: statistics: expected a value, found none"),
        ("generate", "statistics.kept", "9", 'generate.json: statistics.kept: expected a valid integer, found "9"'),
        ("generate", "statistics.rows", True, "generate.json: statistics.rows: expected a valid integer, found true"),
        ("generate", "pairs", "a.parquet", 'generate.json: pairs: expected a valid array, found "a.parquet"'),
        ("generate", "files", ["a"], 'generate.json: files: expected an object, found ["a"]'),
        ("train", "seconds", None, "train.json: seconds: expected a valid number, found null"),
        ("train", "summary.first_loss", "low", 'train.json: summary.first_loss: expected a valid number, found "low"'),
        ("train", "round", "0", 'train.json: round: expected a valid integer, found "0"'),
        ("train", "files", {"a": 1.5}, "train.json: files.a: expected a valid integer, found 1.5"),
        ("evaluate", "results", [], "evaluate.json: results: expected an object, found []"),
        ("evaluate", "results.self_bleu", 1, "evaluate.json: results.self_bleu: expected an object, found 1"),
        ("evaluate", "results.self_bleu.unit", ..., "evaluate.json: results.self_bleu.unit: expected a value, found"),
        ("tasks_likelihood", "definition", None, "tasks_likelihood.json: definition: expected an object, found null"),
        ("tasks_likelihood", "evaluation.metrics.accuracy.p_value", [], "metrics.accuracy.p_value: expected a valid"),
        ("judge_base_pointwise", "name", 3, "judge_base_pointwise.json: name: expected a valid string, found 3"),
        ("results", "base.self_bleu.n", 1.5, "results.json: base.self_bleu.n: expected a valid integer, found 1.5"),
        ("results", "0", "x", 'results.json: 0: expected an object, found "x"'),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected_and_found(
    name: str, field: str, value: Any, message: str
) -> None:
    with pytest.raises(RecordError) as caught:
        read(name, changed(name, field, value))
    assert message in str(caught.value)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"text"',
        "not JSON",
        "[" * 100_000,
        '{"stage":' + "[" * 100_000,
        '{"stage": "\\ud800"}',
    ],
)
@pytest.mark.parametrize("name", ["train", "results"])
def test_what_is_no_record_is_refused_in_one_short_line(name: str, text: str) -> None:
    with pytest.raises(RecordError, match=rf"^{name}\.json: ") as caught:
        read(name, text)
    assert "expected" in str(caught.value)
    assert "found" in str(caught.value)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def places(values: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside JSON."""
    inside = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inside:
        yield (*before, key)
        yield from places(value, (*before, key))


PLACES = [(name, place) for name in NAMES for place in places(values_of(name))]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(deadline=None, max_examples=400)
@given(place=st.sampled_from(PLACES), value=ANYTHING)
def test_whatever_stands_in_a_place_is_a_record_or_refused_by_name(
    place: tuple[str, tuple[Any, ...]], value: Any
) -> None:
    name, (*outer, last) = place
    values = copy.deepcopy(values_of(name))
    inner = values
    for key in outer:
        inner = inner[key]
    inner[last] = value
    text = json.dumps(values)
    try:
        record = read(name, text)
    except RecordError:
        with pytest.raises(RecordError, match=rf"^{name}\.json: "):
            read(name, text)
    else:
        assert json.loads(json.dumps(record.to_json() if name in MANIFESTS else to_json(record)))


def test_a_run_directory_names_the_file_and_what_to_do(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    stage = "rounds/000/train"
    run.write_text(f"{stage}/manifest.json", changed("train", "summary.steps", ...))
    again = f"Remove {tmp_path}/{stage} to run the stage again."
    for act in (lambda: run.read_manifest(stage, TrainFacts), lambda: run.is_finished(stage)):
        with pytest.raises(StorageError) as caught:
            act()
        named = f"{tmp_path}/{stage}/manifest.json: summary.steps: expected a value, found none"
        assert str(caught.value) == f"{named}. {again}"
    # The manifest of another kind of stage, and bytes that are no text.
    run.write_text(f"{stage}/manifest.json", text_of("generate"))
    with pytest.raises(StorageError, match=r"manifest\.json: summary: expected a value, found none"):
        run.is_finished(stage)
    (tmp_path / stage / "manifest.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(StorageError, match=r"manifest\.json: expected text \(UTF-8\), found: .*Remove"):
        run.is_finished(stage)
    for name, act in (("results.json", read_results), ("evaluation.json", read_evaluation)):
        run.write_text(name, '{"base": {"accuracy": []}}')
        with pytest.raises(
            StorageError, match=rf"{name}: base\.accuracy: expected an object, found \[\]\. Remove that"
        ):
            act(run)


def test_what_is_none_is_left_out_or_null_as_it_was_ever_written() -> None:
    plain = Entry(1.0, None, None, 3, "share")
    assert to_json(plain) == {"value": 1.0, "low": None, "high": None, "n": 3, "unit": "share"}
    moved = dataclasses.replace(plain, change=0.5)
    assert to_json(moved) == to_json(plain) | {"change": 0.5, "change_low": None, "change_high": None}
    assert list(to_json(Evaluated(kind="judge", metrics={}))) == ["kind", "metrics"]
    task = Evaluated(kind="likelihood", data="a.json", metrics={})
    assert to_json(task) == {"kind": "likelihood", "data": "a.json", "limit": None, "sampling": None, "metrics": {}}


def test_a_verdict_of_the_guard_is_read_as_it_was_written(tmp_path: Path) -> None:
    run, config = RunDirectory(str(tmp_path)), load_config()
    assert last_good(run, Round(1)) == Round(1)  # nobody compared it
    written = commit(run, "rounds/001/guard", config, broken=[broken_bound()])
    assert run.read_manifest("rounds/001/guard", GuardFacts) == written
    assert verdicts(run, [BASE, Round(0), Round(1)]) == {Round(1): written.facts}
    assert [last_good(run, Round(number)) for number in (-1, 0, 1, 2)] == [BASE, Round(0), Round(0), Round(2)]
    assert good_ones(run, {"base": 1, "0": 2, "1": 3, "2": 4}) == {"base": 1, "0": 2, "2": 4}
    values = json.loads(str(run.read_text("rounds/001/guard/manifest.json")))
    del values["broken"][0]["bound"]
    run.write_text("rounds/001/guard/manifest.json", json.dumps(values))
    with pytest.raises(
        StorageError, match=r"rounds/001/guard/manifest\.json: broken\.0\.bound: expected a value, found no"
    ):
        last_good(run, Round(1))


def test_the_kind_of_a_stage_follows_from_where_it_lies() -> None:
    stages = ["base/evaluate", "rounds/012/tasks/train", "base/judge/pairwise", "rounds/000/generate"]
    assert [kind_of(stage) for stage in stages] == [EvaluateFacts, TaskFacts, JudgeFacts, GenerateFacts]
    with pytest.raises(KeyError):
        kind_of("rounds/000/other")
