"""What the base's stage writes of the held-out prompts: whose they are and what they ask.

python -m pytest tests/unit/evaluation/held_out/test_stage.py
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from mipo_ray.conditioning.blocks import condition_block
from mipo_ray.config.schema import Config
from mipo_ray.evaluation.held_out import stage
from mipo_ray.prompts.reading import SourceRow
from mipo_ray.prompts.rows import PROMPT_SCHEMA, normalize_row


def test_held_out_prompts_name_their_user_and_their_question(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, int] = {}

    def rendered(tokenizer: Any, conversations: list[Any], chat: Any) -> list[list[int]]:
        return [[known.setdefault(str(messages), len(known))] for messages in conversations]

    monkeypatch.setattr(stage, "load_tokenizer", lambda *_: None)
    monkeypatch.setattr(stage, "render_prompts", rendered)
    config = Config.model_validate({"evaluate": {"prompts": {"path": "a.jsonl"}, "other_prompts": 1}})
    values = [
        {"prompt": question, "context": f"I am {name}.", "group": name, "prompt_id": f"{name}-{question}"}
        for name in ("Ada", "Ben", "Cem")
        for question in ("What now?", "And then?")
    ]
    rows = [normalize_row(SourceRow("a.jsonl", "a", row), config.evaluate.prompts) for row in values]
    block = condition_block(
        pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA),
        stage.held_out_conditioning(config.conditioning),
        config.evaluate.prompts,
        seed=0,
        round_index=-1,
    )
    written = stage._add_conditionings(block, config=config, initial="a model").to_pydict()
    users, questions = written["user"], written["question"]
    assert [users.index(user) for user in users] == [0, 0, 2, 2, 4, 4]
    assert [questions.index(question) for question in questions] == [0, 1, 0, 1, 0, 1]
    assert written["user_label"] == ["Ada", "Ada", "Ben", "Ben", "Cem", "Cem"]
    assert written["question_label"] == ["What now?", "And then?"] * 3
