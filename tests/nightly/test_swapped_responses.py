"""A whole round of one conditioning strategy: swapped responses, trained by the objective that reads their prompts.

Of every push: tests/integration/test_strategies.py, where swapped responses have their share.

python -m pytest tests/nightly/test_swapped_responses.py
"""

from __future__ import annotations

import json

from tests.helpers.runs import arguments, finish, read_pairs, start, write_prompts


def test_swapped_responses_are_sampled_once(ray_address, tiny_model, tmp_path):
    write_prompts(tmp_path / "train.jsonl", "train", 24)
    write_prompts(tmp_path / "held_out.jsonl", "held-out", 6)
    (tmp_path / "recipe.yaml").write_text("{}")  # the defaults, not the demo
    run_dir = tmp_path / "run"
    finish(
        start(
            ray_address,
            *arguments(run_dir, tiny_model, tmp_path, "evaluate.enabled=false", "rounds=1"),
            "conditioning.strategy=swapped_response",
            "train.objective=sami",  # which reads the mismatched prompts, too
        )
    )
    pairs = {pair["prompt_id"]: pair for pair in read_pairs(run_dir, 0)}
    assert len(pairs) == 24
    for pair in pairs.values():
        other = pairs[pair["mismatched_prompt_id"]]
        assert other["prompt_id"] != pair["prompt_id"]
        assert pair["mismatched_messages"] == other["messages"]
        assert pair["rejected_token_ids"] == other["chosen_token_ids"]
    trained = json.loads((run_dir / "rounds/000/train/manifest.json").read_text())
    assert trained["reference"] is None
    # Both responses are scored under both prompts.
    kept = [pair for pair in pairs.values() if not pair["dropped"]]
    assert trained["summary"]["tokens"] == sum(
        len(prompt) + len(response)
        for pair in kept
        for prompt in (pair["prompt_token_ids"], pair["mismatched_prompt_token_ids"])
        for response in (pair["chosen_token_ids"], pair["rejected_token_ids"])
    )
    statistics = json.loads((run_dir / "rounds/000/generate/manifest.json").read_text())["statistics"]
    sampled = sum(len(pair["chosen_token_ids"]) for pair in pairs.values())
    assert statistics["generated_tokens"] == sampled
