"""Which other conditionings a held-out response is compared with.

python -m pytest tests/unit/evaluation/held_out/test_conditionings.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.config.recipe import load_config
from mipo_ray.errors import UserError
from mipo_ray.evaluation.held_out import stage
from mipo_ray.evaluation.held_out.conditionings import WITHOUT_CONTEXT, other_conditionings, refuse_equal_prompts
from mipo_ray.prompts.reading import SourceRow
from mipo_ray.prompts.rows import normalize_row
from tests.helpers.tiny_model import make_tokenizer

PROMPTS = PromptsConfig(path="held_out.jsonl")


def prompt_row(
    prompt_id: str, prompt: str, context: str = "", group: str = "", prompts: PromptsConfig = PROMPTS
) -> dict[str, Any]:
    values = {"prompt_id": prompt_id, "prompt": prompt, "context": context, "group": group}
    return dict(normalize_row(SourceRow("held_out.jsonl, line 1", prompt_id, values), prompts))


def contents(conditionings: dict[str, list[dict[str, str]]]) -> list[str]:
    """Of each conditioning, the user's message."""
    assert all([message["role"] for message in messages] == ["user"] for messages in conditionings.values())
    return [messages[-1]["content"] for messages in conditionings.values()]


def plain_rows(count: int) -> list[dict[str, Any]]:
    return [prompt_row(f"p{index}", f"question {index}") for index in range(count)]


def context_rows(count: int) -> list[dict[str, Any]]:
    return [prompt_row(f"p{index}", f"question {index}", f"I am user {index}.") for index in range(count)]


def test_with_one_candidate_less_than_prompts_it_is_the_full_matrix() -> None:
    drawn = other_conditionings(plain_rows(5), PROMPTS, 4, seed=0)
    for index, others in enumerate(drawn):
        assert sorted(contents(others)) == [f"question {other}" for other in range(5) if other != index]


def test_a_row_with_context_gets_its_own_question_under_other_contexts() -> None:
    drawn = other_conditionings(context_rows(4), PROMPTS, 3, seed=0)
    for index, others in enumerate(drawn):
        expected = [f"I am user {other}.\n\nquestion {index}" for other in range(4) if other != index]
        assert sorted(contents(others)) == expected


def test_other_contexts_go_where_the_recipe_puts_the_own_one() -> None:
    prompts = PromptsConfig(path="held_out.jsonl", context_role="system", system="Be brief.")
    rows = [prompt_row(f"p{index}", f"question {index}", f"I am user {index}.", prompts=prompts) for index in range(2)]
    drawn = other_conditionings(rows, prompts, 1, seed=0)
    for index, others in enumerate(drawn):
        system = {"role": "system", "content": f"Be brief.\n\nI am user {1 - index}."}
        assert list(others.values()) == [[system, {"role": "user", "content": f"question {index}"}]]


def test_each_stands_under_the_id_of_the_row_that_lends_it() -> None:
    for index, others in enumerate(other_conditionings(context_rows(4), PROMPTS, 3, seed=0)):
        assert {name: messages[-1]["content"] for name, messages in others.items()} == {
            f"p{other}": f"I am user {other}.\n\nquestion {index}" for other in range(4) if other != index
        }


def test_rows_without_context_lend_none_to_rows_with_one() -> None:
    rows = [*context_rows(3), prompt_row("plain", "question without")]
    drawn = other_conditionings(rows, PROMPTS, 2, seed=0)
    assert sorted(contents(drawn[0])) == ["I am user 1.\n\nquestion 0", "I am user 2.\n\nquestion 0"]
    # The other way round, a whole prompt is a candidate.
    assert set(contents(drawn[3])) < {f"I am user {index}.\n\nquestion {index}" for index in range(3)}


def test_one_user_with_several_questions_is_one_candidate() -> None:
    rows = [
        prompt_row("a1", "one", "I am Ada."),
        prompt_row("a2", "two", "I am  Ada. "),
        prompt_row("b1", "one", "I am Ben."),
        prompt_row("c1", "one", "I am Cem."),
    ]
    drawn = other_conditionings(rows, PROMPTS, 2, seed=0)
    for question, others in zip(["one", "two"], drawn[:2], strict=True):
        assert sorted(contents(others)) == [f"I am Ben.\n\n{question}", f"I am Cem.\n\n{question}"]
    assert len({" ".join(text.split()) for text in contents(drawn[2])}) == 2


def test_equal_texts_are_one_prompt() -> None:
    rows = [prompt_row("p0", "same  text"), prompt_row("p1", "same text"), prompt_row("p2", "b"), prompt_row("p3", "c")]
    drawn = other_conditionings(rows, PROMPTS, 2, seed=0)
    assert sorted(contents(drawn[0])) == sorted(contents(drawn[1])) == ["b", "c"]


def test_too_few_candidates_name_the_prompt() -> None:
    rows = [*context_rows(3), prompt_row("lonely", "question", "I am user 0.")]
    with pytest.raises(UserError) as caught:
        other_conditionings(rows, PROMPTS, 3, seed=0)
    message = str(caught.value)
    assert message.startswith("held_out.jsonl, prompt 'p0': evaluate.other_prompts asks for 3 contexts of other users")
    assert "found 2" in message
    with pytest.raises(UserError, match=r"prompt 'p0': evaluate\.other_prompts asks for 4 other prompts, found 3"):
        other_conditionings(plain_rows(4), PROMPTS, 4, seed=0)


def test_rows_of_one_group_are_no_candidates() -> None:
    rows = [prompt_row(f"p{index}", f"question {index}", group="abc"[index // 2]) for index in range(6)]
    drawn = other_conditionings(rows, PROMPTS, 4, seed=0)
    for index, others in enumerate(drawn):
        assert sorted(contents(others)) == [f"question {other}" for other in range(6) if other // 2 != index // 2]
    with pytest.raises(UserError, match="found 4"):
        other_conditionings(rows, PROMPTS, 5, seed=0)


def test_the_draw_depends_on_seed_and_prompt_and_not_on_the_order_of_rows() -> None:
    rows = plain_rows(20)
    drawn = other_conditionings(rows, PROMPTS, 5, seed=3)
    assert drawn == other_conditionings(rows, PROMPTS, 5, seed=3)
    assert drawn == other_conditionings(rows[::-1], PROMPTS, 5, seed=3)[::-1]
    assert drawn != other_conditionings(rows, PROMPTS, 5, seed=4)
    # Every row draws for itself.
    assert len({json.dumps(sorted(contents(others))) for others in drawn}) > 10


ROWS = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.sampled_from(["", "I am A", "I am B", "I  am A"]), st.sampled_from("  xy")),
    min_size=2,
    max_size=12,
)


@settings(deadline=None, max_examples=100)
@given(parts=ROWS, count=st.integers(1, 4), seed=st.integers(0, 5))
def test_no_row_is_compared_with_itself_or_its_group(parts: list[tuple[str, str, str]], count: int, seed: int) -> None:
    rows = [
        prompt_row(f"p{index}", prompt, context, group.strip()) for index, (prompt, context, group) in enumerate(parts)
    ]
    try:
        drawn = other_conditionings(rows, PROMPTS, count, seed=seed)
    except UserError:
        return
    for row, others in zip(rows, drawn, strict=True):
        texts = [" ".join(text.split()) for text in contents(others)]
        assert len(set(texts)) == len(texts) == count
        assert " ".join(row["messages"][-1]["content"].split()) not in texts
        foreign = [other for other in rows if not row["group"] or other["group"] != row["group"]]
        if row["context"]:
            question = row["question_messages"][-1]["content"]
            allowed = {f"{other['context']} {question}" for other in foreign if other["context"]}
        else:
            allowed = {other["messages"][-1]["content"] for other in foreign}
        assert set(texts) <= {" ".join(text.split()) for text in allowed}


@pytest.mark.parametrize(
    ("others", "named"),
    [({"p1": [1, 2]}, "what prompt 'p1' makes of it"), ({"p1": [3], WITHOUT_CONTEXT: [1, 2]}, "without the context")],
)
def test_a_conditioning_that_is_the_own_prompt_to_the_model_is_refused(others: Any, named: str) -> None:
    refuse_equal_prompts("p0", [1, 2], {"p1": [1], "p2": [1, 2, 3], WITHOUT_CONTEXT: []})
    with pytest.raises(UserError, match=rf"held-out prompt 'p0': it has the same token ids as .*{named}"):
        refuse_equal_prompts("p0", [1, 2], others)


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (
            "{{ messages[-1].content.split('\n')[-1] }}",
            r"what prompt 'p\d' makes of it",
        ),  # no context reaches the model
        ("{{ messages[-1].content | replace('I am user ', '') }}", None),
    ],
)
def test_held_out_prompts_are_compared_as_the_model_reads_them(
    tmp_path: Path, template: str, named: str | None
) -> None:
    make_tokenizer(template).save_pretrained(tmp_path)
    config = load_config(None, ["evaluate.other_prompts=2"])
    conditioned = [{**row, "dropped": "", "mismatched_messages": [row["question_messages"]]} for row in context_rows(4)]
    block = pa.Table.from_pylist(conditioned)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "load_tokenizer", lambda *_: AutoTokenizer.from_pretrained(tmp_path))
        if named is None:
            assert stage._add_conditionings(block, config=config, initial="m").num_rows == 4
        else:
            with pytest.raises(UserError, match=named):
                stage._add_conditionings(block, config=config, initial="m")
