"""Three members of the model zoo; the others are in `tests/nightly/test_model_zoo.py`."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.model_zoo import QUICK
from tests.helpers.zoo_checks import check_member, make_and_ask


def test_everything_that_scores_agrees(tmp_path: Path) -> None:
    members = make_and_ask(list(QUICK), tmp_path)
    for name, (export, said) in members.items():
        check_member(name, export, said)
