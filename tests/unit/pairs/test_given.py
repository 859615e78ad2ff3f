"""Preference data that exists, row by row: each tool's documented columns, the exporter's inverse, and bad rows.

python -m pytest tests/unit/pairs/test_given.py
"""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.config.pairs import PairsConfig
from mipo_ray.errors import UserError
from mipo_ray.pairs.formats import FORMATS, TextPair
from mipo_ray.pairs.given import GIVEN_SCHEMA, PairSummary, check_pairs, given_tables
from mipo_ray.pairs.given_rows import COLUMNS, GivenPair, format_of, read_pair
from mipo_ray.prompts.reading import SourceRow

PROMPT = [{"role": "user", "content": "?"}]
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER, OTHER = {"role": "assistant", "content": "!"}, {"role": "assistant", "content": "."}
PAIR = GivenPair(PROMPT, "!", (".",), {})
WITH_SYSTEM = GivenPair([SYSTEM, *PROMPT], "!", (".",), {})
LATER = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *PROMPT]
HUMAN, GPT = {"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}

# Format, the row as the tool's documentation has it, what it says; and whether `auto` finds the format.
DOCUMENTED: dict[str, tuple[str, dict[str, Any], GivenPair]] = {
    "trl, texts": ("trl", {"prompt": "?", "chosen": "!", "rejected": "."}, PAIR),
    "trl, messages": ("trl", {"prompt": PROMPT, "chosen": [ANSWER], "rejected": [OTHER]}, PAIR),
    "trl, prompt in both": ("trl", {"chosen": [*PROMPT, ANSWER], "rejected": [*PROMPT, OTHER]}, PAIR),
    "trl, prompt in both, and as a text": (
        "trl",
        {"prompt": "?", "chosen": [*PROMPT, ANSWER], "rejected": [*PROMPT, OTHER], "messages": [*PROMPT, ANSWER]},
        PAIR,
    ),
    "trl, template arguments": (
        "trl",
        {"prompt": "?", "chosen": "!", "rejected": ".", "chat_template_kwargs": {"enable_thinking": False, "x": None}},
        GivenPair(PROMPT, "!", (".",), {"enable_thinking": False}),
    ),
    "axolotl, chat_template.default": (
        "axolotl",
        {"messages": [SYSTEM, *PROMPT], "chosen": ANSWER, "rejected": OTHER},
        WITH_SYSTEM,
    ),
    "axolotl, intel": (
        "axolotl",
        {"system": "Be brief.", "question": "?", "chosen": "!", "rejected": "."},
        WITH_SYSTEM,
    ),
    "axolotl, icr": ("axolotl", {"system": "", "input": "?", "chosen": "!", "rejected": "."}, PAIR),
    "axolotl, prompt_pairs": (
        "axolotl",
        {"system": "Be brief.", "prompt": "?", "chosen": "!", "rejected": "."},
        WITH_SYSTEM,
    ),
    "axolotl, ultra": (
        "axolotl",
        {"system": None, "prompt": "?", "chosen": [*PROMPT, ANSWER], "rejected": [*PROMPT, OTHER]},
        PAIR,
    ),
    "axolotl, argilla": (
        "axolotl",
        {"system": "Be brief.", "instruction": "?", "chosen_response": "!", "rejected_response": "."},
        WITH_SYSTEM,
    ),
    "llama-factory, alpaca": (
        "llama-factory",
        {"instruction": "?", "input": "", "chosen": "!", "rejected": "."},
        PAIR,
    ),
    "llama-factory, alpaca with everything": (
        "llama-factory",
        {
            "instruction": "Add.",
            "input": "1 and 2",
            "system": "Be brief.",
            "history": [["a", "b"]],
            "chosen": "!",
            "rejected": ".",
        },
        GivenPair([SYSTEM, *LATER[:2], {"role": "user", "content": "Add.\n1 and 2"}], "!", (".",), {}),
    ),
    "llama-factory, sharegpt": (
        "llama-factory",
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "."}, "system": "Be brief."},
        WITH_SYSTEM,
    ),
    "ms-swift": (
        "ms-swift",
        {"messages": [*LATER, ANSWER], "rejected_response": "."},
        GivenPair(LATER, "!", (".",), {}),
    ),
    "ms-swift, rejected messages": (
        "ms-swift",
        {"messages": [*PROMPT, ANSWER], "rejected_messages": [*PROMPT, OTHER]},
        PAIR,
    ),
    "ms-swift, query and response": (
        "ms-swift",
        {"query": "?", "response": "!", "rejected_response": ".", "history": [["a", "b"]], "system": "Be brief."},
        GivenPair([SYSTEM, *LATER], "!", (".",), {}),
    ),
}  # fmt: skip


def row(values: dict[str, Any]) -> SourceRow:
    return SourceRow("a.jsonl, line 3", "a.jsonl:3", values)


@pytest.mark.parametrize(("form", "values", "expected"), DOCUMENTED.values(), ids=DOCUMENTED)
def test_a_documented_row_is_read_and_its_format_found(form: Any, values: dict[str, Any], expected: GivenPair) -> None:
    assert read_pair(row(values), form) == expected
    assert format_of(row(values)) == form
    # As a table has it: every key in every row, and in every message.
    nulls = {"tools": "[]", "images": [], "label": None, **values}
    assert read_pair(row(nulls), format_of(row(nulls))) == expected


@pytest.mark.parametrize("form", ["trl", "openrlhf", "axolotl"])
def test_axolotl_and_openrlhf_take_conversations_too(form: Any) -> None:
    whole = {"chosen": [*LATER, ANSWER], "rejected": [*LATER, OTHER]}
    assert read_pair(row(whole), form) == GivenPair(LATER, "!", (".",), {})


def test_whole_conversations_with_a_system_text_of_their_own() -> None:
    values = {"system": "Be brief.", "prompt": "?", "chosen": [*PROMPT, ANSWER], "rejected": [*PROMPT, OTHER]}
    assert read_pair(row(values), "axolotl") == WITH_SYSTEM


@pytest.mark.parametrize(
    ("form", "values"),
    [
        ("trl", {"prompt": "?", "chosen": "!", "rejected": [".", ",", ";"]}),
        ("trl", {"prompt": PROMPT, "chosen": [ANSWER], "rejected": [[{**OTHER, "content": text}] for text in ".,;"]}),
        ("trl", {"chosen": [*PROMPT, ANSWER], "rejected": [[*PROMPT, {**OTHER, "content": text}] for text in ".,;"]}),
        ("ms-swift", {"messages": [*PROMPT, ANSWER], "rejected_response": [".", ",", ";"]}),
    ],
)
def test_several_rejected_responses_are_a_list(form: Any, values: dict[str, Any]) -> None:
    assert read_pair(row(values), form) == GivenPair(PROMPT, "!", (".", ",", ";"), {})


TEXT = st.text(max_size=20)
TURNS = st.lists(st.tuples(TEXT, TEXT), max_size=2)


@given(
    name=st.sampled_from(sorted(COLUMNS)),
    system=st.none() | TEXT,
    turns=TURNS,
    question=TEXT.filter(str.strip),
    answers=st.tuples(TEXT, TEXT),
    arguments=st.sampled_from([{}, {"date_string": "26 Jul 2024"}]),
)
def test_what_is_exported_is_read_back(
    name: Any, system: str | None, turns: Any, question: str, answers: tuple[str, str], arguments: dict[str, Any]
) -> None:
    """By its tool's name and, but for OpenRLHF's, whose columns are TRL's, without it."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": question})
    row_of = FORMATS[name].row
    assert row_of is not None
    values = json.loads(json.dumps(row_of(TextPair("id", messages, *answers, arguments))))
    expected = GivenPair(messages, answers[0], (answers[1],), arguments if name == "trl" else {})
    assert read_pair(row(values), name) == expected
    found = format_of(row(values))
    assert found == ("trl" if name == "openrlhf" else name)
    assert read_pair(row(values), found) == expected


def test_every_format_that_is_exported_is_read_but_the_runs_own() -> None:
    assert set(COLUMNS) == set(FORMATS) - {"parquet"}


def refused(values: dict[str, Any], form: Any = "trl") -> str:
    with pytest.raises(UserError) as error:
        read_pair(row(values), form)
    assert str(error.value).startswith("a.jsonl, line 3")
    return str(error.value)


TEXTS = {"prompt": "?", "chosen": "!", "rejected": "."}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, "expected a value in column chosen, as rows of trl have it, found none; the row"),
        ({"rejected": []}, "field 'rejected': expected a response: a text"),
        ({"rejected": 3}, "field 'rejected': expected a response: a text, the assistant's message"),
        ({"rejected": [".", 3]}, "field 'rejected', response 1: expected a response"),
        ({"chosen": ["!", "!!"]}, "field 'chosen': expected one response, found 2"),
        ({"chosen": {"role": "user", "content": "!"}}, "expected the last message to be the assistant's"),
        ({"chosen": {"role": "assistant", "content": None}}, "to be the assistant's, with a text"),
        ({"chosen": [ANSWER, ANSWER]}, "expected one message of the assistant behind the prompt, found several"),
        ({"prompt": 3}, "field 'prompt': expected a text or a list of {role, content} messages, found int 3"),
        ({"prompt": " "}, "field 'prompt': expected a prompt, found an empty string"),
        ({"prompt": [ANSWER]}, "field 'prompt': expected the last message to be the user's"),
        ({"prompt": [{"role": "tool", "content": "?"}]}, "field 'prompt', message 0: expected a role of"),
        ({"prompt": None}, "or the prompt in a column of its own (prompt); found str '!'"),
        ({"prompt": None, "chosen": [*PROMPT, ANSWER]}, "'rejected': expected the conversation of field 'chosen'"),
        ({"prompt": None, "rejected": [*PROMPT, OTHER]}, "'rejected': expected the conversation of field 'chosen'"),
        (
            {"prompt": PROMPT, "chosen": [ANSWER, *PROMPT, ANSWER], "rejected": [ANSWER, *PROMPT, OTHER]},
            "since those before it are in field 'prompt'; found 3",
        ),
        ({"chosen": "\ud800"}, "field 'chosen': expected Unicode text, found a lone surrogate"),
        ({"tools": [{"name": "search"}]}, "field 'tools': expected text alone, found list"),
        ({"images": ["a.png"]}, "field 'images': expected text alone"),
        ({"chat_template_kwargs": "no"}, "'chat_template_kwargs': expected a mapping of variables, found str"),
        ({"chat_template_kwargs": {"tools": 1}}, "field 'chat_template_kwargs': tools: set by the run itself"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_with_what_was_expected(change: dict[str, Any], message: str) -> None:
    assert message in refused({**TEXTS, **change})


def test_other_formats_name_their_columns_too() -> None:
    assert "column conversations or messages or instruction, as rows of llama-factory" in refused(
        TEXTS, "llama-factory"
    )
    turned = {"conversations": [{"from": "observation", "value": "?"}], "chosen": GPT, "rejected": GPT}
    assert "field 'conversations', message 0: expected one from human, gpt, system" in refused(turned, "llama-factory")
    two = {"messages": [SYSTEM, *PROMPT], "system": "Be long.", "chosen": ANSWER, "rejected": OTHER}
    assert "field 'system': expected one system message" in refused(two, "axolotl")
    alone = {"messages": [ANSWER], "rejected_response": "."}
    assert "field 'messages': expected the last message to be the user's" in refused(alone, "ms-swift")
    history = {"instruction": "?", "history": ["a"], "chosen": "!", "rejected": "."}
    assert "field 'history': expected a list of [question, answer]" in refused(history, "llama-factory")


def test_a_row_of_no_tool_is_told_what_is_missing() -> None:
    with pytest.raises(
        UserError, match=r"expected the columns of preference pairs .*, found prompt, completion, label"
    ):
        format_of(row({"prompt": "?", "completion": "!", "label": True}))


# Files


def write(path: Path, rows: list[dict[str, Any]]) -> PairsConfig:
    path.write_text("".join(json.dumps(values) + "\n" for values in rows))
    return PairsConfig(path=str(path))


def read_again(pairs: PairsConfig, summary: PairSummary) -> list[dict[str, Any]]:
    tables = list(given_tables(pairs, summary.format, summary.files))
    assert all(table.schema == GIVEN_SCHEMA for table in tables)
    return [values for table in tables for values in table.to_pylist()]


ROWS = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(5)]


def test_files_of_every_kind_hold_the_same_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as packed:
        packed.writelines(json.dumps(values) + "\n" for values in ROWS)
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as table:
        writer = csv.DictWriter(table, ["prompt", "chosen", "rejected"])
        writer.writeheader()
        writer.writerows(ROWS)
    for name in ("a.json", "a.jsonl.gz", "a.parquet", "a.csv"):
        pairs = PairsConfig(path=str(tmp_path / name))
        summary = check_pairs(pairs)
        assert (summary.rows, summary.format, summary.rejected) == (5, "trl", 1)
        assert (summary.prompt_characters, summary.response_characters) == (10, 5 * (5 + 4))
        found = read_again(pairs, summary)
        assert [(values["chosen"], values["rejected"]) for values in found] == [
            (f"yes {i}", [f"no {i}"]) for i in range(5)
        ]
        assert found[2]["messages"] == [{"role": "user", "content": "q2"}]
        assert len({values["prompt_id"] for values in found}) == 5


def test_files_lie_on_any_filesystem() -> None:
    store = fsspec.filesystem("memory")
    for number, values in enumerate(ROWS):
        store.pipe(f"/given/{number}.jsonl", json.dumps(values).encode())
    pairs = PairsConfig(path="memory://given/*.jsonl")
    assert [values["chosen"] for values in read_again(pairs, check_pairs(pairs))] == [f"yes {i}" for i in range(5)]


def test_a_glob_and_a_limit_choose_the_rows(tmp_path: Path) -> None:
    write(tmp_path / "1.jsonl", ROWS[:2])
    write(tmp_path / "2.jsonl", ROWS[2:])
    pairs = PairsConfig(path=str(tmp_path / "*.jsonl"), limit=3)
    summary = check_pairs(pairs)
    assert (summary.rows, summary.file_rows) == (3, (2, 1))
    assert [values["prompt_id"] for values in read_again(pairs, summary)] == ["1.jsonl:1", "1.jsonl:2", "2.jsonl:1"]


def test_the_bundled_pairs_are_pairs() -> None:
    summary = check_pairs(PairsConfig(path="bundled:preferences"))
    assert summary.rows >= 20


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, {**ROWS[0], "rejected": ["a", "b"]}], "line 6: expected 1 rejected .* row from .*line 1 on"),
        ([*ROWS, {"prompt": "q"}], "line 6: expected a value in column chosen"),
        ([], "expected pairs, found no row"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_by_name(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        check_pairs(write(tmp_path / "a.jsonl", rows))
    assert "a.jsonl" in str(error.value)


def test_paths_are_named_by_their_own_field(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^pairs\.path: no file matches"):
        check_pairs(PairsConfig(path=str(tmp_path / "none.jsonl")))


@pytest.mark.parametrize("edit", [ROWS[:4], [*ROWS, ROWS[0]], [{**ROWS[0], "rejected": "nothing"}, *ROWS[1:]]])
def test_a_file_that_was_edited_since_is_refused(tmp_path: Path, edit: list[dict[str, Any]]) -> None:
    pairs = write(tmp_path / "a.jsonl", ROWS)
    summary = check_pairs(pairs)
    assert len(read_again(pairs, summary)) == 5
    write(tmp_path / "a.jsonl", edit)
    with pytest.raises(UserError, match=r"a\.jsonl: .*edited while the run was under way"):
        read_again(pairs, summary)


def test_a_watch_sees_every_pair_with_its_place(tmp_path: Path) -> None:
    seen = []
    check_pairs(write(tmp_path / "a.jsonl", ROWS), lambda where, pair: seen.append((where[-6:], pair.chosen)))
    assert seen == [(f"line {i + 1}", f"yes {i}") for i in range(5)]
