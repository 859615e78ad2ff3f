"""A scorer that takes the models of one policy after another.

python -m pytest tests/unit/evaluation/held_out/test_scorer.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from mipo_ray.evaluation.held_out import scorer as scorer_module
from mipo_ray.evaluation.held_out.scorer import Scorer, ScorerSettings
from mipo_ray.evaluation.held_out.stage import RESPONSE_SCHEMA
from tests.helpers.tiny_model import make_tiny_model


class DeafEvents:
    def emit(self, event: dict[str, Any]) -> None: ...

    def tell(self, event: dict[str, Any]) -> None: ...


PROMPT, RESPONSE = [11, 12, 13], [21, 22, 23, 24]


def asked(models: list[str]) -> pa.Table:
    row = {
        "prompt_id": "row",
        "kind": "answer",
        "conditionings": [PROMPT, PROMPT[::-1]],
        "response_token_ids": RESPONSE,
        "models": models,
    }
    return pa.Table.from_pylist([row], schema=RESPONSE_SCHEMA)


def plain_logprobs(model_dir: Path, prompt: list[int], response: list[int]) -> list[float]:
    """Of each token of the response, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return [float(logprobs[len(prompt) - 1 + place, token]) for place, token in enumerate(response)]


def plain_logprob(model_dir: Path) -> float:
    return sum(plain_logprobs(model_dir, PROMPT, RESPONSE))


def test_it_scores_by_what_it_was_told_last_and_loads_each_model_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    initial, first, second = (make_tiny_model(tmp_path / str(seed), seed=seed) for seed in range(3))
    loaded: list[str] = []
    load = Scorer._load

    def counted(self: Scorer, path: str) -> Any:
        loaded.append(path)
        return load(self, path)

    monkeypatch.setattr(Scorer, "_load", counted)
    monkeypatch.setattr(scorer_module.os, "cpu_count", lambda: torch.get_num_threads())

    def settings(**models: Path) -> ScorerSettings:
        paths = {name: str(path) for name, path in models.items()}
        return ScorerSettings(paths, "float32", batch_size=2, on_gpu=False, trust_remote_code=False)

    events: Any = DeafEvents()
    scorer = Scorer(settings(initial=initial), events)
    expected = {"initial": plain_logprob(initial)}
    for policy in (first, second):
        scorer.hold(settings(initial=initial, policy=policy), events)
        expected["policy"] = plain_logprob(policy)
        scored = scorer(asked(["initial", "policy"]))
        for name, logprob in expected.items():
            assert scored[f"logprobs_{name}"].to_pylist()[0][0] == pytest.approx(logprob, abs=1e-4)
    assert loaded == [str(initial), str(first), str(second)]
    assert set(scorer._loaded) == {str(initial), str(second)}  # no memory for what is no longer asked for


def test_single_tokens_are_kept_of_the_models_that_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    initial, policy = (make_tiny_model(tmp_path / str(seed), seed=seed) for seed in range(2))
    monkeypatch.setattr(scorer_module.os, "cpu_count", lambda: torch.get_num_threads())
    models = {"initial": str(initial), "policy": str(policy)}
    settings = ScorerSettings(models, "float32", 3, on_gpu=False, trust_remote_code=False, by_token=("initial",))
    events: Any = DeafEvents()
    conditionings, responses = [PROMPT, PROMPT[::-1], [5]], [RESPONSE, [31], RESPONSE[::-1]]
    rows = [
        {"prompt_id": str(number), "conditionings": conditionings, "response_token_ids": response, "models": judges}
        for number, (response, judges) in enumerate(
            zip([*responses, RESPONSE], [["initial"], ["initial", "policy"], ["initial"], ["policy"]], strict=True)
        )
    ]
    scored = Scorer(settings, events)(pa.Table.from_pylist(rows, schema=RESPONSE_SCHEMA))
    assert "token_logprobs_policy" not in scored.column_names
    *of_tokens, without = scored["token_logprobs_initial"].to_pylist()
    assert without == []  # of another model alone
    for found, sums, response in zip(of_tokens, scored["logprobs_initial"].to_pylist()[:3], responses, strict=True):
        for values, total, prompt in zip(found, sums, conditionings, strict=True):
            assert values == pytest.approx(plain_logprobs(initial, prompt, response), abs=1e-4)
            assert sum(values) == pytest.approx(total, abs=1e-5)
