"""A run whose pairs a judge's server chooses; by a function of the user's: tests/nightly/test_preference.py.

python -m pytest tests/integration/test_preference.py
"""

from __future__ import annotations

import json
from pathlib import Path

from mipo_ray import run as run_command
from tests.helpers.fake_judge_endpoint import MODEL, FakeJudgeEndpoint, longer
from tests.helpers.rewarded_runs import ROWS, options, write_rows
from tests.helpers.runs import events, joined_cluster, read_pairs


def test_a_judge_compares_them_two_by_two(ray_address: str, tiny_model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path)
    with FakeJudgeEndpoint(longer).running() as endpoint, joined_cluster():
        judge = (f"evaluate.judge.model={MODEL}", f"evaluate.judge.endpoint={endpoint.url}")
        assert run_command.main([*options(ray_address, tiny_model, tmp_path, *judge), "preference.chooser=judge"]) == 0
    assert len(endpoint.judged) == 2 * ROWS
    pairs = read_pairs(tmp_path / "run", 0)
    assert len(pairs) == ROWS
    for pair in pairs:
        if pair["dropped"] != "equal_rewards":
            assert len(pair["chosen"].strip("\r\n")) > len(pair["rejected"].strip("\r\n"))  # as the judge sees them
            assert (pair["chosen_reward"], pair["rejected_reward"], pair["sampled_reward"]) == (1.0, -1.0, 0.0)
    assert any(not pair["dropped"] for pair in pairs)
    sampled = sum(event["generated_tokens"] for event in events(tmp_path / "run") if event["event"] == "generated")
    assert sampled == sum(pair["generated_tokens"] for pair in pairs)  # what the judge wrote is not among them
    manifest = json.loads((tmp_path / "run/rounds/000/generate/manifest.json").read_text())
    assert manifest["chosen_by"].startswith(f"judge {MODEL}, whose prompt has the hash ")
