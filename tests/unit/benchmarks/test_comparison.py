"""The command that keeps a comparison's table says with which command it was made.

python -m pytest tests/unit/benchmarks/test_comparison.py
"""

from __future__ import annotations

import json
import sys

from benchmarks import comparison


def test_overrides_stand_in_what_the_table_was_made_by(tmp_path, monkeypatch) -> None:
    arms = {"base": {"seconds": {"evaluate": 60.0}}}
    monkeypatch.setattr(comparison, "RESULTS", tmp_path)
    monkeypatch.setattr(comparison, "gather", lambda _: {"arms": arms})
    monkeypatch.setattr(comparison, "markdown", lambda _: "| the table |")
    recipe = "jobs/compare/personalization.yaml"
    overrides = ["seeds=[0, 1]", "train.beta=0.2"]
    monkeypatch.setattr(sys, "argv", ["comparison", recipe, *overrides, "--commit", "abc1234"])
    comparison.main()
    made_by = json.loads((tmp_path / "compare.json").read_text())["made_by"]
    assert (made_by["recipe"], made_by["overrides"]) == (recipe, overrides)
    table = (tmp_path / "compare.md").read_text()
    assert f"`python -m mipo_ray.compare {recipe} 'seeds=[0, 1]' train.beta=0.2` at commit abc1234, 1 minutes" in table
