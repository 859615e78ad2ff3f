"""What a run directory holds beside its finished stages reaches the report: evaluation.json and the stages of tasks.

python -m pytest tests/unit/report/test_run_report.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from mipo_ray.config.recipe import load_run_config
from mipo_ray.config.schema import Config
from mipo_ray.evaluation.held_out.gains import where_gained
from mipo_ray.evaluation.held_out.metrics import measure
from mipo_ray.evaluation.held_out.rows import held_out_labels, measured_rows
from mipo_ray.report.run_report import write_report
from mipo_ray.storage.records import to_text
from mipo_ray.storage.results import write_results
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory, open_run
from tests.helpers.paired_runs import make_pair, make_run
from tests.helpers.report_data import make_evaluation
from tests.helpers.stages import commit


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


@pytest.mark.parametrize("kept", ["tokens", "sums", "sums of the base"])
def test_a_run_of_any_version_shows_what_was_measured_of_it(tmp_path: Path, kept: str) -> None:
    config = Config()
    run = open_run(str(tmp_path))
    for number, round in enumerate((BASE, Round(0))):
        with_tokens = kept == "tokens" or (kept == "sums of the base" and not round.is_base)
        write_scores(run, round, 3 + number, with_tokens=with_tokens)
        if round.is_base:
            write_prompts(run, with_labels=kept == "tokens")
        rows = measured_rows(run, round)
        base = None if round.is_base else measured_rows(run, BASE)
        labels = held_out_labels(run)
        gains = None if base is None or labels is None else where_gained(rows, base, labels, samples=50, seed=0)
        facts = {"results": measure(rows, base, beta=0.1, samples=50, seed=0), "gains": gains}
        commit(run, run.stage(round, "evaluate"), config, **facts)
    write_results(run, 1)
    write_report(config, run)
    html = (tmp_path / "report.html").read_text()
    assert '<h2 id="effects">' in html
    assert '<h2 id="gains">' in html
    assert ("not measured" in html) == (kept != "tokens")
    assert ("user of a" in html) == (kept == "tokens")
    assert "user of d" not in html  # it has no context PMI
    # The answers of all versions can be compared: those to a fall by 1 nat, the others with a context rise.
    assert "The largest rises: 4 answers" in html
    assert "The largest falls: 2 answers" in html
    manifest = json.loads((tmp_path / "rounds/000/evaluate/manifest.json").read_text())
    assert ("gains" in manifest) == (kept == "tokens")


def write_scores(run: RunDirectory, round: Round, tokens: int, *, with_tokens: bool) -> None:
    """Two answers to each of four prompts, the last without a context, of so many tokens, as the scorer writes them."""
    rows = []
    for prompt, change in (("a", -1.0), ("b", 2.0), ("c", 5.0), ("d", 9.0)):
        tokens += prompt == "b" and not round.is_base
        pmi = 4.0 if round.is_base else 4.0 + change
        for sample in range(2):
            ids = ["own", "other:x", "without_context"][: 2 if prompt == "d" else 3]
            logprobs = [-10.0, -10.0 - pmi - sample, -10.0 - pmi - sample][: len(ids)]
            answer = {
                "prompt_id": prompt, "context": "" if prompt == "d" else "I sail.", "source": "I sail. What now?",
                "kind": "answer", "sample": sample,
                "response": f"answer {prompt}{sample}", "finish_reason": "stop", "tokens": tokens,
                "conditioning_ids": ids, "logprobs_initial": logprobs,
                "logprobs_policy": [] if round.is_base else logprobs,
            }  # fmt: skip
            if with_tokens:
                answer["copied_tokens"] = [False] * tokens
                answer["token_logprobs_initial"] = [[value / tokens] * tokens for value in logprobs]
            rows.append(answer)
    folder = Path(run.path(run.stage(round, "evaluate"), "scores"))
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "part.parquet")


def write_prompts(run: RunDirectory, *, with_labels: bool) -> None:
    rows = [{"prompt_id": one, "user": f"hash {one}", "question": "hash"} for one in "abcd"]
    if with_labels:
        rows = [{**row, "user_label": f"user of {row['prompt_id']}", "question_label": "What now?"} for row in rows]
    folder = Path(run.path(run.stage(BASE, "evaluate"), "prompts"))
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "part.parquet")


def test_pairs_that_exist_are_shown_without_what_only_samples_have(tmp_path: Path) -> None:
    given = make_pair(1, ["No.", "Never."], strategy="given", mismatched_messages=[[], []])
    run = make_run(tmp_path, [[given]], "pairs.path=a.jsonl", "evaluate.enabled=false")
    write_report(load_run_config(str(run.read_text("config.yaml")), "config.yaml"), run)
    html = (tmp_path / "report.html").read_text()
    assert "<title>mipo-ray: embedded, pairs that exist</title>" in html
    assert "Never." in html
    for absent in ("sampled under", "mismatched prompt</span>", "random_prompt", "missing_context</title>"):
        assert absent not in html
