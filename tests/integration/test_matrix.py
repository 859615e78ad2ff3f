"""The held-out matrix from prompt rows to its manifest, scored by the real actor class, against transformers alone.

No Ray: the pipeline around these steps is in test_loop.py.

python -m pytest tests/integration/test_matrix.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM

from mipo_ray.config.prompts import ChatSettings, PromptsConfig
from mipo_ray.evaluation.held_out.matrix import matrix_conditionings, matrix_of, render_matrix
from mipo_ray.evaluation.held_out.rows import read_scores
from mipo_ray.evaluation.held_out.scorer import Scorer, ScorerSettings
from mipo_ray.evaluation.held_out.stage import _one_row_per_response, _pairs_only
from mipo_ray.generation.rendering import load_tokenizer, render_prompts
from mipo_ray.prompts.reading import SourceRow
from mipo_ray.prompts.rows import normalize_row
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import open_run
from tests.helpers.tiny_model import make_tiny_model

PROMPTS = PromptsConfig(path="held_out.jsonl")
USERS = ["I am a baker.", "I sail the northern sea.", "I mend clocks and eat no nuts."]
ANSWERS = ["Bread.", "Fish, on deck, with friends.", "A clock made of rye."]


class DeafEvents:
    """Stands in for the actor that records metrics."""

    def emit(self, event: dict[str, Any]) -> None:
        pass

    def tell(self, event: dict[str, Any]) -> None:
        pass


def token_logprobs(model: Any, prompt: list[int], response: list[int]) -> list[float]:
    """log p(token | prompt, what was said before), nats, of each token, by one forward pass without padding."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return [logits[len(prompt) + index - 1, token].item() for index, token in enumerate(response)]


def logprob(model: Any, prompt: list[int], response: list[int]) -> float:
    """log p(response | prompt), nats."""
    return sum(token_logprobs(model, prompt, response))


def test_the_matrix_is_what_transformers_says(tiny_model: Path, tmp_path: Path) -> None:
    policy = make_tiny_model(tmp_path / "policy", seed=1)
    tokenizer = load_tokenizer(str(tiny_model))
    rows = [
        normalize_row(
            SourceRow("held_out.jsonl", str(i), {"prompt_id": f"p{i}", "prompt": f"Dish {i}?", "context": user}),
            PROMPTS,
        )
        for i, user in enumerate(USERS)
    ]
    parts = render_matrix(matrix_conditionings(rows, PROMPTS, 8), tokenizer, ChatSettings({}))
    own = render_prompts(tokenizer, [row["messages"] for row in rows], ChatSettings({}))
    answers = [tokenizer(text)["input_ids"] for text in ANSWERS]
    block = pa.Table.from_pylist(
        [
            {
                "prompt_id": row["prompt_id"],
                "context": row["context"],
                "source": "",
                "prompt_token_ids": own[i],
                "other_token_ids": [own[i - 1]],
                "without_context_token_ids": own[i - 2],
                "responses": [{"text": ANSWERS[i], "token_ids": answers[i], "finish_reason": "stop"}] * 2,
            }
            for i, row in enumerate(rows)
        ]
    )
    models = {"initial": str(tiny_model), "policy": str(policy)}
    settings = ScorerSettings(
        models, dtype="float32", batch_size=4, on_gpu=False, trust_remote_code=False, by_token=("initial",)
    )
    asked = _one_row_per_response(block, samples=1, models=list(models), matrix=parts)
    assert asked["kind"].to_pylist() == ["answer", "matrix_prompts", "matrix_contexts", "rejected"] * 3
    assert _pairs_only(asked)["kind"].to_pylist() == ["pair_chosen", "pair_rejected"] * 3

    run = open_run(str(tmp_path / "run"))
    scores = tmp_path / "run" / "rounds" / "000" / "evaluate" / "scores"
    scores.mkdir(parents=True)
    threads = torch.get_num_threads()
    pyarrow.parquet.write_table(Scorer(settings, DeafEvents())(asked), scores / "part.parquet")  # type: ignore[arg-type]
    torch.set_num_threads(threads)
    matrix = matrix_of(run, Round(0), parts)

    initial = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for i, answer in enumerate(read_scores(run, Round(0), with_tokens=True)["answer"].values()):
        # Scored under its own prompt, under that of the row before, and under what stands here for no context.
        prompts = {"own": own[i], "other:0": own[i - 1], "without_context": own[i - 2]}
        assert {name: answer.tokens[name].tolist() for name in prompts} == {
            name: pytest.approx(token_logprobs(initial, prompt, answers[i]), abs=1e-3)
            for name, prompt in prompts.items()
        }

    assert list(matrix) == ["prompts", "contexts"]
    assert matrix["contexts"].labels == USERS
    for judge, path in models.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        in_prompts, in_contexts = (getattr(matrix[part], judge) for part in ("prompts", "contexts"))
        for i, row in enumerate(rows):
            under_prompts = [logprob(model, prompt, answers[i]) for prompt in own]
            assert in_prompts[i] == pytest.approx(under_prompts, abs=1e-3)
            question = row["question_messages"][-1]["content"]
            for j, user in enumerate(USERS):
                asked_by = row["messages"][-1]["content"].replace(USERS[i], user)
                assert question in asked_by
                (prompt,) = render_prompts(
                    tokenizer, [[*row["messages"][:-1], {"role": "user", "content": asked_by}]], ChatSettings({})
                )
                assert in_contexts[i][j] == pytest.approx(logprob(model, prompt, answers[i]), abs=1e-3)
