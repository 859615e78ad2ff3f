"""The model zoo: vLLM, the scorer, the trainer in each layout and the reloaded export give the same ids the same
log-prob, in every family here, or the family is refused by name before anything is sampled.

python -m pytest tests/nightly/test_model_zoo.py

All engines are made in one process, one after another. The comparison of a member is in `tests/helpers/zoo_checks.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.model_zoo import ZOO
from tests.helpers.zoo_checks import check_member, make_and_ask


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    return make_and_ask(list(ZOO), tmp_path_factory.mktemp("zoo"))


@pytest.mark.parametrize("name", ZOO)
def test_everything_that_scores_agrees(name: str, zoo: dict[str, tuple[Path, Any]]) -> None:
    check_member(name, *zoo[name])


def test_the_zoo_is_large() -> None:
    assert len({member.family for member in ZOO.values()}) >= 25
