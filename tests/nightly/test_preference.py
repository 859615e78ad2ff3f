"""Runs whose pairs a function of the user's chooses, in processes of their own in the folder that holds it; and one
whose pairs are chosen by the PMI of each response.

python -m pytest tests/nightly/test_preference.py
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

import mipo_ray
from mipo_ray import run as run_command
from mipo_ray.pairs.__main__ import main as pairs_command
from tests.helpers.rewarded_runs import ROWS, options, write_rows
from tests.helpers.runs import has_traceback, joined_cluster, read_directory, read_pairs

SAMPLES = 3

# Counts letters of the prompt's own column: so few kinds of values that some prompts' samples are equal.
FUNCTION = """
def vowels(prompts, completions, group, favourite, **kwargs):
    assert len(prompts) == len(completions) == len(group) == len(favourite)
    return [min(one[0]["content"].count(letter), 2) for one, letter in zip(completions, favourite)]
"""


@dataclass(frozen=True)
class FunctionRun:
    folder: Path
    options: tuple[str, ...]
    output: str

    @property
    def directory(self) -> Path:
        return self.folder / "run"


def command(folder: Path, *arguments: str) -> tuple[int, str]:
    """A process of its own in the folder that holds the function, as a user has it."""
    done = subprocess.run(
        [sys.executable, "-m", "mipo_ray.run", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(mipo_ray.__file__).parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def finished(ray_address: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> FunctionRun:
    folder = tmp_path_factory.mktemp("function")
    write_rows(folder)
    (folder / "own_rewards.py").write_text(FUNCTION)
    chooser = ("preference.chooser=function", "preference.function=own_rewards:vowels", f"preference.samples={SAMPLES}")
    given = options(ray_address, tiny_model, folder, *chooser)
    code, output = command(folder, *given)
    assert code == 0, output
    assert not has_traceback(output), output
    return FunctionRun(folder, given, output)


def test_each_prompt_gives_the_best_against_the_worst(finished: FunctionRun) -> None:
    pairs = read_pairs(finished.directory, 0)
    assert Counter(pair["prompt_id"] for pair in pairs) == {f"reward-{index}": 1 for index in range(ROWS)}
    kept = [pair for pair in pairs if not pair["dropped"]]
    assert kept
    for pair in pairs:
        letter = json.loads(pair["extra"])["favourite"]
        values = [min(pair[side].count(letter), 2) for side in ("chosen", "rejected")]
        assert [pair["chosen_reward"], pair["rejected_reward"]] == values
        assert values[1] <= pair["sampled_reward"] <= values[0]
        assert (pair["dropped"] == "equal_rewards") == (values[0] == values[1])
        assert pair["pmi"] is None
    manifest = json.loads((finished.directory / "rounds/000/generate/manifest.json").read_text())
    assert manifest["chosen_by"].startswith("function own_rewards:vowels, whose module has the hash ")
    mean = sum(pair["sampled_reward"] for pair in pairs) / ROWS
    assert manifest["statistics"]["reward_mean"] == pytest.approx(mean, abs=1e-4)
    assert manifest["statistics"]["generated_tokens"] == sum(pair["generated_tokens"] for pair in pairs)


def test_the_policy_was_trained_on_them(finished: FunctionRun) -> None:
    summary = json.loads((finished.directory / "rounds/000/train/manifest.json").read_text())["summary"]
    assert summary["pairs"] == sum(not pair["dropped"] for pair in read_pairs(finished.directory, 0))
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    report = (finished.directory / "report.html").read_text()
    assert "reward, chosen less rejected" in report
    assert "equal_rewards" in report or summary["pairs"] == ROWS


def test_a_round_goes_on_by_the_function_that_it_was_begun_with(finished: FunctionRun, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(finished.folder, folder)
    before = read_pairs(finished.directory, 0)
    for stage in ("generate", "train"):
        (folder / f"run/rounds/000/{stage}/manifest.json").unlink()
    (folder / "own_rewards.py").write_text(FUNCTION.replace("2)", "3)"))
    again = [*finished.options, f"run_dir={folder}/run", f"prompts.path={finished.folder}/prompts.jsonl"]
    code, output = command(folder, *again)
    assert code == 2
    assert "expected what chose the pairs when this round was begun, function own_rewards:vowels" in output
    assert not has_traceback(output), output
    (folder / "own_rewards.py").write_text(FUNCTION)
    code, output = command(folder, *again)
    assert code == 0, output
    assert read_pairs(folder / "run", 0) == before


def test_pmi_chooses_the_response_that_says_most_of_its_prompt(ray_address, tiny_model: Path, tmp_path: Path) -> None:
    """Of the same samples: the rewards are the log-probs that transformers gives, under the prompt less under the
    mismatched one, and no mismatched response was sampled."""
    import torch
    from transformers import AutoModelForCausalLM

    write_rows(tmp_path)
    by_pmi = ("preference.chooser=pmi", "preference.samples=3", "conditioning.strategy=random_prompt")
    with joined_cluster():
        assert run_command.main([*options(ray_address, tiny_model, tmp_path), *by_pmi]) == 0
    conditioned = {row["prompt_id"]: row for row in read_directory(tmp_path / "run/rounds/000/generate/conditioned")}
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    def logprob(prompt: list[int], response: list[int]) -> float:
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        return float(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())

    pairs = read_pairs(tmp_path / "run", 0)
    assert len(pairs) == ROWS
    assert any(not pair["dropped"] for pair in pairs)
    for pair in pairs:
        row = conditioned[pair["prompt_id"]]
        (mismatched,) = row["mismatched_token_ids"]
        assert [len(row["requests"]), row["strategy"]] == [3, "random_prompt"]
        for side in ("chosen", "rejected"):
            ids = pair[f"{side}_token_ids"]
            expected = logprob(row["prompt_token_ids"], ids) - logprob(mismatched, ids)
            assert pair[f"{side}_reward"] == pytest.approx(expected, abs=2e-3)
        assert pair["chosen_reward"] >= pair["sampled_reward"] >= pair["rejected_reward"]
    manifest = json.loads((tmp_path / "run/rounds/000/generate/manifest.json").read_text())
    assert manifest["chosen_by"] == "pointwise mutual information with the prompt"


def test_what_the_function_raises_ends_the_run_with_its_name(finished: FunctionRun, tmp_path: Path) -> None:
    (tmp_path / "own_rewards.py").write_text("def vowels(completions):\n    raise ZeroDivisionError('of a test')\n")
    code, output = command(
        tmp_path, *finished.options, f"run_dir={tmp_path}/run", f"prompts.path={finished.folder}/prompts.jsonl"
    )
    assert code == 2
    assert "preference.function own_rewards:vowels, called with" in output
    assert "raised ZeroDivisionError: of a test" in output
    assert not has_traceback(output), output
    assert not (tmp_path / "run/rounds/000/generate/manifest.json").exists()


def test_a_recipe_does_not_call_functions_by_itself(finished: FunctionRun, tmp_path: Path) -> None:
    recipe = "preference: {chooser: function, function: own_rewards:vowels}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    code, output = command(finished.folder, str(tmp_path / "recipe.yaml"), f"run_dir={tmp_path}/run")
    assert code == 2
    assert "preference.function: imports and calls 'own_rewards:vowels'" in output


def test_pairs_are_handed_on_with_what_chose_them(finished: FunctionRun, tmp_path: Path) -> None:
    assert pairs_command(["export", str(finished.directory), "--format", "trl", "--output", str(tmp_path / "out")]) == 0
    kept = [pair for pair in read_pairs(finished.directory, 0) if not pair["dropped"]]
    found = [json.loads(line) for line in (tmp_path / "out/round_0.jsonl").read_text().splitlines()]
    assert sorted(row["chosen"][0]["content"] for row in found) == sorted(pair["chosen"] for pair in kept)
    card = (tmp_path / "out/README.md").read_text()
    assert "Preference pairs that a reward chose" in card
    assert "own_rewards:vowels" in card
