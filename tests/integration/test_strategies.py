"""Every conditioning strategy in one run of the command, with several samples, several negatives and PMI.

python -m pytest tests/integration/test_strategies.py
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

ROWS = 24
SAMPLES = 2
NEGATIVES = 4
STRATEGIES = (
    "random_prompt",
    "swapped_response",
    "missing_context",
    "random_context",
    "partial_prompt",
    "similar_prompt",
)


@pytest.fixture(scope="module")
def run_dir(ray_address: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished round over a mixture of all strategies, two matched and four mismatched responses of each prompt."""
    directory = tmp_path_factory.mktemp("strategies")
    topics = ["bread", "rivers", "stars", "maps", "tea", "trains", "moss", "chess"]
    with (directory / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for index in range(ROWS):
            topic, hobby = topics[index % 8], topics[(index * 3 + 1) % 8]
            row = {
                "prompt_id": f"row-{index}",
                "subject": f"What should I know about {topic} number {index}?",
                "context": f"I am user {index // 2}. I like {hobby} and I live in house {index // 2}.",
                "group": f"user-{index // 2}",
            }
            file.write(json.dumps(row) + "\n")
    (directory / "recipe.yaml").write_text(
        f"""
run_dir: {directory}/run
rounds: 1
model: {{path: {tiny_model}, max_model_len: 512}}
prompts:
  path: {directory}/prompts.jsonl
  question_template: "{{{{ subject }}}} Answer me."
  context_role: system
  exemplars: [{{question: "What is tea?", answer: "A drink."}}]
conditioning:
  strategy: mixture
  mixture: {{{", ".join(f"{name}: 1" for name in STRATEGIES)}}}
  fallback: random_prompt
  block_size: 12
  similar: {{min_similarity: -1.0, max_similarity: 1.0}}
generation:
  samples_per_prompt: {SAMPLES}
  negatives_per_prompt: {NEGATIVES}
  pairing: all
  sampling: {{max_tokens: 12, temperature: 1.0}}
  pool: {{engine_args: {{block_size: 32}}}} # tokens; with the 128 of CPUs these short prompts share no whole block
filters:
  patterns: [{{name: letter_q, regex: "q", side: chosen}}]
train: {{learning_rate: 1.0e-3, batch_size: 8}}
evaluate: {{enabled: false}}
"""
    )
    command = [sys.executable, "-m", "mipo_ray.run", f"{directory}/recipe.yaml", f"ray.address={ray_address}"]
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout
    return directory / "run"


@pytest.fixture(scope="module")
def manifest(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "rounds/000/generate/manifest.json").read_text())


@pytest.fixture(scope="module")
def pairs(run_dir: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    files = [run_dir / "rounds/000/generate" / name for name in manifest["files"]]
    table = pyarrow.parquet.ParquetDataset(files).read()
    assert table.schema.metadata[b"mipo_ray.pair_schema"] == b"2"
    return table.to_pylist()


def test_every_prompt_has_its_pairs_and_every_strategy_its_share(pairs: list[dict[str, Any]]) -> None:
    assert Counter(pair["prompt_id"] for pair in pairs) == {f"row-{index}": SAMPLES for index in range(ROWS)}
    assert {pair["strategy"] for pair in pairs} == set(STRATEGIES)
    for pair in pairs:
        assert len(pair["rejected"]) == len(pair["mismatched_messages"]) == NEGATIVES
        assert pair["messages"][0]["role"] == "system"
        assert pair["messages"][1]["content"] == "What is tea?"
        assert pair["messages"][-1]["content"].endswith("Answer me.")
        if pair["dropped"] in ("", "pattern_letter_q"):
            assert ("q" in pair["chosen"]) == (pair["dropped"] == "pattern_letter_q")
    assert any(pair["dropped"] == "pattern_letter_q" for pair in pairs)


def test_swapped_responses_are_the_matched_ones_of_other_prompts(pairs: list[dict[str, Any]]) -> None:
    matched = {(pair["prompt_id"], pair["sample"]): pair["chosen_token_ids"] for pair in pairs}
    swapped = [pair for pair in pairs if pair["strategy"] == "swapped_response"]
    for pair in swapped:
        for number, (other, ids) in enumerate(
            zip(pair["mismatched_prompt_id"], pair["rejected_token_ids"], strict=True)
        ):
            assert ids == matched[other, number % SAMPLES]
    by_prompt = {pair["prompt_id"]: pair for pair in pairs if pair["sample"] == 0}
    for pair in by_prompt.values():
        own = sum(len(ids) for (prompt, _), ids in matched.items() if prompt == pair["prompt_id"])
        rejected = 0 if pair["strategy"] == "swapped_response" else sum(map(len, pair["rejected_token_ids"]))
        assert pair["generated_tokens"] == own + rejected


def test_pmi_is_that_of_the_model_itself(pairs: list[dict[str, Any]], tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def logprob(messages: list[dict[str, str]], response: list[int]) -> float:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
        return sum(float(logits[len(prompt) + index - 1, token]) for index, token in enumerate(response))

    kept = [pair for pair in pairs if not pair["dropped"]]
    assert len(kept) > ROWS
    for pair in kept[::8]:
        own = logprob(pair["messages"], pair["chosen_token_ids"])
        assert own == pytest.approx(pair["chosen_logprob"], abs=1e-3)
        others = [logprob(messages, pair["chosen_token_ids"]) for messages in pair["mismatched_messages"]]
        marginal = math.log(sum(math.exp(value) for value in others) / len(others))
        assert pair["pmi"] == pytest.approx(own - marginal, abs=2e-3)


def test_training_compared_every_rejected_response(
    run_dir: Path, pairs: list[dict[str, Any]], manifest: dict[str, Any]
) -> None:
    kept = [pair for pair in pairs if not pair["dropped"]]
    summary = json.loads((run_dir / "rounds/000/train/manifest.json").read_text())["summary"]
    assert manifest["statistics"]["kept"] == summary["pairs"] == len(kept)
    # A pair with K rejected responses is trained on as one pair, whose every response counts with its prompt.
    assert summary["tokens"] == sum(
        len(pair["prompt_token_ids"]) + len(response)
        for pair in kept
        for response in (pair["chosen_token_ids"], *pair["rejected_token_ids"])
    )
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_statistics_count_tokens_and_cache_hits_once(pairs: list[dict[str, Any]], manifest: dict[str, Any]) -> None:
    statistics = manifest["statistics"]
    assert statistics["generated_tokens"] == sum(pair["generated_tokens"] for pair in pairs)
    sent = sum(pair["engine_prompt_tokens"] for pair in pairs)
    cached = sum(pair["cached_prompt_tokens"] for pair in pairs)
    assert statistics["prefix_cache_hit_rate"] == pytest.approx(cached / sent)
    assert 0 < cached < sent
