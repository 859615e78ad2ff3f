"""A whole round beside the way that published recipes take: answers one by one, then a trainer that pads.

    python -m benchmarks.whole_round                 5 rounds of each, in turn
    python -m benchmarks.whole_round --repeats 1

Ours is the command with the demo's recipe, one round, without evaluation and without filters. The other is one Python
process over the same prompts: `generate` of transformers for one prompt after the other, then TRL's DPOTrainer with a
reference model, and the policy saved. Model, prompts, answers' length (all as long as allowed, so that both do the same
work), batch size, epochs and learning rate are the same; both start with nothing loaded. Writes
benchmarks/results/whole_round.json and .md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import describe_machine
from mipo_ray.storage.run_directory import open_run
from mipo_ray.tables.parquet import open_table
from tests.helpers.runs import events

RECIPE = "mipo_ray/examples/demo.yaml"
TOKENS = 48
BATCH, LEARNING_RATE, BETA, TEMPERATURE = 4, 1e-5, 0.1, 0.7
NO_FILTERS = (
    "filters.truncated=keep",
    "filters.min_length_ratio=0",
    "filters.max_length_ratio=null",
    "filters.max_copy_rate=1",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="A whole round, ours and one prompt at a time.")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each")
    parser.add_argument("--output", default="benchmarks/results/whole_round", help="without suffix")
    parser.add_argument("--published", nargs=2, metavar=("PROMPTS", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.published:
        return published(*map(Path, options.published))
    measured: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        prompts = Path(scratch) / "prompts.jsonl"
        ours(Path(scratch) / "first")  # not counted: its pairs tell the prompts
        write_prompts(Path(scratch) / "first", prompts)
        for repeat in range(options.repeats):
            found: dict[str, dict[str, float]] = {}
            for name in ("ours", "published") if repeat % 2 == 0 else ("published", "ours"):
                place = Path(scratch) / f"{name}-{repeat}"
                found[name] = ours(place) if name == "ours" else one_by_one(prompts, place)
                print(repeat, name, found[name], flush=True)
            measured.append(found)
    report = {"machine": describe_machine(), "recipe": RECIPE, "tokens": TOKENS, "measured": measured}
    output = Path(options.output)
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    output.with_suffix(".md").write_text(as_table(report))
    print(as_table(report))


def ours(run_dir: Path) -> dict[str, float]:
    """Seconds of the command, and of its stages."""
    overrides = [
        f"run_dir={run_dir}",
        "rounds=1",
        "evaluate.enabled=false",
        f"generation.sampling.max_tokens={TOKENS}",
        f"generation.sampling.min_tokens={TOKENS}",
        f"generation.sampling.temperature={TEMPERATURE}",
        f"train.batch_size={BATCH}",
        f"train.learning_rate={LEARNING_RATE}",
        f"train.beta={BETA}",
        *NO_FILTERS,
    ]
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "mipo_ray.run", RECIPE, *overrides], check=True, capture_output=True)
    seconds = time.monotonic() - started
    stages = {event["stage"]: event["stage_seconds"] for event in events(run_dir) if event["event"] == "stage"}
    return {"seconds": seconds, "generate": stages["generate"], "train": stages["train"]}


def write_prompts(run_dir: Path, place: Path) -> None:
    """What the pairs of a run were sampled under: a line of {"messages", "mismatched_messages"} for each."""
    stage = run_dir / "rounds/000/generate"
    files = [str(stage / name) for name in json.loads((stage / "manifest.json").read_text())["files"]]
    files = [file for file in files if file.endswith(".parquet") and "/conditioned/" not in file]
    columns = ["prompt_id", "messages", "mismatched_messages"]
    rows = open_table(files, open_run(str(run_dir)).arrow_filesystem()).to_table(columns=columns).to_pylist()
    rows.sort(key=lambda row: row["prompt_id"])
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))


def one_by_one(prompts: Path, output: Path) -> dict[str, float]:
    """Seconds of the other way in a process of its own."""
    output.mkdir()
    command = [sys.executable, "-m", "benchmarks.whole_round", "--published", str(prompts), str(output)]
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    return {"seconds": time.monotonic() - started, **json.loads((output / "seconds.json").read_text())}


def published(prompts: Path, output: Path) -> None:
    """One round as published recipes have it; writes the seconds of its two parts to `output`/seconds.json."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from mipo_ray.models.source import local_model_directory

    started = time.monotonic()
    directory = local_model_directory("embedded")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def answer(messages: list[dict[str, str]]) -> list[dict[str, str]]:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
        with torch.inference_mode():
            found = model.generate(
                **ids, **length, do_sample=True, temperature=TEMPERATURE, pad_token_id=tokenizer.pad_token_id
            )
        text = tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        return [{"role": "assistant", "content": text}]

    torch.manual_seed(0)
    rows = []
    for row in map(json.loads, prompts.read_text().splitlines()):
        chosen, rejected = (answer(row[name]) for name in ("messages", "mismatched_messages"))
        rows.append({"prompt": row["messages"], "chosen": chosen, "rejected": rejected})
    generated = time.monotonic()
    trainer = DPOTrainer(
        model=model,
        ref_model=AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(output / "trainer"),
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            beta=BETA,
            max_length=None,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(output / "policy"))
    ended = time.monotonic()
    (output / "seconds.json").write_text(json.dumps({"generate": generated - started, "train": ended - generated}))


def as_table(report: dict[str, Any]) -> str:
    """Medians of both, and the ratios of the pairs of runs."""
    measured = report["measured"]
    lines = [
        f"{report['recipe']}, one round, {report['tokens']} tokens an answer, no filters, no evaluation; "
        f"{len(measured)} rounds of each, in turn; medians, seconds.",
        "",
        report["machine"],
        "",
        "| | one by one, padded | mipo_ray |",
        "|---|---|---|",
    ]
    for name, title in (("seconds", "whole round"), ("generate", "generate"), ("train", "train")):
        values = [median(one[side][name] for one in measured) for side in ("published", "ours")]
        lines.append(f"| {title} | {' | '.join(f'{value:.0f}' for value in values)} |")
    ratios = [one["published"]["seconds"] / one["ours"]["seconds"] for one in measured]
    lines.append(
        f"| times as fast: median (smallest to largest) | | {median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}) |"
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
