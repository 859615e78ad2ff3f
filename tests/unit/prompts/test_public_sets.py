"""Public personalization data sets: small files in the published formats become prompt rows.

python -m pytest tests/unit/prompts/test_public_sets.py
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.errors import UserError
from mipo_ray.prompts.check import PromptNeeds, check_prompts
from mipo_ray.prompts.files import find_files
from mipo_ray.prompts.public_sets import row_reader
from mipo_ray.prompts.rows import PromptRow, normalize_row


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(prompts: PromptsConfig) -> list[PromptRow]:
    read_rows = row_reader(prompts)
    return [normalize_row(row, prompts) for file in find_files(prompts.path) for row in read_rows(file)]


def refused(prompts: PromptsConfig) -> str:
    with pytest.raises(UserError) as error:
        rows_of(prompts)
    return str(error.value)


def profile(user_id: str, **values: Any) -> dict[str, Any]:
    """A row of PRISM's survey, less the columns that are not read."""
    sliders = ("values", "creativity", "fluency", "factuality", "diversity", "safety", "personalisation", "helpfulness")
    return {
        "user_id": user_id,
        "self_description": "I keep bees.",
        "system_string": "Be frank.",
        "age": "25-34 years old",
        "gender": "Prefer not to say",
        "education": "Vocational",
        "employment_status": None,
        "marital_status": "Prefer not to say",
        "religion": {"self_described": "none", "categorised": "No affiliation", "simplified": "No Affiliation"},
        "ethnicity": {"self_described": "", "categorised": "", "simplified": "Prefer not to say"},
        "location": {"birth_country": "Chile", "reside_country": "Peru", "same_birth_reside_country": "No"},
        "stated_prefs": {**dict.fromkeys(sliders, 10), "other": None, "other_text": None},
        **values,
    }


def conversation(number: int, user_id: str, opening_prompt: str | None) -> dict[str, Any]:
    answers = [("Ask a beekeeper.", False), ("They look for room.", True)]
    history: list[dict[str, Any]] = [{"turn": 0, "role": "user", "content": opening_prompt}]
    history += [{"turn": 0, "role": "model", "content": text, "if_chosen": chosen} for text, chosen in answers]
    history += [
        {"turn": 1, "role": "user", "content": "And then?"},
        {"turn": 1, "role": "model", "content": "They settle.", "if_chosen": True},
    ]
    return {
        "conversation_id": f"c{number}",
        "user_id": user_id,
        "conversation_type": "unguided",
        "opening_prompt": opening_prompt,
        "conversation_history": history,
    }


def prism(tmp_path: Path, conversations: list[dict[str, Any]], survey: list[dict[str, Any]]) -> PromptsConfig:
    path = write(tmp_path / "conversations.jsonl", conversations)
    return PromptsConfig(path=path, loader="prism", profiles_path=write(tmp_path / "survey.jsonl", survey))


def test_prism_joins_conversations_and_profiles(tmp_path: Path) -> None:
    ratings = {"values": 51, "factuality": 100, "safety": 50, "fluency": 80, "other": 90, "other_text": "short answers"}
    survey = [profile("user0"), profile("user1", stated_prefs=ratings), profile("unused")]
    talks = [conversation(0, "user1", "Why do bees swarm?"), conversation(1, "user0", "EMPTY STRING")]
    prompts = prism(tmp_path, [*talks, conversation(2, "user0", "Hello")], survey)
    first, second = rows_of(prompts)
    assert first["context"] == (
        "Self-description: I keep bees.\n"
        "How an assistant should behave: Be frank.\n"
        "Important in an answer, most important first: facts, short answers, good writing, reflecting my values and "
        "culture\n"
        "Age: 25-34 years old\n"
        "Education: Vocational\n"
        "Religion: No Affiliation\n"
        "Country: Peru"
    )
    assert first["question_messages"] == [{"role": "user", "content": "Why do bees swarm?"}]
    assert first["messages"][0]["content"] == f"{first['context']}\n\nWhy do bees swarm?"
    assert (first["prompt_id"], first["group"]) == ("c0", "user1")
    assert first["extra"] == "{}"  # the published conversation stays behind
    assert first["reference"] == "They look for room."  # the answer to the first question that the user chose
    # Nothing rated above the middle: no such line; the conversation without a question is passed over.
    assert "Important" not in second["context"]
    assert (second["prompt_id"], second["group"]) == ("c2", "user0")
    assert check_prompts(prompts, PromptNeeds("every", True, True)).file_rows == (2,)


def test_prism_is_read_from_parquet_too(tmp_path: Path) -> None:
    expected = rows_of(prism(tmp_path, [conversation(0, "user0", "Hello")], [profile("user0")]))
    pq.write_table(pa.Table.from_pylist([conversation(0, "user0", "Hello")]), tmp_path / "c.parquet")
    pq.write_table(pa.Table.from_pylist([profile("user0")]), tmp_path / "s.parquet")
    profiles = str(tmp_path / "s.parquet")
    prompts = PromptsConfig(path=str(tmp_path / "c.parquet"), loader="prism", profiles_path=profiles)
    assert rows_of(prompts) == expected
    assert expected[0]["reference"] == "They look for room."


@pytest.mark.parametrize("history", [None, "text", [], [None], [{"turn": 0, "role": "model", "content": "x"}]])
def test_prism_without_a_chosen_answer_has_no_reference(tmp_path: Path, history: Any) -> None:
    talk = {**conversation(0, "user0", "Hello"), "conversation_history": history}
    assert rows_of(prism(tmp_path, [talk], [profile("user0")]))[0]["reference"] == ""


def test_prism_names_what_is_missing(tmp_path: Path) -> None:
    talk = conversation(0, "user0", "Hello")
    lonely = prism(tmp_path, [talk, conversation(1, "user7", "Hi")], [profile("user0")])
    assert (
        refused(lonely)
        == f"{lonely.path}, line 2, field 'user_id': user 'user7' has no profile in {lonely.profiles_path}"
    )
    twice = prism(tmp_path, [talk], [profile("user0"), profile("user0")])
    assert refused(twice) == f"{twice.profiles_path}, line 2, field 'user_id': user 'user0' has a profile already"
    talk["opening_promt"] = talk.pop("opening_prompt")
    misspelt = prism(tmp_path, [talk], [profile("user0")])
    assert refused(misspelt).startswith(
        f"{misspelt.path}, line 1: no column 'opening_prompt', which loader prism reads; the row has the columns: "
        "conversation_id, user_id, "
    )
    swapped = PromptsConfig(path=misspelt.path, loader="prism", profiles_path=misspelt.path)
    assert f"{misspelt.path}, line 1: no column 'self_description', which loader prism reads" in refused(swapped)
    broken = prism(tmp_path, [talk], [profile("user0", stated_prefs="high")])
    assert "line 1, field 'stated_prefs': expected an object of ratings from 0 to 100, found str" in refused(broken)


def test_profiles_belong_to_prism_alone() -> None:
    with pytest.raises(UserError, match=r"^evaluate\.prompts\.profiles_path: loader prism needs the file"):
        row_reader(PromptsConfig(loader="prism"), "evaluate.prompts")
    with pytest.raises(
        UserError, match=r"^prompts\.profiles_path: only loader prism reads profiles, found loader rows"
    ):
        row_reader(PromptsConfig(profiles_path="survey.jsonl"))
    with pytest.raises(UserError, match=r"^prompts\.profiles_path: no file matches nowhere\.jsonl"):
        row_reader(PromptsConfig(loader="prism", profiles_path="nowhere.jsonl"))


def annotated(**values: str) -> dict[str, str]:
    """A row of Community Alignment, less three of its turns and its flags."""
    return {
        "conversation_id": "17",
        "assigned_lang": "en",
        "annotator_id": "4",
        "first_turn_prompt": "Plan my Sunday.",
        "first_turn_response_a": "Rest.",
        "first_turn_response_b": "Run.",
        "first_turn_preferred_response": "response_b",
        "first_turn_feedback": "I like to move,",
        "second_turn_feedback": "and to be outside.",
        "annotator_age": "18-34",
        "annotator_gender": "female",
        "annotator_education_level": "Some post-secondary",
        "annotator_political": "Prefer not to say",
        "annotator_ethnicity": "",
        "annotator_country": "india",
        **values,
    }


def test_community_alignment_reads_its_published_csv(tmp_path: Path) -> None:
    path = tmp_path / "community_alignment.csv"
    rows = [annotated(), annotated(conversation_id="18", first_turn_prompt=""), annotated(conversation_id="19")]
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    first, last = rows_of(PromptsConfig(path=str(path), loader="community_alignment"))
    # Without the feedback, which is about answers to this question.
    assert first["context"] == "Age: 18-34\nGender: female\nEducation: Some post-secondary\nCountry: india"
    assert first["question_messages"] == [{"role": "user", "content": "Plan my Sunday."}]
    assert (first["prompt_id"], first["group"], last["prompt_id"]) == ("17", "4", "19")
    assert first["reference"] == "Run."


def test_community_alignment_names_the_preferred_answer_by_its_letter(tmp_path: Path) -> None:
    rows = [
        annotated(conversation_id="0", first_turn_response_b="Run.<|end_of_text|>"),
        annotated(conversation_id="1", first_turn_preferred_response="A"),
        annotated(conversation_id="2", first_turn_preferred_response="response_d"),
        annotated(conversation_id="3", first_turn_preferred_response=""),
    ]
    prompts = PromptsConfig(path=write(tmp_path / "a.jsonl", rows), loader="community_alignment")
    assert [row["reference"] for row in rows_of(prompts)] == ["Run.", "Rest.", "", ""]


def test_community_alignment_without_feedback_and_without_a_column(tmp_path: Path) -> None:
    row = annotated(annotator_age="55+")
    for turn in ("first", "second"):
        del row[f"{turn}_turn_feedback"]
    prompts = PromptsConfig(path=write(tmp_path / "a.jsonl", [row]), loader="community_alignment")
    assert rows_of(prompts)[0]["context"] == "Age: 55+\nGender: female\nEducation: Some post-secondary\nCountry: india"
    del row["annotator_country"]
    write(tmp_path / "a.jsonl", [annotated(), row])
    assert f"{prompts.path}, line 2: no column 'annotator_country', which loader community_alignment" in refused(
        prompts
    )


def test_multi_bench_reads_multifaceted_bench(tmp_path: Path) -> None:
    published = {"source": "koala", "system": "You are terse.", "prompt": "Why is the sky blue?", "rubric": []}
    published["reference_answer"] = "Air scatters blue."
    config = {"path": write(tmp_path / "a.jsonl", [published]), "loader": "multi_bench", "context_role": "system"}
    (row,) = rows_of(PromptsConfig.model_validate(config))
    assert row["messages"] == [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "Why is the sky blue?"},
    ]
    assert (row["prompt_id"], row["group"], row["reference"]) == ("a.jsonl:1", "", "Air scatters blue.")


def test_multi_bench_style_tables_may_name_users(tmp_path: Path) -> None:
    table = {"user_id": 3, "persona": "I keep bees.", "question": "What now?", "key": "k1"}
    prompts = PromptsConfig(
        path=write(tmp_path / "a.jsonl", [table]),
        loader="multi_bench",
        id_column="key",
        question_template="{{ prompt }} ({{ persona }})",
    )
    (row,) = rows_of(prompts)
    assert (row["prompt_id"], row["group"], row["context"]) == ("k1", "3", "I keep bees.")
    assert row["question_messages"] == [{"role": "user", "content": "What now? (I keep bees.)"}]
    write(tmp_path / "a.jsonl", [{"user_id": 3, "question": "What now?"}])
    assert refused(prompts).startswith(
        f"{prompts.path}, line 1: no column 'system', which loader multi_bench reads as the context (or persona, "
    )
