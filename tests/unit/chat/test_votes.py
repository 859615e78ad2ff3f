"""Votes: kept, counted, and not lost with a line that a kill cut off.

python -m pytest tests/unit/chat/test_votes.py
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.chat.votes import VOTES, Vote, keep_vote, new_order_seed, read_votes, shuffled, tally
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory, StorageError, open_run

VOTE = Vote(
    time="2026-01-02T03:04:05Z",
    question="Was wächst im März?\u2028Sag es.",
    context="Ich bin Gärtner.",
    shown=("1", "base"),
    order_seed=7,
    choice="1",
    answers=("Bärlauch.", "Nichts."),
    seed=3,
    sampling={"temperature": 0.7, "top_p": 1.0, "top_k": 0, "max_tokens": 48, "min_tokens": 0},
)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return open_run(str(tmp_path / "run"))


def test_a_vote_is_read_back_as_it_was_given(run: RunDirectory) -> None:
    others = [VOTE, replace(VOTE, choice="base"), replace(VOTE, choice=None)]
    for vote in others:
        keep_vote(run, vote)
    assert read_votes(run) == others
    lines = Path(run.path(VOTES)).read_text().split("\n")
    assert [json.loads(line)["choice"] for line in lines[:-1]] == ["1", "base", None]
    assert lines[-1] == ""


def test_nobody_else_reads_them_and_no_link_is_followed(run: RunDirectory, tmp_path: Path) -> None:
    keep_vote(run, VOTE)
    file = Path(run.path(VOTES))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.unlink()
    (tmp_path / "elsewhere").write_text("")
    os.symlink(tmp_path / "elsewhere", file)
    with pytest.raises(StorageError, match=r"votes\.jsonl: the vote cannot be written"):
        keep_vote(run, VOTE)
    assert (tmp_path / "elsewhere").read_text() == ""


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("left", [1, 20, 200])
def test_a_line_that_a_kill_cut_off_costs_no_other_vote(run: RunDirectory, left: int, remote: bool) -> None:
    if remote:
        run = open_run(f"memory://votes-{left}/run")
    keep_vote(run, VOTE)
    whole = str(run.read_text(VOTES))
    with fsspec.open(run.url + "/" + VOTES, "w", encoding="utf-8") as file:
        file.write(whole + whole[:left])
    assert read_votes(run) == [VOTE]
    keep_vote(run, replace(VOTE, choice="base"))
    assert [vote.choice for vote in read_votes(run)] == ["1", "base"]


def test_a_line_that_is_no_vote_is_named(run: RunDirectory) -> None:
    keep_vote(run, VOTE)
    with open(run.path(VOTES), "a") as file:
        file.write('{"choice": 1}\n')
    with pytest.raises(StorageError, match=r"votes\.jsonl, line 2: .*Mend or remove that line"):
        read_votes(run)


def test_votes_are_counted_by_policy(run: RunDirectory) -> None:
    assert tally(read_votes(run)).to_json() == {"votes": 0, "no_difference": 0, "policies": []}
    for choice, shown in [("1", ("1", "base")), ("base", ("base", "1")), (None, ("10", "2")), ("2", ("2", "base"))]:
        keep_vote(run, replace(VOTE, choice=choice, shown=shown))
    assert tally(read_votes(run)).to_json() == {
        "votes": 4,
        "no_difference": 1,
        "policies": [
            {"round": "base", "chosen": 1, "shown": 3},
            {"round": "1", "chosen": 1, "shown": 2},
            {"round": "2", "chosen": 1, "shown": 2},
            {"round": "10", "chosen": 0, "shown": 1},
        ],
    }


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_an_order_is_that_of_its_seed(seed: int, rounds: int) -> None:
    asked = [BASE, *map(Round, range(rounds))]
    assert shuffled(asked, seed) == shuffled(asked, seed)
    assert sorted(shuffled(asked, seed)) == asked


def test_orders_are_as_likely_as_one_another() -> None:
    first = sum(shuffled([BASE, Round(0)], seed)[0].is_base for seed in range(4000))
    assert abs(first - 2000) < 160  # 5 standard deviations
    assert len({new_order_seed() for _ in range(50)}) > 45
