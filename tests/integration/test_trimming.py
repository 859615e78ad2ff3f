"""A run of which the limit cuts most answers, and that trains on what is whole of them.

python -m pytest tests/integration/test_trimming.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mipo_ray import run as run_command
from tests.helpers.runs import joined_cluster, read_pairs, write_prompts

ROWS, LIMIT = 24, 48


def write_stopping_model(plain: Path, directory: Path) -> Path:
    """The tiny model, made to write full stops and spaces often enough that its answers hold sentences."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(plain), AutoTokenizer.from_pretrained(plain)
    messages = [{"role": "user", "content": "What should I know about tea?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        # Their logits grow by about 6 wherever the state is as it is here on average.
        mean = model.model(torch.tensor([prompt])).last_hidden_state[0].mean(0)
        for text in (".", " "):
            (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
            model.lm_head.weight[token] += 6 * mean / mean.square().sum()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stopping_model(tiny_model, tmp_path_factory.mktemp("stops") / "model")


@pytest.fixture(scope="module")
def run_dir(ray_address: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trimmed")
    write_prompts(folder / "train.jsonl", "trim", ROWS)
    options = [
        f"ray.address={ray_address}",
        f"run_dir={folder}/run",
        f"model.path={model}",
        "model.max_model_len=256",
        "rounds=1",
        f"prompts.path={folder}/train.jsonl",
        "conditioning.block_size=8",
        f"generation.sampling.max_tokens={LIMIT}",
        "generation.sampling.temperature=1.0",
        "filters.truncated=trim",
        "filters.min_length_ratio=0",
        "filters.max_length_ratio=null",
        "filters.max_dropped_share=1",
        "train.learning_rate=1e-3",
        "evaluate.enabled=false",
    ]
    with joined_cluster():
        assert run_command.main(options) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def pairs(run_dir: Path) -> list[dict[str, Any]]:
    found = read_pairs(run_dir, 0)
    assert len(found) == ROWS
    return found


SIDES = ("chosen", "rejected")


def is_trimmed(pair: dict[str, Any], side: str) -> bool:
    """By its length alone: at the limit nothing was cut off, or there was nothing whole."""
    return pair[f"{side}_finish_reason"] == "length" and len(pair[f"{side}_token_ids"]) < LIMIT


def test_cut_responses_end_with_a_sentence_and_without_an_end_token(pairs: list[dict[str, Any]], model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    trimmed = [(pair, side) for pair in pairs for side in SIDES if is_trimmed(pair, side)]
    assert {side for _, side in trimmed} == set(SIDES)
    for pair, side in trimmed:
        token_ids, text = pair[f"{side}_token_ids"], pair[side]
        assert text == tokenizer.decode(token_ids, skip_special_tokens=True)
        assert text.rstrip().rstrip("\"')]}*_`")[-1] in ".!?"
        assert tokenizer.eos_token_id not in token_ids
    for pair in pairs:
        stopped = [side for side in SIDES if pair[f"{side}_finish_reason"] == "stop"]
        assert all(pair[f"{side}_token_ids"][-1] == tokenizer.eos_token_id for side in stopped)
        lengths = [len(pair[f"{side}_token_ids"]) if side in stopped else LIMIT for side in SIDES]
        assert pair["generated_tokens"] == sum(lengths)  # what was cut off was sampled too


def test_a_pair_is_dropped_only_for_a_response_without_a_whole_sentence(
    pairs: list[dict[str, Any]], run_dir: Path
) -> None:
    kept = [pair for pair in pairs if not pair["dropped"]]
    assert any(is_trimmed(pair, side) for pair in kept for side in SIDES)
    for pair in pairs:
        assert pair["trimmed_responses"] == sum(is_trimmed(pair, side) for side in SIDES)
        if pair["dropped"] == "truncated":
            assert LIMIT in [len(pair[f"{side}_token_ids"]) for side in SIDES]
    statistics = json.loads((run_dir / "rounds/000/generate/manifest.json").read_text())["statistics"]
    assert statistics["trimmed_responses"] == sum(pair["trimmed_responses"] for pair in kept)
    trained = json.loads((run_dir / "rounds/000/train/manifest.json").read_text())["summary"]
    assert trained["pairs"] == len(kept)
    assert trained["first_loss"] == pytest.approx(0.6931, abs=1e-3)


def test_log_probs_and_pmi_are_those_of_the_prefix(pairs: list[dict[str, Any]], model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model).eval()

    def logprob(prompt: list[int], response: list[int]) -> float:
        with torch.inference_mode():
            logits = policy(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
        return sum(float(logits[len(prompt) + index - 1, token]) for index, token in enumerate(response))

    trimmed = [pair for pair in pairs if is_trimmed(pair, "chosen")]
    for pair in trimmed:
        own = logprob(pair["prompt_token_ids"], pair["chosen_token_ids"])
        assert own == pytest.approx(pair["chosen_logprob"], abs=1e-3)
        if not pair["dropped"]:
            under_other = logprob(pair["mismatched_prompt_token_ids"], pair["chosen_token_ids"])
            assert own - under_other == pytest.approx(pair["pmi"], abs=2e-3)
    for pair in [pair for pair in pairs if is_trimmed(pair, "rejected")]:
        other = logprob(pair["mismatched_prompt_token_ids"], pair["rejected_token_ids"])
        assert other == pytest.approx(pair["rejected_logprob"], abs=1e-3)
