"""What a run directory holds beside its finished stages reaches the report: evaluation.json and the stages of tasks.

python -m pytest tests/unit/report/test_run_report.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mipo_ray.config.recipe import load_run_config
from mipo_ray.config.schema import Config
from mipo_ray.report.run_report import write_report
from mipo_ray.storage.records import to_text
from mipo_ray.storage.run_directory import open_run
from tests.helpers.paired_runs import make_pair, make_run
from tests.helpers.report_data import make_evaluation


def event(round_index: int | None, stage: str, seconds: float) -> dict[str, Any]:
    return {"time": 0.0, "event": "stage", "round": round_index, "stage": stage, "stage_seconds": seconds}


def test_tasks_and_judgements_are_shown_and_their_seconds_counted(tmp_path: Path) -> None:
    events = [event(None, "tasks", 61.0), event(0, "judge/pairwise", 125.0), event(0, "judge/pairwise", 130.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in events))
    (tmp_path / "evaluation.json").write_text(to_text(make_evaluation(np.random.default_rng(5))))
    run = open_run(str(tmp_path))
    write_report(Config(), run)
    html = (tmp_path / "report.html").read_text()
    assert "arc_easy_likelihood accuracy is better than the base" in html
    assert "All finished stages together: 3 min 11 s, no GPU." in html  # of a stage that ran twice, the newer time
    assert "judge/pairwise" in html


def test_a_run_directory_with_nothing_finished_has_a_report(tmp_path: Path) -> None:
    write_report(Config(), open_run(str(tmp_path)))
    html = (tmp_path / "report.html").read_text()
    assert "Nothing was measured" in html
    for section in ("tasks", "judge", "matrix", "flow", "cost"):
        assert f'id="{section}"' not in html


def test_pairs_that_exist_are_shown_without_what_only_samples_have(tmp_path: Path) -> None:
    given = make_pair(1, ["No.", "Never."], strategy="given", mismatched_messages=[[], []])
    run = make_run(tmp_path, [[given]], "pairs.path=a.jsonl", "evaluate.enabled=false")
    write_report(load_run_config(str(run.read_text("config.yaml")), "config.yaml"), run)
    html = (tmp_path / "report.html").read_text()
    assert "<title>mipo-ray: embedded, pairs that exist</title>" in html
    assert "Never." in html
    for absent in ("sampled under", "mismatched prompt</span>", "random_prompt", "missing_context</title>"):
        assert absent not in html
