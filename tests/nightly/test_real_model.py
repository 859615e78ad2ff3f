"""The real 135M instruct model, end to end: one round on a few prompts, and the policy it exports.

python -m pytest tests/nightly/test_real_model.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.helpers.runs import finish, read_pairs, start

GREEDY_PROMPTS = 20
GREEDY_TOKENS = 16


@pytest.fixture(scope="module")
def finished_run(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("real") / "run"
    options = ["rounds=1", "prompts.limit=8", "conditioning.block_size=4", "generation.sampling.max_tokens=24"]
    options += ["filters.truncated=keep", "filters.max_copy_rate=1.0", "filters.max_length_ratio=null"]
    options += ["evaluate.prompts.limit=4", "evaluate.samples_per_prompt=1", "evaluate.other_prompts=2"]
    finish(start(ray_address, f"run_dir={run_dir}", *options))
    return run_dir


def test_one_round_raises_the_reward_margin(finished_run):
    summary = json.loads((finished_run / "rounds/000/train/manifest.json").read_text())["summary"]
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert summary["last_loss"] < summary["first_loss"]
    results = json.loads((finished_run / "results.json").read_text())
    assert results["base"]["response_tokens"]["value"] > 4
    assert results["0"]["kl_per_token"]["value"] != 0


def test_the_exported_policy_answers_alike_in_vllm_and_transformers(finished_run):
    """Every greedy token of vLLM is the best one for transformers too, given the same tokens before it.

    The exception allowed is a tie: two candidates within 0.001 nats, where the order of float32 sums decides.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    from mipo_ray.config.prompts import PromptsConfig
    from mipo_ray.prompts.files import find_files
    from mipo_ray.prompts.reading import read_rows
    from mipo_ray.prompts.rows import normalize_row

    policy = finished_run / "rounds/000/train/policy"
    tokenizer = AutoTokenizer.from_pretrained(policy)
    prompts = PromptsConfig(path="bundled:instructions_heldout")
    rows = [
        normalize_row(row, prompts)
        for _, row in zip(range(GREEDY_PROMPTS), read_rows(find_files(prompts.path)[0]), strict=False)
    ]
    token_ids = [
        tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=True, return_dict=False)
        for row in rows
    ]

    engine = LLM(str(policy), dtype="float32", enforce_eager=True, max_model_len=256, enable_chunked_prefill=False)
    outputs = engine.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in token_ids],
        SamplingParams(temperature=0, max_tokens=GREEDY_TOKENS),
        use_tqdm=False,
    )
    by_vllm = [list(output.outputs[0].token_ids) for output in outputs]
    engine.llm_engine.engine_core.shutdown()

    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    for ids, answer in zip(token_ids, by_vllm, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        best = logits.argmax(-1)
        for position, token in enumerate(answer):
            if int(best[position]) != token:
                gap = float(logits[position, best[position]] - logits[position, token])
                assert gap < 1e-3, f"position {position}: transformers prefers {int(best[position])} by {gap} nats"


def test_the_samplers_logprobs_are_the_trainers(finished_run):
    """vLLM's summed log-probs of what it sampled equal a plain transformers computation over full logits."""
    import torch
    from transformers import AutoModelForCausalLM

    from mipo_ray.models.source import local_model_directory
    from mipo_ray.training.layout import lay_out
    from mipo_ray.training.logprobs import response_logprobs
    from tests.helpers.tiny_families import sequence_trees

    model = AutoModelForCausalLM.from_pretrained(local_model_directory("embedded"), dtype=torch.float32)
    for pair in read_pairs(finished_run, 0)[:4]:
        prompt, chosen = pair["prompt_token_ids"], pair["chosen_token_ids"]
        with torch.inference_mode():
            logprobs = model(torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            plain = float(logprobs.gather(1, torch.tensor(chosen)[:, None]).sum())
            ours = float(response_logprobs(model, lay_out(sequence_trees([(prompt, chosen)]), "padded"))[0])
        assert pair["chosen_logprob"] == pytest.approx(plain, abs=1e-2)
        assert ours == pytest.approx(plain, abs=1e-3)
