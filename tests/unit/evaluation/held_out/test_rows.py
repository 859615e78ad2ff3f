"""Scores are looked up by the id of what a response was scored under; tables of earlier versions, without ids, too.

python -m pytest tests/unit/evaluation/held_out/test_rows.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mipo_ray.evaluation.held_out.gains import Labels
from mipo_ray.evaluation.held_out.matrix import MatrixRows, matrix_of
from mipo_ray.evaluation.held_out.metrics import item_values, measure
from mipo_ray.evaluation.held_out.rows import held_out_clusters, held_out_labels, measured_rows
from mipo_ray.evaluation.held_out.scorer import TOKEN_LOGPROBS
from mipo_ray.evaluation.held_out.stage import RESPONSE_SCHEMA, _one_row_per_response, _pairs_only
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory, open_run

USERS = {"b": "I am Ben.", "a": "", "c": "I am Cem."}
OTHERS = 2
MATRIX = {
    "prompts": MatrixRows(["b", "a"], ["B", "A"], [[[50], [51]], [[52], [53]]]),
    "contexts": MatrixRows(["c", "b"], ["C", "B"], [[[60], [61]], [[62], [63]]]),
}


def sampled(*, base: bool) -> pa.Table:
    """What the engines answered to three prompts: two answers each and, for the base, the rejected response."""
    rows = []
    for index, (name, context) in enumerate(USERS.items()):
        answers = range(3 if base else 2)
        rows.append(
            {
                "prompt_id": name,
                "context": context,
                "source": f"source {name}",
                "prompt_token_ids": [10 * index + 100],
                "other_prompt_ids": ["x", "y"],
                "other_token_ids": [[10 * index + 101 + other] for other in range(OTHERS)],
                "without_context_token_ids": [10 * index + 109] if context else [],
                "responses": [
                    {"text": f"{name}{i}", "token_ids": [i + 1] * (i + 1), "finish_reason": ("stop", "length")[i % 2]}
                    for i in answers
                ],
            }
        )
    return pa.Table.from_pylist(rows)


def logprob(judge: str, conditioning: list[int], response: list[int]) -> float:
    """Another number for each judge, conditioning and response."""
    return -(conditioning[0] + len(response) / 8 + (0.5 if judge == "policy" else 0))


def scored(asked: pa.Table, judges: list[str]) -> pa.Table:
    """The table as the scoring actor hands it on."""
    rows = asked.to_pylist()
    for judge in judges:
        values = [
            [logprob(judge, each, row["response_token_ids"]) for each in row["conditionings"]]
            if judge in row["models"]
            else []
            for row in rows
        ]
        asked = asked.append_column(f"logprobs_{judge}", pa.array(values, pa.list_(pa.float64())))
        if judge == "initial":
            tokens = [
                [[value / len(row["response_token_ids"])] * len(row["response_token_ids"]) for value in of_row]
                for of_row, row in zip(values, rows, strict=True)
            ]
            asked = asked.append_column("token_logprobs_initial", pa.array(tokens, TOKEN_LOGPROBS))
    copied = [[True] + [False] * (row["tokens"] - 1) if row["kind"] == "answer" else None for row in rows]
    asked = asked.set_column(asked.column_names.index("copied_tokens"), "copied_tokens", pa.array(copied))
    return asked.drop_columns(["conditionings", "response_token_ids", "models"])


def without_ids(table: pa.Table) -> pa.Table:
    """As the versions before the ids wrote it."""
    later = ["conditioning_ids", "copied_tokens", "token_logprobs_initial"]
    return table.drop_columns([name for name in later if name in table.column_names])


def write(run: RunDirectory, round: Round, table: pa.Table) -> None:
    folder = Path(run.path(run.stage(round, "evaluate"), "scores"))
    folder.mkdir(parents=True)
    pq.write_table(table, folder / "part.parquet")


@pytest.fixture(params=["new", "old base", "both old"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunDirectory:
    run = open_run(str(tmp_path / "run"))
    base = _one_row_per_response(sampled(base=True), samples=2, models=["initial"], matrix=MATRIX)
    answers = _one_row_per_response(sampled(base=False), samples=2, models=["initial", "policy"], matrix=MATRIX)
    said = base if request.param == "new" else without_ids(base)
    of_round = scored(pa.concat_tables([answers, _pairs_only(said)]), ["initial", "policy"])
    of_base = scored(base, ["initial"])
    write(run, BASE, of_base if request.param == "new" else without_ids(of_base))
    write(run, Round(0), without_ids(of_round) if request.param == "both old" else of_round)
    return run


def test_measured_texts_and_lengths_are_those_of_answers(tmp_path: Path) -> None:
    rows = sampled(base=True).to_pylist()
    thoughtful = {"text": "<think>maybe</think> yes", "token_ids": [1] * 5, "answer_tokens": 2}
    cut = {"text": "<think>maybe", "token_ids": [1] * 5, "answer_tokens": 0, "finish_reason": "length"}
    for row in rows:
        row["responses"] = [{**row["responses"][0], **changed} for changed in (thoughtful, cut, thoughtful)]
    table = pa.Table.from_pylist(rows)
    run = open_run(str(tmp_path / "run"))
    base = _one_row_per_response(table, samples=2, models=["initial"], matrix={})
    write(run, BASE, scored(base, ["initial"]))
    found = measured_rows(run, BASE)
    assert found.responses == ["yes", ""] * 3
    assert found.token_counts.tolist() == [5] * 6  # log-probs are of the whole response
    values = item_values(found, 0.1, None)
    assert values["response_tokens"][1].tolist() == [2, 0] * 3
    assert values["pmi_initial_per_token"][1] == pytest.approx(values["pmi_initial"][1] / 5)


def test_measured_rows_are_the_scores_by_conditioning(run: RunDirectory) -> None:
    rows = measured_rows(run, Round(0))
    assert rows.prompt_ids == ["a", "a", "b", "b", "c", "c"]
    assert rows.responses == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert rows.sources == [f"source {name}" for name in "aabbcc"]
    assert rows.token_counts.tolist() == [1, 2] * 3
    assert rows.truncated.tolist() == [False, True] * 3
    starts = np.repeat([110.0, 100.0, 120.0], 2)  # a, b, c
    shift = np.tile([1 / 8, 2 / 8], 3)
    without = np.where(np.repeat([True, False, False], 2), np.nan, -(starts + 9 + shift))
    for judge, extra in (("initial", 0.0), ("policy", 0.5)):
        np.testing.assert_array_equal(getattr(rows, f"{judge}_own"), -(starts + shift + extra))
        others = -np.stack([starts + 1, starts + 2], axis=1) - (shift + extra)[:, None]
        np.testing.assert_array_equal(getattr(rows, f"{judge}_others"), others)
        np.testing.assert_array_equal(getattr(rows, f"{judge}_none"), without - extra)
    assert rows.pair_prompt_ids == ["a", "b", "c"]
    own = np.asarray([110.0, 100.0, 120.0])
    np.testing.assert_array_equal(rows.pair_initial_chosen, -(own + 1 / 8))
    np.testing.assert_array_equal(rows.pair_initial_rejected, -(own + 3 / 8))
    np.testing.assert_array_equal(rows.pair_policy_chosen, -(own + 1 / 8 + 0.5))
    np.testing.assert_array_equal(rows.pair_policy_rejected, -(own + 3 / 8 + 0.5))


def test_tokens_are_read_with_what_they_were_scored_under(run: RunDirectory, request: pytest.FixtureRequest) -> None:
    old = request.node.callspec.params["run"]
    rows, base = measured_rows(run, Round(0)), measured_rows(run, BASE)
    assert (rows.tokens is None, base.tokens is None) == (old == "both old", old != "new")
    kept = rows.tokens or []
    for row, scores in enumerate(kept):
        count = rows.token_counts[row]
        assert scores.own == pytest.approx([rows.initial_own[row] / count] * count)
        assert scores.others.sum(axis=1) == pytest.approx(rows.initial_others[row])
        assert scores.copied.tolist() == [True] + [False] * (count - 1)
        assert rows.initial_none is not None
        if np.isnan(rows.initial_none[row]):
            assert scores.none is None
        else:
            assert scores.none is not None
            assert scores.none.sum() == pytest.approx(rows.initial_none[row])
    # What an earlier version measured of the base goes on, with what can be told.
    entries = measure(rows, base, beta=0.1, samples=50, seed=0)
    found = {name: entry.change is not None for name, entry in entries.items() if name.startswith("pmi_")}
    tokens = {} if old == "both old" else {"pmi_copy_free": old == "new"}
    matched = {"pmi_matched": True} if old == "new" else {}
    sums = ("initial", "initial_per_token", "adjusted", "policy", "policy_per_token")
    assert found == {f"pmi_{name}": True for name in sums} | tokens | matched


def write_prompts(run: RunDirectory, rows: list[dict[str, str]]) -> None:
    folder = Path(run.path(run.stage(BASE, "evaluate"), "prompts"))
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "part.parquet")


def test_users_and_questions_are_those_of_the_prompts_that_the_base_wrote(run: RunDirectory) -> None:
    asked = [("a", "", "q1"), ("b", "ben", "q1"), ("c", "ben", "q2")]
    write_prompts(run, [{"prompt_id": one, "user": user, "question": what} for one, user, what in asked])
    rows = measured_rows(run, Round(0))
    assert rows.users == ["", "", "ben", "ben", "ben", "ben"]
    assert rows.questions == ["q1", "q1", "q1", "q1", "q2", "q2"]
    entry = measure(rows, measured_rows(run, BASE), beta=0.1, samples=50, seed=0)["pmi_initial"]
    assert (entry.n, entry.users, entry.questions) == (3, 2, 2)
    # Of the two rows with a context.
    context = measure(rows, None, beta=0.1, samples=50, seed=0)["context_pmi_initial"]
    assert (context.n, context.users, context.questions) == (2, 1, 2)


def test_users_and_questions_have_names_for_people(run: RunDirectory) -> None:
    assert held_out_labels(run) is None
    rows = [{"prompt_id": one, "user_label": f"user {one}", "question_label": "What now?"} for one in "ab"]
    write_prompts(run, rows)
    assert held_out_labels(run) == Labels({"a": "user a", "b": "user b"}, {"a": "What now?", "b": "What now?"})


def test_rows_that_name_nobody_have_questions_alone(run: RunDirectory) -> None:
    write_prompts(run, [{"prompt_id": one, "user": "", "question": "q1"} for one in "abc"])
    rows = measured_rows(run, BASE)
    assert (rows.users, rows.questions) == (None, ["q1"] * 6)
    assert measure(rows, None, beta=0.1, samples=50, seed=0)["pmi_initial"].users is None


def test_prompts_of_an_earlier_version_name_neither(run: RunDirectory) -> None:
    assert held_out_clusters(run) is None  # nothing was written at all
    write_prompts(run, [{"prompt_id": one, "context": "I am Ben."} for one in "abc"])
    assert held_out_clusters(run) is None
    rows = measured_rows(run, Round(0))
    assert (rows.users, rows.questions, rows.clusters) == (None, None, None)
    assert measure(rows, measured_rows(run, BASE), beta=0.1, samples=50, seed=0)["pmi_initial"].questions is None


def test_the_base_is_its_own_policy(run: RunDirectory) -> None:
    rows = measured_rows(run, BASE)
    assert rows.responses == ["a0", "a1", "b0", "b1", "c0", "c1"]
    np.testing.assert_array_equal(rows.policy_others, rows.initial_others)
    np.testing.assert_array_equal(rows.pair_policy_rejected, rows.pair_initial_rejected)


def test_without_any_context_nothing_is_said_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(USERS, "b", "")
    monkeypatch.setitem(USERS, "c", "")
    base = _one_row_per_response(sampled(base=True), samples=2, models=["initial"], matrix={})
    for number, table in enumerate([scored(base, ["initial"]), without_ids(scored(base, ["initial"]))]):
        plain = open_run(str(tmp_path / f"plain-{number}"))
        write(plain, BASE, table)
        rows = measured_rows(plain, BASE)
        assert rows.initial_none is None
        assert rows.initial_others.shape == (6, OTHERS)


def test_the_matrix_is_looked_up_by_row_and_column(tmp_path: Path) -> None:
    run = open_run(str(tmp_path / "run"))
    asked = _one_row_per_response(sampled(base=False), samples=2, models=["initial", "policy"], matrix=MATRIX)
    # The lists may be in any order: what counts is the id beside each value.
    rows = asked.to_pylist()
    for row in rows:
        row["conditioning_ids"].reverse()
        row["conditionings"].reverse()
    write(run, Round(0), scored(pa.Table.from_pylist(rows, schema=RESPONSE_SCHEMA), ["initial", "policy"]))
    matrix = matrix_of(run, Round(0), MATRIX)
    assert matrix["prompts"].initial == [[-50.125, -51.125], [-52.125, -53.125]]
    assert matrix["contexts"].policy == [[-60.625, -61.625], [-62.625, -63.625]]
    assert (matrix["contexts"].prompt_ids, matrix["contexts"].labels) == (["c", "b"], ["C", "B"])


def test_rows_name_what_they_are_scored_under() -> None:
    asked = _one_row_per_response(sampled(base=True), samples=2, models=["initial"], matrix=MATRIX).to_pylist()
    first = {row["kind"]: row["conditioning_ids"] for row in asked if row["prompt_id"] == "b"}
    assert first == {
        "answer": ["own", "other:x", "other:y", "without_context"],
        "matrix_prompts": ["prompts:b", "prompts:a"],
        "matrix_contexts": ["contexts:c", "contexts:b"],
        "rejected": ["own"],
    }
    plain = next(row for row in asked if row["prompt_id"] == "a")
    assert plain["conditioning_ids"] == ["own", "other:x", "other:y"]
    assert [len(row["conditioning_ids"]) for row in asked] == [len(row["conditionings"]) for row in asked]


def test_held_out_prompts_of_an_earlier_version_have_numbered_others() -> None:
    block = sampled(base=True).drop_columns(["other_prompt_ids"])
    asked = _one_row_per_response(block, samples=2, models=["initial"], matrix={}).to_pylist()
    assert asked[0]["conditioning_ids"] == ["own", "other:0", "other:1", "without_context"]
    assert asked[0]["conditionings"] == [[100], [101], [102], [109]]


def test_pairs_are_scored_under_their_own_prompt_whoever_wrote_them() -> None:
    base = _one_row_per_response(sampled(base=True), samples=2, models=["initial"], matrix=MATRIX)
    pairs = _pairs_only(base)
    assert _pairs_only(without_ids(base)).equals(pairs)
    assert [(row["kind"], row["conditioning_ids"], row["conditionings"]) for row in pairs.to_pylist()[:2]] == [
        ("pair_chosen", ["own"], [[100]]),
        ("pair_rejected", ["own"], [[100]]),
    ]
