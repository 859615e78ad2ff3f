"""What the held-out matrix is made of: which rows, under which conditionings, and how its rows are asked to be scored.

python -m pytest tests/unit/evaluation/held_out/test_matrix.py
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from mipo_ray.config.prompts import ChatSettings, PromptsConfig
from mipo_ray.evaluation.held_out.matrix import MatrixRows, matrix_conditionings, render_matrix
from mipo_ray.evaluation.held_out.stage import RESPONSE_SCHEMA, _one_row_per_response
from mipo_ray.prompts.reading import SourceRow
from mipo_ray.prompts.rows import PromptRow, normalize_row

PROMPTS = PromptsConfig(path="held_out.jsonl", system="Be short.")


def row(prompt_id: str, prompt: str, context: str = "") -> PromptRow:
    values = {"prompt_id": prompt_id, "prompt": prompt, "context": context}
    return normalize_row(SourceRow("held_out.jsonl, line 1", prompt_id, values), PROMPTS)


ROWS = [
    row("a", "What to cook?", "I am a baker."),
    row("b", "Where to go?", "I am  a baker."),  # the user of row a
    row("c", "Where to go?", "I am a baker."),  # the same prompt as row b
    row("d", "What to cook?", "I am a sailor."),
    row("e", "What to read?"),
    row("f", "What to wear?", "I am a miner."),
]


def test_rows_are_the_first_that_differ() -> None:
    parts = matrix_conditionings(ROWS, PROMPTS, 4)
    assert parts["prompts"].prompt_ids == ["a", "b", "d", "e"]
    assert parts["contexts"].prompt_ids == ["a", "d", "f"]
    assert parts["contexts"].labels == ["I am a baker.", "I am a sailor.", "I am a miner."]
    assert "What to read?" in parts["prompts"].labels


def test_cells_are_the_answers_own_question_with_each_context_and_each_whole_prompt() -> None:
    parts = matrix_conditionings(ROWS, PROMPTS, 3)
    contexts = parts["contexts"].messages
    assert [len(of_answer) for of_answer in contexts] == [3, 3, 3]
    for i, (question, own) in enumerate(
        [("What to cook?", "baker"), ("What to cook?", "sailor"), ("What to wear?", "miner")]
    ):
        for j, job in enumerate(["baker", "sailor", "miner"]):
            said = contexts[i][j][-1]["content"]
            assert question in said
            assert job in said
            assert (i == j) == (job == own)
    by_id = {each["prompt_id"]: each["messages"] for each in ROWS}
    assert parts["prompts"].messages == [[by_id[name] for name in "abd"]] * 3
    # The diagonal is what the answers were sampled under.
    assert [contexts[i][i] for i in range(3)] == [by_id[name] for name in "adf"]


@pytest.mark.parametrize("size", [0, 1])
def test_no_matrix_of_less_than_two(size: int) -> None:
    assert matrix_conditionings(ROWS, PROMPTS, size) == {}


def test_rows_without_contexts_have_prompts_only() -> None:
    assert set(matrix_conditionings([row("a", "x"), row("b", "y")], PROMPTS, 8)) == {"prompts"}
    assert matrix_conditionings([row("a", "x"), row("b", " x")], PROMPTS, 8) == {}


class CountingTokenizer:
    """Renders a conversation as the number of its characters."""

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> list[int]:
        assert options["add_generation_prompt"] is True
        return [sum(len(message["content"]) for message in messages)]


def test_rendered_parts_have_token_ids_in_place_of_messages() -> None:
    rendered = render_matrix(matrix_conditionings(ROWS, PROMPTS, 2), CountingTokenizer(), ChatSettings({}))
    assert set(rendered) == {"prompts", "contexts"}
    assert (rendered["contexts"].prompt_ids, len(rendered["contexts"].labels)) == (["a", "d"], 2)
    first, second = rendered["contexts"].conditionings[0]
    assert second[0] - first[0] == len("sailor") - len("baker")


def test_the_first_answer_is_scored_once_more_for_each_part_of_the_matrix() -> None:
    block = pa.Table.from_pylist(
        [
            {
                "prompt_id": name,
                "context": "",
                "source": "s",
                "prompt_token_ids": [number],
                "other_token_ids": [[7]],
                "without_context_token_ids": [],
                "responses": [
                    {"text": f"{name}{sample}", "token_ids": [sample], "finish_reason": "stop"} for sample in range(3)
                ],
            }
            for number, name in enumerate("ab")
        ]
    )
    matrix = {
        "prompts": MatrixRows(["b", "x"], ["B", "X"], [[[1], [2]], [[3], [4]]]),
        "contexts": MatrixRows(["b", "x"], ["B", "X"], [[[5], [6]], [[7], [8]]]),
    }
    table = _one_row_per_response(block, samples=2, models=["initial"], matrix=matrix)
    assert table.schema == RESPONSE_SCHEMA
    rows = table.to_pylist()
    assert [(each["kind"], each["response"]) for each in rows] == [
        *[("answer", "a0"), ("answer", "a1"), ("rejected", "a2")],
        *[("answer", "b0"), ("matrix_prompts", "b0"), ("matrix_contexts", "b0"), ("answer", "b1"), ("rejected", "b2")],
    ]
    assert [each["conditionings"] for each in rows[3:6]] == [[[1], [7]], [[1], [2]], [[5], [6]]]
