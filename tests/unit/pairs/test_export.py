"""Pairs in the forms of other trainers: their columns, their counts, the card, and what is refused.

python -m pytest tests/unit/pairs/test_export.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml

from mipo_ray.pairs import export as export_module
from mipo_ray.pairs.__main__ import main
from mipo_ray.pairs.export import write_pairs
from mipo_ray.pairs.formats import FORMATS, TextPair
from tests.helpers.paired_runs import PROMPT, make_pair, make_run

# One row of each form, in the shape that its documentation shows (`Format.source` has the address).
DOCUMENTED: dict[str, Any] = {
    "trl": {
        "prompt": [{"role": "user", "content": "?"}],
        "chosen": [{"role": "assistant", "content": "!"}],
        "rejected": [{"role": "assistant", "content": "."}],
        "chat_template_kwargs": {"date_string": "26 Jul 2024"},
    },
    "openrlhf": {
        "prompt": [{"role": "user", "content": "?"}],
        "chosen": [{"role": "assistant", "content": "!"}],
        "rejected": [{"role": "assistant", "content": "."}],
    },
    "axolotl": {
        "messages": [{"role": "user", "content": "?"}],
        "chosen": {"role": "assistant", "content": "!"},
        "rejected": {"role": "assistant", "content": "."},
    },
    "llama-factory": {
        "conversations": [{"from": "human", "value": "?"}],
        "chosen": {"from": "gpt", "value": "!"},
        "rejected": {"from": "gpt", "value": "."},
    },
    "ms-swift": {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
        "rejected_response": ".",
    },
}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def export(run: Any, name: str, output: Path, *options: str) -> list[dict[str, Any]]:
    """The rows of round 0, as the command writes them."""
    assert main(["export", run.url, "--format", name, "--output", str(output), *options]) == 0
    return read_lines(output / f"round_0.{FORMATS[name].suffix}")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_row_is_what_the_tool_documents(name: str) -> None:
    """Keys, lists and roles: a tool that finds a text where it looks for a list trains on nothing, or on garbage."""
    pair = TextPair("a", [{"role": "user", "content": "?"}], "!", ".", {"date_string": "26 Jul 2024"})
    row = FORMATS[name].row
    assert row is not None
    assert row(pair) == DOCUMENTED[name]
    assert set(FORMATS[name].columns) == set(DOCUMENTED[name])


@pytest.mark.parametrize("name", DOCUMENTED)
def test_texts_and_system_messages_arrive_whole(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", [[make_pair(1), make_pair(2, dropped="truncated"), make_pair(3)]])
    rows = export(run, name, tmp_path / "out")
    assert len(rows) == 2  # the dropped one is not among them
    text = json.dumps(rows[1], ensure_ascii=False)
    for part in ("Be brief.", "What grows in “März”?", "Answer 3.", "No."):
        assert part in text


def test_llama_factory_is_told_what_the_files_hold(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [[make_pair(1)], [make_pair(2)]])
    export(run, "llama-factory", tmp_path / "out")
    info = json.loads((tmp_path / "out/dataset_info.json").read_text())
    assert list(info) == ["round_0", "round_1"]
    for entry in info.values():
        columns = set(entry["columns"].values())
        assert entry["formatting"] == "sharegpt"
        assert entry["ranking"] is True
        assert set(read_lines(tmp_path / "out" / entry["file_name"])[0]) == columns


def test_llama_factory_would_leave_out_what_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It drops a prompt of two user turns with a line in its log; here it is an error that names the pair."""
    run = make_run(tmp_path / "run", [[make_pair(7, messages=[*PROMPT, {"role": "user", "content": "And?"}])]])
    assert main(["export", run.url, "--format", "llama-factory", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "pair 0000000000000007" in error
    assert "found system, user, user" in error


def test_several_rejected_responses_become_rows_of_their_own(tmp_path: Path) -> None:
    pairs = [make_pair(1, ["No.", "Nothing."]), make_pair(2, ["Never.", "Not."])]
    run = make_run(tmp_path / "run", [pairs], "generation.negatives_per_prompt=2", "generation.pairing=all")
    rows = export(run, "axolotl", tmp_path / "out")
    assert [row["rejected"]["content"] for row in rows] == ["No.", "Nothing.", "Never.", "Not."]
    assert [row["chosen"]["content"] for row in rows] == ["Answer 1."] * 2 + ["Answer 2."] * 2


@pytest.mark.parametrize("rejected", [["No."], ["No.", "Nothing."]], ids=["one rejected", "two"])
def test_parquet_keeps_what_was_sampled(tmp_path: Path, rejected: list[str]) -> None:
    """Token ids, log-probs and the schema of the run's own files, of the pairs that were trained on."""
    pairs = [make_pair(1, rejected), make_pair(2, rejected, dropped="identical")]
    run = make_run(tmp_path / "run", [pairs])
    assert main(["export", run.url, "--format", "parquet", "--output", str(tmp_path / "out")]) == 0
    found = pyarrow.parquet.read_table(tmp_path / "out/round_0.parquet")
    own = pyarrow.parquet.read_table(tmp_path / "run/rounds/000/generate/000000.parquet")
    assert found.equals(own.slice(0, 1).drop_columns(["dropped"]))
    assert found.schema.metadata[b"mipo_ray.pair_schema"] == (b"1" if len(rejected) == 1 else b"2")


def test_a_round_without_kept_pairs_is_an_empty_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [[make_pair(1, dropped="empty")]])
    assert export(run, "trl", tmp_path / "out") == []
    assert main(["export", run.url, "--format", "parquet", "--output", str(tmp_path / "table")]) == 0
    assert pyarrow.parquet.read_table(tmp_path / "table/round_0.parquet").num_rows == 0


def test_rounds_can_be_chosen(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [[make_pair(1)], [make_pair(2)], [make_pair(3)]])
    written = write_pairs(run, "trl", tmp_path / "out", [0, 2])
    assert [each.file for each in written.rounds] == ["round_0.jsonl", "round_2.jsonl"]
    assert not (tmp_path / "out/round_1.jsonl").exists()


def test_pairs_pass_through_memory_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty files of 100 kB: what Arrow holds at any moment is a small part of them."""
    pairs = [make_pair(number, chosen=f"{number:06d}" * 8_000) for number in range(120)]
    run = make_run(tmp_path / "run", [pairs])
    before, most = pa.total_allocated_bytes(), 0
    row_of = FORMATS["trl"].row

    def watched(pair: TextPair) -> dict[str, Any]:
        nonlocal most
        most = max(most, pa.total_allocated_bytes() - before)
        assert row_of is not None
        return row_of(pair)

    monkeypatch.setattr(export_module, "FORMATS", {"trl": FORMATS["trl"].__class__("TRL", watched, {}, "", "")})
    del pairs
    write_pairs(run, "trl", tmp_path / "out")
    whole = (tmp_path / "out/round_0.jsonl").stat().st_size
    assert whole > 5_000_000
    assert 0 < most < whole / 5


def test_the_card_tells_counts_settings_and_use(tmp_path: Path) -> None:
    """Its head is what the Hub reads; its table adds up; it names what other tools do differently."""
    pairs = [make_pair(1), make_pair(2, chosen_finish_reason="length"), make_pair(3, dropped="truncated")]
    run = make_run(tmp_path / "run", [pairs], "train.beta=0.3")
    export(run, "axolotl", tmp_path / "out")
    _, head, body = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["configs"] == [{"config_name": "round_0", "data_files": "round_0.jsonl"}]
    assert "| `round_0.jsonl` | the model itself | 2 | 2 | 1 | 1 truncated |" in body
    assert "type: chat_template.default" in body
    assert "data_files: [round_0.jsonl]" in body
    assert "train.beta: 0.3" in body
    assert "The format `parquet` holds the ids" in body


def test_the_card_names_no_place_of_this_machine(tmp_path: Path) -> None:
    """A card is made to be published: a path tells who made it, and what else lies there."""
    local = tmp_path / "secret-project"
    local.mkdir()
    places = [f"model.path={local}", f"prompts.path={local}/*.jsonl", f"prompts.system=Read {local}/notes first."]
    run = make_run(local / "run", [[make_pair(1)]], *places)
    export(run, "trl", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "secret-project" not in card
    assert str(tmp_path) not in card
    assert "Model: (files of the run's own)" in card


def test_pairs_that_a_run_was_given_are_not_called_its_own(tmp_path: Path) -> None:
    own = ["pairs.path=hf://datasets/org/name/a.jsonl", "evaluate.enabled=false"]
    run = make_run(tmp_path / "run", [[make_pair(1, ["No.", "Never."], strategy="given")]], *own)
    export(run, "trl", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "# Preference pairs that a run was given, for TRL" in card
    assert "Pairs: hf://datasets/org/name/a.jsonl." in card
    assert "| `round_0.jsonl` | not sampled by the run | 1 | 2 |" in card
    assert "A pair had 2 rejected responses" in card
    for wrong in ("MIPO", "of its own answers", "mismatched", "were sampled from"):
        assert wrong not in card


def test_a_control_says_that_its_labels_were_swapped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [[make_pair(1)]], "train.shuffle_labels=true")
    export(run, "trl", tmp_path / "out")
    assert "it swapped chosen and rejected" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("prepare", "options", "expected"),
    [
        ("nothing", [], "expected a run directory with a config.yaml, found none"),
        ("no pairs", [], "expected a round whose pairs are all generated, found none"),
        ("pairs", ["--round", "4"], "round 4 has no finished pairs; rounds that have: 0"),
        ("files", [], "expected an empty directory, or one that is not there yet; found mine.txt"),
    ],
)
def test_what_cannot_be_exported_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: str, options: list[str], expected: str
) -> None:
    if prepare != "nothing":
        make_run(tmp_path / "run", [] if prepare == "no pairs" else [[make_pair(1)]])
    if prepare == "files":
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine.txt").write_text("keep me")
    command = ["export", str(tmp_path / "run"), "--format", "trl", "--output", str(tmp_path / "out"), *options]
    assert main(command) == 2
    assert expected in capsys.readouterr().err
    if prepare == "files":
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
