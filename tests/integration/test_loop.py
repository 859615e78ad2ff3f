"""The command itself, over real vLLM, Ray Data, Ray Train and DeepSpeed: whole runs and kills.

python -m pytest tests/integration/test_loop.py
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mipo_ray import run
from tests.helpers.golden_run import JUDGE_KEY, PROMPTS, RESPONSES, GoldenRun
from tests.helpers.runs import (
    arguments,
    events,
    joined_cluster,
    read_directory,
    read_pairs,
    snapshot,
    write_prompts,
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompt files: train.jsonl (200 rows) and held_out.jsonl (6 rows), every row with a context."""
    directory = tmp_path_factory.mktemp("prompts")
    write_prompts(directory / "train.jsonl", "train", 200)
    write_prompts(directory / "held_out.jsonl", "held-out", 6)
    (directory / "recipe.yaml").write_text("{}")  # the defaults, not the demo
    return directory


# What libraries print in such a run.
NOISE = ("[State Transition]", "worker group", "WARNING", "core_worker", "NUMA", "%|")


def check_what_was_shown(golden_run: GoldenRun) -> None:
    """The output of its last process is the run's own: a plan, stages, progress, and the primary measure in the end."""
    lines = golden_run.output.splitlines()
    assert not [line for line in lines if any(noise in line for noise in NOISE)]
    ends = [line for line in lines if re.match(r"(base   |round \d)  \S+ +(started|done in|finished before)", line)]
    assert len(ends) > 8
    primary = max(number for number, line in enumerate(lines) if line.startswith("context PMI "))
    assert [line.split("  ")[0] for line in lines[primary + 1 : primary + 4]] == [
        "judge_pairwise net win",
        "length",
        "copied 3-grams",
    ]
    assert lines[-1].startswith("finished in ")
    printed = [file.read_text() for file in sorted((golden_run.directory / "logs/libraries").iterdir())]
    assert any("worker group" in text for text in printed)
    assert JUDGE_KEY not in "".join(printed)


def test_two_rounds_end_to_end(golden_run, ray_address, capsys):
    run_dir = golden_run.directory
    check_what_was_shown(golden_run)

    names = [f"rounds/{index:03d}/{stage}" for index in (0, 1) for stage in ("generate", "train", "evaluate")]
    manifests = {name: json.loads((run_dir / name / "manifest.json").read_text()) for name in ["base/evaluate", *names]}
    assert {manifest["seed"] for manifest in manifests.values()} == {0}
    for index in (0, 1):
        pairs = read_pairs(run_dir, index)
        statistics = manifests[f"rounds/{index:03d}/generate"]["statistics"]
        kept = [pair for pair in pairs if not pair["dropped"]]
        assert statistics["kept"] == len(kept) > 20
        for pair in kept:
            # Tokens as sampled: an end token exactly where the sampler stopped.
            assert (pair["chosen_token_ids"][-1] == pair["rejected_token_ids"][-1] == 1) or "length" in (
                pair["chosen_finish_reason"],
                pair["rejected_finish_reason"],
            )
            assert pair["chosen_logprob"] < 0
            assert "I am user" in pair["messages"][-1]["content"]
            assert "I am user" not in pair["mismatched_messages"][-1]["content"]
        summary = manifests[f"rounds/{index:03d}/train"]["summary"]
        assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert summary["pairs"] == statistics["kept"]
    # Round 0 trained by pair_id on pairs that were all there; round 1 streamed, so that its training began before.
    assert [manifests[f"rounds/{index:03d}/train"]["order"] for index in (0, 1)] == ["pair_id", "prompts"]
    times = {(event["stage"], event["event"]): event["time"] for event in events(run_dir) if event["round"] == 1}
    assert times["train", "stage_start"] < times["generate", "stage"] < times["train", "stage"]
    # The policy of round 0 is the reference of round 1, and the one that samples there.
    assert manifests["rounds/001/generate"]["policy"] == manifests["rounds/001/train"]["reference"]
    assert manifests["rounds/001/generate"]["policy"].endswith("rounds/000/train/policy")

    results = json.loads((run_dir / "results.json").read_text())
    assert set(results) == {"base", "0", "1"}
    assert results["base"]["kl_per_token"]["value"] == 0
    assert results["base"]["reward_accuracy"]["value"] == 0.5
    for name in (
        *("reward_margin", "pmi_initial", "context_pmi_initial", "infonce_initial", "response_tokens"),
        *("context_pmi_matched", "context_pmi_copy_free", "pmi_matched", "pmi_copy_free", "context_pmi_per_token"),
    ):
        entry = results["1"][name]
        assert entry["low"] <= entry["value"] <= entry["high"], name
        assert entry["change_low"] <= entry["change"] <= entry["change_high"], name
    assert results["1"]["kl_per_token"]["value"] != 0

    for name in ("base/evaluate", "rounds/001/evaluate"):
        matrices = manifests[name]["matrix"]
        assert set(matrices) == {"prompts", "contexts"}
        scores = read_directory(run_dir / name / "scores")
        own = {row["prompt_id"]: row for row in scores if row["kind"] == "answer" and row["sample"] == 0}
        for row in scores:
            sums = [sum(tokens) for tokens in row["token_logprobs_initial"]]
            assert sums == pytest.approx(list(row["logprobs_initial"]), abs=1e-3)
            assert (row["copied_tokens"] is None) == (row["kind"] != "answer")
            if row["kind"] == "answer":
                assert {row["tokens"]} == {len(row["copied_tokens"]), *map(len, row["token_logprobs_initial"])}
        for part in matrices.values():
            assert part["prompt_ids"] == [f"held-out-{row}" for row in range(6)]
            for judge in {"initial", "policy"} & set(part):
                assert [len(row) for row in part[judge]] == [6] * 6
                # The diagonal is the answer under what it was sampled under, scored in another batch.
                diagonal = [row[index] for index, row in enumerate(part[judge])]
                assert diagonal == pytest.approx(
                    [own[key][f"logprobs_{judge}"][0] for key in part["prompt_ids"]], abs=1e-3
                )
                assert len({value for row in part[judge] for value in row}) > 20
        assert manifests[name]["generated_tokens"] > 0
    assert "policy" in manifests["rounds/001/evaluate"]["matrix"]["contexts"]
    assert "gains" not in manifests["base/evaluate"]
    gains = manifests["rounds/001/evaluate"]["gains"]
    assert gains["measure"] == "context_pmi_initial"
    assert set(gains["by"]) == {"users", "questions", "lengths"}
    lengths = gains["by"]["lengths"]["groups"]
    assert sum(group["n"] * group["change"] for group in lengths) == pytest.approx(
        6 * results["1"]["context_pmi_initial"]["change"]
    )

    steps = [event for event in events(run_dir) if event["event"] == "train_step"]
    assert {(event["round"], event["stage"]) for event in steps} == {(0, "train"), (1, "train")}
    report = (run_dir / "report.html").read_text()
    for shown in ("reward_margin", "From prompts to answers", "What answers depend on", "self_bleu", "refusals"):
        assert shown in report
    assert not re.search(r"""(src|href|@import|url\()\s*=?\s*["']?\s*(https?:)?//""", report)  # nothing is fetched

    before = snapshot(run_dir)
    options = (
        *golden_run.options,
        *golden_run.judge_options,
        f"run_dir={run_dir}",
        f"ray.address={ray_address}",
    )
    assert run.main(["--full", *options]) == 0
    output = capsys.readouterr().out
    assert "finished before" in output
    assert "reward_margin" in output
    assert snapshot(run_dir) == before

    assert run.main([*options, "train.beta=0.2"]) == 2
    assert "train.beta: 0.1 there, 0.2 now" in capsys.readouterr().err
    assert snapshot(run_dir) == before


def test_a_tracker_was_written_beside(golden_run):
    assert list((golden_run.directory / "trackers/tensorboard").glob("events.out.tfevents.*"))


def test_a_stopped_or_killed_run_continues_where_it_stopped(golden_run, tiny_model):
    run_dir, stops = golden_run.directory, golden_run.interruptions
    every_pair = sorted((f"train-{row}", sample) for row in range(PROMPTS) for sample in range(RESPONSES))
    generate, train = run_dir / "rounds/000/generate", run_dir / "rounds/000/train"

    assert "lock.json" not in stops.files_after_sigterm
    assert "rounds/000/generate/manifest.json" not in stops.files_after_sigterm
    assert stops.committed_pairs
    assert stops.committed_pairs.items() <= stops.generated.items()  # what was sampled before the stop was kept

    assert "rounds/000/train/manifest.json" not in stops.files_after_sigkill
    assert snapshot(generate) == stops.generated
    assert snapshot(train) == stops.trained
    assert not (run_dir / "lock.json").exists()
    for index in (0, 1):
        assert sorted((pair["prompt_id"], pair["sample"]) for pair in read_pairs(run_dir, index)) == every_pair
    weights = [load_file(place / "model.safetensors") for place in (tiny_model, train / "policy")]
    assert weights[0].keys() == weights[1].keys()
    assert any(not torch.equal(weights[1][name], weight) for name, weight in weights[0].items())


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What the command says in this process when it refuses its input."""
    with joined_cluster():
        assert run.main(list(options)) == 2
    return capsys.readouterr().err


def test_bad_prompts_stop_before_any_engine_and_leave_nothing_finished(
    ray_address, tiny_model, prompts, tmp_path, capsys
):
    long = tmp_path / "long.jsonl"
    rows = [
        {"prompt_id": str(index), "prompt": "word " * (400 if index == 1 else 3), "context": "x"} for index in (0, 1)
    ]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = arguments(tmp_path / "run", tiny_model, prompts, f"prompts.path={long}", f"ray.address={ray_address}")
    output = refused(capsys, *options)
    assert "prompt '1'" in output
    assert "expected at most 240 prompt tokens" in output
    assert not any(event["event"] == "engine_start" for event in events(tmp_path / "run"))
    assert not list((tmp_path / "run").rglob("manifest.json"))


def test_a_model_that_cannot_be_trained_so_stops_before_any_engine(ray_address, tiny_model, prompts, tmp_path, capsys):
    lora = ("train.lora.rank=4", "train.lora.target_modules=[q_porj]", f"ray.address={ray_address}")
    output = refused(capsys, *arguments(tmp_path / "run", tiny_model, prompts, *lora))
    assert "error: train.lora.target_modules: expected all-linear or names of linear layers" in output
    assert "found 'q_porj'" in output
    assert not any(event["event"] == "engine_start" for event in events(tmp_path / "run"))
    assert not list((tmp_path / "run").rglob("manifest.json"))
