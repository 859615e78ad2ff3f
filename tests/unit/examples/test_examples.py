"""The bundled example prompts: generated files match their program, and the splits never meet."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest

from mipo_ray.errors import UserError
from mipo_ray.examples import CROSSINGS, EXAMPLES_DIRECTORY, Crossing, bundled_path, cross
from mipo_ray.examples.__main__ import render


def read(name: str) -> list[dict[str, str]]:
    return [
        json.loads(line) for line in (EXAMPLES_DIRECTORY / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@pytest.mark.parametrize("crossing", CROSSINGS, ids=lambda crossing: crossing.name)
def test_committed_file_is_what_the_program_writes(crossing: Crossing) -> None:
    committed = (EXAMPLES_DIRECTORY / f"{crossing.name}.jsonl").read_text(encoding="utf-8")
    assert committed == render(crossing), "run: python -m mipo_ray.examples"


@pytest.mark.parametrize(
    ("name", "users", "questions"),
    [
        ("personalization", {8: 40}, {5: 64}),
        ("personalization_dev", {4: 12}, {3: 16}),
        ("personalization_heldout", {3: 20}, {3: 4, 2: 24}),
    ],
)
def test_rows_are_spread_evenly(name: str, users: dict[int, int], questions: dict[int, int]) -> None:
    rows = read(name)
    assert Counter(Counter(row["group"] for row in rows).values()) == users
    assert Counter(Counter(row["prompt"] for row in rows).values()) == questions
    assert len({row["prompt_id"] for row in rows}) == len(rows)
    assert len({(row["group"], row["prompt"]) for row in rows}) == len(rows)


@pytest.mark.parametrize("crossing", CROSSINGS, ids=lambda crossing: crossing.name)
def test_every_first_n_rows_are_balanced(crossing: Crossing) -> None:
    rows = read(crossing.name)
    for field in ("group", "prompt"):
        values = [row[field] for row in rows]
        assert all(first != second for first, second in itertools.pairwise(values))
        counts = dict.fromkeys(values, 0)
        for value in values:
            counts[value] += 1
            assert max(counts.values()) - min(counts.values()) <= 1


def test_training_never_sees_a_dev_or_test_user_or_question() -> None:
    train, dev, held_out = (read(crossing.name) for crossing in CROSSINGS)
    for field in ("group", "context", "prompt"):
        train_values, dev_values, test_values = ({row[field] for row in rows} for rows in (train, dev, held_out))
        assert not train_values & dev_values
        assert not train_values & test_values
        assert not dev_values & test_values


def test_held_out_instructions_are_not_among_the_training_ones() -> None:
    training = {row["prompt"].lower() for row in read("instructions")}
    held_out = {row["prompt"].lower() for row in read("instructions_heldout")}
    assert len(training) >= 200
    assert len(held_out) >= 64
    assert not training & held_out


def test_preferences_are_pairs_of_prompts_that_no_other_file_has() -> None:
    rows = read("preferences")
    prompts = {row["prompt"].lower() for row in rows}
    assert len(prompts) == len(rows) >= 20
    assert all(row.keys() == {"prompt", "chosen", "rejected"} and row["chosen"] != row["rejected"] for row in rows)
    assert not prompts & {row["prompt"].lower() for row in [*read("instructions"), *read("instructions_heldout")]}


def test_more_rows_than_pairs_are_refused() -> None:
    users = [{"user_id": f"u-{i}", "split": "dev", "context": "c"} for i in range(2)]
    questions = [{"question_id": f"q-{i}", "split": "dev", "question": "q"} for i in range(4)]
    with pytest.raises(ValueError, match="only 4 pairs are distinct"):
        cross(users, questions, Crossing("small", "dev", 5))


def test_bundled_path_finds_prompt_files_and_lists_them_for_another_name() -> None:
    assert bundled_path("personalization").is_file()
    with pytest.raises(UserError, match="instructions, instructions_heldout, personalization") as error:
        bundled_path("users")
    assert "bundled:users" in str(error.value)
