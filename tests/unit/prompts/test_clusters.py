"""Whose row a prompt is and what it asks, and how many of each there are.

python -m pytest tests/unit/prompts/test_clusters.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mipo_ray.conditioning.needs import check_held_out
from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.prompts.clusters import question_of, user_of
from mipo_ray.prompts.files import find_files
from mipo_ray.prompts.reading import read_rows
from mipo_ray.prompts.rows import PromptRow, normalize_row

ROWS = [
    {"prompt": "What now?", "context": "I am Ada.", "group": "ada"},
    {"prompt": "What  now? ", "context": "I am Ben.", "group": "ben"},
    {"prompt": "And then?", "context": "I am Ada, the baker.", "group": "ada"},
    {"prompt": "And then?", "context": "I am Cem.", "group": ""},
    {"prompt": "What now?", "context": " I  am Cem.", "group": ""},
    {"prompt": "Who?"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompt_rows(path: str, **settings: Any) -> list[PromptRow]:
    prompts = PromptsConfig(path=path, **settings)
    return [normalize_row(row, prompts) for file in find_files(path) for row in read_rows(file)]


@pytest.mark.parametrize("role", ["user", "system"])
def test_a_user_is_a_group_or_else_a_context_and_a_question_is_the_text_without_it(role: str, tmp_path: Path) -> None:
    rows = prompt_rows(write(tmp_path / "a.jsonl", ROWS), context_role=role, system="Be brief.")
    ada, ben, ada_again, cem, cem_again, nobody = map(user_of, rows)
    assert ada == ada_again != ben
    assert cem == cem_again not in ("", ada, ben)
    assert nobody == ""
    asked = [question_of(row) for row in rows]
    assert asked[0] == asked[1] == asked[4]
    assert asked[2] == asked[3]
    assert len(set(asked)) == 3


def test_a_group_and_a_context_of_one_text_are_two_users(tmp_path: Path) -> None:
    rows = [{"prompt": "?", "context": "ada", "group": "x"}, {"prompt": "?", "context": "x"}]
    first, second = map(user_of, prompt_rows(write(tmp_path / "a.jsonl", rows)))
    assert first != second


def held_out(path: str, **evaluate: Any) -> Config:
    sections = {"evaluate": {"prompts": {"path": path}, "other_prompts": 1, **evaluate}}
    return Config.model_validate({**sections, "conditioning": {"strategy": "random_prompt"}})


def test_the_check_counts_users_and_questions(tmp_path: Path) -> None:
    summary = check_held_out(held_out(write(tmp_path / "a.jsonl", ROWS)))
    assert (summary.rows, summary.users, summary.questions) == (6, 4, 3)  # who names nobody is one more
    plain = check_held_out(held_out(write(tmp_path / "b.jsonl", [{"prompt": "One?"}, {"prompt": "Two?"}])))
    assert (plain.users, plain.questions) == (None, 2)


def test_a_primary_measure_of_contexts_needs_rows_with_one(tmp_path: Path) -> None:
    path = write(tmp_path / "b.jsonl", [{"prompt": "One?"}, {"prompt": "Two?"}])
    with pytest.raises(UserError, match=r"evaluate\.primary: context_pmi_initial expects held-out rows with a context"):
        check_held_out(held_out(path, primary="context_pmi_initial"))
    assert check_held_out(held_out(path, primary="infonce_initial")).rows == 2
