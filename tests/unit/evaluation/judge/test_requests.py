"""What a judge stage that was stopped keeps when it goes on, there or elsewhere; no engine.

python -m pytest tests/unit/evaluation/judge/test_requests.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mipo_ray.evaluation.judge.requests import Noted, note_requests, stored_requests
from mipo_ray.storage.manifests import JudgeDefinition
from mipo_ray.storage.records import to_json
from mipo_ray.storage.run_directory import RunDirectory

STAGE = "rounds/000/judge/pairwise"
FACTS = JudgeDefinition(protocol="pairwise", model="org/judge")


def asked(own_engines: bool, definition: JudgeDefinition = FACTS) -> Noted:
    return Noted(definition, judgements=12, own_engines=own_engines)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A stage that was stopped while an endpoint judged."""
    run = RunDirectory(str(tmp_path))
    note_requests(run, STAGE, asked(False))
    run.write_text(f"{STAGE}/requests/part.parquet", "as an endpoint is asked")
    run.write_text(f"{STAGE}/checkpoint/ids", "of what was judged")
    run.write_text(f"{STAGE}/part.parquet", "judged")
    return run


def test_the_same_judge_in_the_same_place_is_asked_what_is_stored(run: RunDirectory) -> None:
    before = run.list_files(STAGE)
    assert stored_requests(run, STAGE, asked(False)) == 12
    assert run.list_files(STAGE) == before


def test_a_judge_that_moves_into_own_engines_keeps_its_judgements(run: RunDirectory) -> None:
    assert stored_requests(run, STAGE, asked(True)) is None
    # The requests hold no token ids for engines: they alone are written anew.
    assert set(run.list_files(STAGE)) == {"requests.json", "checkpoint/ids", "part.parquet"}
    # Killed before they are: nothing is taken for written, wherever it goes on.
    for own_engines in (False, True):
        run.write_text(f"{STAGE}/requests/half.parquet", "")
        assert stored_requests(run, STAGE, asked(own_engines)) is None
        assert set(run.list_files(STAGE)) == {"requests.json", "checkpoint/ids", "part.parquet"}
    note_requests(run, STAGE, asked(True))
    assert stored_requests(run, STAGE, asked(True)) == 12


def test_another_definition_keeps_nothing(run: RunDirectory) -> None:
    assert stored_requests(run, STAGE, asked(False, replace(FACTS, model="other"))) is None
    assert run.list_files(STAGE) == {}


def test_requests_of_an_earlier_release_are_written_anew(run: RunDirectory) -> None:
    run.write_text(f"{STAGE}/requests.json", json.dumps({"definition": to_json(FACTS), "judgements": 12}))
    assert stored_requests(run, STAGE, asked(True)) is None
    assert "part.parquet" in run.list_files(STAGE)
