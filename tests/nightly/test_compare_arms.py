"""The command `compare` over real vLLM, Ray Train and DeepSpeed: three small arms, a kill, and the table.

python -m pytest tests/nightly/test_compare_arms.py
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import torch
import yaml
from safetensors.torch import load_file

from mipo_ray.pairs.label_control import has_swapped_labels

TOPICS = ["bread", "rivers", "stars", "maps", "tea", "trains", "moss", "chess"]
ARMS = {
    "mipo": {},
    "shuffled_labels": {"train": {"shuffle_labels": True}},
    "sft": {"train": {"objective": "sft"}},
}
GENERATE = "rounds/000/generate"
TASK = "arc_easy_likelihood"


def write_recipe(directory: Path, model: Path) -> Path:
    for name, count in (("train", 24), ("held_out", 6)):
        rows = [
            {
                "prompt_id": f"{name}-{index}",
                "prompt": f"Question {index}: what should I know about {TOPICS[index % len(TOPICS)]}?",
                "context": f"I am user {index} of {name} and I like {TOPICS[(index + 3) % len(TOPICS)]}.",
            }
            for index in range(count)
        ]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [
        {
            "id": f"q{index}",
            "question": f"What is {index} plus one?",
            "choices": [str(index + step) for step in range(4)],
            "labels": ["A", "B", "C", "D"],
            "answerKey": "B",
        }
        for index in range(6)
    ]
    (directory / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    recipe = {
        "run_dir": str(directory / "comparison"),
        "rounds": 1,
        "model": {"path": str(model), "max_model_len": 256},
        "prompts": {"path": str(directory / "train.jsonl")},
        "conditioning": {"block_size": 8},
        "generation": {"sampling": {"max_tokens": 16, "temperature": 1.0}},
        "train": {"learning_rate": 1e-3},
        "evaluate": {
            "prompts": {"path": str(directory / "held_out.jsonl")},
            "samples_per_prompt": 1,
            "other_prompts": 1,
            "tasks": {TASK: {"path": str(directory / "questions.jsonl")}},
        },
        "arms": ARMS,
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return directory / "recipe.yaml"


def start(recipe: Path, address: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mipo_ray.compare", str(recipe), f"ray.address={address}", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def read_pairs(run: Path) -> list[dict]:
    files = json.loads((run / GENERATE / "manifest.json").read_text())["files"]
    return pyarrow.parquet.ParquetDataset([run / GENERATE / name for name in files]).read().to_pylist()


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_comparison_is_killed_resumed_and_ends_in_one_table(ray_address, tiny_model, tmp_path):
    recipe = write_recipe(tmp_path, tiny_model)
    root = tmp_path / "comparison"
    runs = {arm: root / arm / "seed-0" for arm in ("base", *ARMS)}

    first = start(recipe, ray_address)
    deadline = time.monotonic() + 300
    while not (runs["mipo"] / "rounds/000/train/manifest.json").exists():
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline, "the first arm was never trained"
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    trained = contents(runs["mipo"] / "rounds/000/train")
    assert not (runs["sft"] / "rounds/000/train/manifest.json").exists()

    output = finish(start(recipe, ray_address))
    assert contents(runs["mipo"] / "rounds/000/train") == trained  # what was finished is not done again

    # Equal data: the very same pairs, all of which every arm kept, and as many steps.
    assert contents(runs["sft"] / GENERATE) == contents(runs["mipo"] / GENERATE)
    assert contents(runs["shuffled_labels"] / GENERATE) == contents(runs["mipo"] / GENERATE)
    held_out = [contents(run / "base/evaluate") for run in runs.values()]
    assert held_out[0] == held_out[1] == held_out[2] == held_out[3] != {}
    kept = sorted(pair["pair_id"] for pair in read_pairs(runs["mipo"]) if not pair["dropped"])
    assert json.loads((root / "common_pairs/seed-0/round-000.json").read_text()) == kept
    summaries = {arm: json.loads((runs[arm] / "rounds/000/train/manifest.json").read_text())["summary"] for arm in ARMS}
    assert {(summary["pairs"], summary["steps"]) for summary in summaries.values()} == {
        (len(kept), (len(kept) + 3) // 4)
    }

    # Three ways of training on them: three policies.
    weights = [load_file(runs[arm] / "rounds/000/train/policy/model.safetensors") for arm in ARMS]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert any(not torch.equal(weights[one][name], weights[other][name]) for name in weights[one])

    found = json.loads((root / "comparison.json").read_text())
    assert list(found["arms"]) == ["base", *ARMS]
    assert found["unfinished"] == []
    assert found["equal"]["pairs"] == len(kept)
    assert found["arms"]["shuffled_labels"]["swapped_pairs"] == sum(has_swapped_labels(0, name) for name in kept)
    for arm in ARMS:
        results = json.loads((runs[arm] / "results.json").read_text())["0"]
        measures = found["arms"][arm]["measures"]
        assert {"context_pmi_initial", "reward_accuracy", "kl_per_token", "response_tokens"} <= measures.keys()
        task = json.loads((runs[arm] / "evaluation.json").read_text())["0"][TASK]["metrics"]["accuracy"]
        assert measures[f"{TASK}.accuracy"] == task
        assert (task["n"], "p_value" in task) == (6, True)  # paired with the base's own answers
        for name, entry in measures.items():
            assert name == f"{TASK}.accuracy" or entry["value"] == results[name]["value"]
            assert entry["verdict"] in ("better", "worse", "not distinguishable", "rose", "fell")
    assert found["arms"]["base"]["measures"]["reward_accuracy"]["value"] == 0.5
    for run in runs.values():  # each report was written after the tasks, too
        assert '<h2 id="tasks">' in (run / "report.html").read_text()
    assert "shuffled_labels" in found["arms"]["sft"]["against_control"]
    assert "control (shuffled_labels)" in found["control"][0]
    assert found["control"][0] in output

    html, table = (root / "comparison.html").read_text(), (root / "comparison.md").read_text()
    for arm in ("base", *ARMS):
        assert f"<th>{arm}<span>" in html
        assert f"| `{arm}`<br>" in table
    assert not re.search(r"""(src|href|@import|url\()\s*=?\s*["']?\s*(https?:)?//""", html)  # nothing is fetched

    again = finish(start(recipe, ray_address))
    assert "finished before" in again
    refused = start(recipe, ray_address, "arms.sft.train.learning_rate=1e-4")
    output, _ = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert "sft, seed 0" in output
    assert "train.learning_rate: 0.001 there, 0.0001 now" in output
