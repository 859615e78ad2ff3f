"""A run whose first round is bad: its living engine holds that round's policy, and must sample from the initial model.

python -m pytest tests/nightly/test_guarded_engines.py
"""

from __future__ import annotations

import json
from pathlib import Path

from mipo_ray.config.guard import DEFAULT_BOUNDS
from tests.helpers.runs import arguments, events, finish, start, write_prompts


def test_the_second_round_starts_from_the_initial_model_in_an_engine_that_is_started_anew(
    ray_address: str, tiny_model: Path, tmp_path: Path
) -> None:
    """No trainer exported the initial model, so that nothing could prove its weights in the engine that is there."""
    write_prompts(tmp_path / "train.jsonl", "train", 16)
    write_prompts(tmp_path / "held_out.jsonl", "held-out", 6)
    (tmp_path / "recipe.yaml").write_text("{}")
    # The base's margin is 0, and that of whatever was trained is not.
    bounds = ", ".join(f"{name}: null" for name in DEFAULT_BOUNDS)
    options = arguments(
        tmp_path / "run",
        tiny_model,
        tmp_path,
        "rounds=2",
        "generation.pool.lifetime=run",
        "evaluate.primary=response_tokens",
        "guard.when_bad=halve_learning_rate",
        f"guard.bounds={{{bounds}, reward_margin: {{max_rise: 0, max_fall: 0}}}}",
    )
    output = finish(start(ray_address, *options))
    found = events(tmp_path / "run")
    starts = [(event["round"], event["stage"]) for event in found if event["event"] == "engine_start"]
    swaps = [(event["round"], event["stage"]) for event in found if event["event"] == "weight_swap"]
    assert starts == [(None, "evaluate"), (1, "generate")]
    assert swaps == [(0, "evaluate"), (1, "evaluate")]
    manifests = [json.loads((tmp_path / f"run/rounds/00{n}/generate/manifest.json").read_text()) for n in (0, 1)]
    assert [one["policy"] for one in manifests] == [str(tiny_model)] * 2
    assert "the run's policy is the initial model" in output
