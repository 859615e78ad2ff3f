"""The same model on the same items: this project's numbers against lm-evaluation-harness.

    python -m pytest tests/nightly/test_lm_evaluation_harness.py

The harness runs its own code and its own arc_easy task; only where the items lie is replaced. No network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml

from tests.helpers.real_tasks import ARC_ITEMS, REAL_TASKS_SECONDS

TIE = 1e-3  # nats; sums of float32 in another order differ by less

pytestmark = pytest.mark.timeout(REAL_TASKS_SECONDS + 900)  # whichever test is first makes the run


@pytest.fixture(scope="module")
def harness() -> Path:
    """Where the package lm_eval lies."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (package lm-eval)")
    return Path(lm_eval.__file__).parent


@pytest.fixture(scope="module")
def items(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first ARC_ITEMS rows of ARC-Easy's test split, with the column names of the published data set."""
    path = tmp_path_factory.mktemp("arc") / "items.jsonl"
    lines = (shared_data / "arc" / "arc_easy_test.jsonl").read_text().splitlines()[:ARC_ITEMS]
    rows = [json.loads(line) for line in lines]
    published = [
        {
            "id": row["id"],
            "question": row["question"],
            "choices": {"text": row["choices"], "label": row["labels"]},
            "answerKey": row["answerKey"],
        }
        for row in rows
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in published))
    return path


@pytest.fixture(scope="module")
def model(test_environment: None) -> Path:
    from mipo_ray.models.embedded import prepare_embedded_model

    return prepare_embedded_model()


@pytest.fixture(scope="module")
def ours(real_tasks: Path) -> dict[str, Any]:
    """What the evaluate command writes: its metrics, and its examples in the order of the items."""
    entry = json.loads((real_tasks / "evaluation.json").read_text())["base"]["arc_easy_likelihood"]
    table = pyarrow.parquet.read_table(real_tasks / "base/tasks/arc_easy_likelihood/examples")
    return {"metrics": entry["metrics"], "examples": table.to_pylist()}


@pytest.fixture(scope="module")
def theirs(harness: Path, items: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What lm-evaluation-harness finds by its own arc_easy: its metrics, and each item's log-probs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        task = yaml.safe_load((harness / "tasks/arc/arc_easy.yaml").read_text())
        for elsewhere in ("dataset_name", "training_split", "validation_split"):
            del task[elsewhere]
        task |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(items)}}}
        task["task"] = "arc_easy_of_these_items"
        evaluated = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=8)
        found = lm_eval.simple_evaluate(model=evaluated, tasks=[task], bootstrap_iters=0)
    samples = sorted(found["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    return {
        "metrics": found["results"][task["task"]],
        "logprobs": [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples],
    }


def test_likelihood_accuracy_agrees_with_the_harness(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for mine, its in (("accuracy", "acc"), ("accuracy_normalized", "acc_norm")):
        here, there = ours["metrics"][mine], theirs["metrics"][f"{its},none"]
        print(f"{mine}: {here['value']:.4f} here, {there:.4f} there, on {here['n']} items")
        assert here["n"] == ARC_ITEMS
        assert here["value"] == pytest.approx(there, abs=0.005)
        assert 0.3 < there < 0.9  # four options: more than chance, less than perfect


def test_every_option_has_the_log_prob_that_the_harness_finds(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Item by item: the same log-probs, and so the same choice, but for ties."""
    differences, other_choice = [], 0
    for example, logprobs in zip(ours["examples"], theirs["logprobs"], strict=True):
        found = example["option_logprobs"]
        differences += [abs(a - b) for a, b in zip(found, logprobs, strict=True)]
        best = logprobs.index(max(logprobs))
        if example["extracted"] != example["option_labels"][best]:
            other_choice += 1
            first, second = sorted(logprobs, reverse=True)[:2]
            assert first - second < TIE, example["item_id"]
    print(
        f"largest difference {max(differences):.2e} nats over {len(differences)} options; {other_choice} other choices"
    )
    assert max(differences) < 10 * TIE
    assert other_choice <= 2
