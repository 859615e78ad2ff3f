"""What engines that outlive a stage are worth: the same run with generation.pool.lifetime stage and run, side by side.

    python -m benchmarks.lifetime                        a tiny model: fixed cost alone, 5 pairs of runs
    python -m benchmarks.lifetime --recipe mipo_ray/examples/demo.yaml --repeats 1 --output OUTPUT

Runs whole commands, one after the other, the two lifetimes in turn; every run must give the same pairs. Writes
OUTPUT.json and OUTPUT.md. The tiny model takes about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import describe_machine
from mipo_ray.storage.run_directory import open_run
from mipo_ray.tables.parquet import open_table
from tests.helpers.runs import arguments, events, write_prompts
from tests.helpers.tiny_model import make_tiny_model

LIFETIMES = ("stage", "run")
PROMPTS, HELD_OUT = 24, 8
# The tiny model's answers are noise: none may be dropped for what it says.
TINY_OPTIONS = ("rounds=2", "train.batch_size=4", "filters.max_dropped_share=1")
FIGURES = {
    "seconds": "whole command, seconds",
    "engine_starts": "engine starts",
    "engine_start_seconds": "engine starts, seconds in all",
    "weight_swap_seconds": "longest swap of weights with its proof, seconds",
    "from_policy_to_engine": "policy committed until an engine holds it, seconds (longest)",
    "generate": "generate stages, seconds in all",
    "train": "train stages, seconds in all",
    "evaluate": "evaluate stages, seconds in all",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="A run with engines of a stage and with engines of the run.")
    parser.add_argument("--recipe", help="a recipe; default: a tiny model of random weights, two rounds")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each lifetime")
    parser.add_argument("--output", default="benchmarks/results/lifetime", help="without suffix")
    options = parser.parse_args()
    measured: dict[str, list[dict[str, float]]] = {lifetime: [] for lifetime in LIFETIMES}
    with tempfile.TemporaryDirectory() as scratch:
        command = [options.recipe] if options.recipe else tiny_run(Path(scratch))
        pairs = set()
        for repeat in range(options.repeats):
            for lifetime in LIFETIMES if repeat % 2 == 0 else reversed(LIFETIMES):
                run_dir = Path(scratch) / f"{lifetime}-{repeat}"
                measured[lifetime].append(measure(command, run_dir, lifetime))
                pairs.add(pairs_hash(run_dir))
                print(repeat, lifetime, measured[lifetime][-1], flush=True)
    if len(pairs) != 1:
        raise SystemExit(f"the runs have {len(pairs)} different sets of pairs: expected one")
    report = {
        "machine": describe_machine(),
        "what": options.recipe or f"tiny model, 2 rounds, {PROMPTS} prompts, {HELD_OUT} held-out",
        "repeats": options.repeats,
        "measured": measured,
    }
    output = Path(options.output)
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    output.with_suffix(".md").write_text(as_table(report))
    print(as_table(report))


def tiny_run(scratch: Path) -> list[str]:
    """The arguments of a run whose work is next to nothing."""
    (scratch / "recipe.yaml").write_text("{}")  # the defaults, not the demo
    write_prompts(scratch / "train.jsonl", "train", PROMPTS)
    write_prompts(scratch / "held_out.jsonl", "held-out", HELD_OUT)
    return [*arguments(scratch / "run", make_tiny_model(scratch / "tiny"), scratch), *TINY_OPTIONS]


def measure(command: Sequence[str], run_dir: Path, lifetime: str) -> dict[str, float]:
    """One run, and the FIGURES of it."""
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "mipo_ray.run", *command, f"run_dir={run_dir}", f"generation.pool.lifetime={lifetime}"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seconds = time.monotonic() - started
    seen = events(run_dir)
    starts = [event["engine_start_seconds"] for event in seen if event["event"] == "engine_start"]
    swaps = [event["weight_swap_seconds"] for event in seen if event["event"] == "weight_swap"]
    stages = {
        name: sum(event["stage_seconds"] for event in seen if event["event"] == "stage" and event["stage"] == name)
        for name in ("generate", "train", "evaluate")
    }
    return {
        "seconds": seconds,
        "engine_starts": len(starts),
        "engine_start_seconds": sum(starts),
        "weight_swap_seconds": max(swaps, default=0.0),
        "from_policy_to_engine": max(_waits(seen)),
        **stages,
    }


def _waits(seen: Sequence[dict[str, Any]]) -> list[float]:
    """From each committed policy to the first engine that holds it, seconds."""
    ready = [event["time"] for event in seen if event["event"] in ("engine_start", "weight_swap")]
    committed = [event["time"] for event in seen if event["event"] == "stage" and event["stage"] == "train"]
    return [min(time for time in ready if time > policy) - policy for policy in committed]


def pairs_hash(run_dir: Path) -> str:
    """Of all pairs of a run, whatever their order in the files."""
    run, rows = open_run(str(run_dir)), []
    for stage in sorted(run_dir.glob("rounds/*/generate")):
        files = json.loads((stage / "manifest.json").read_text())["files"]
        table = open_table([str(stage / name) for name in files if name.endswith(".parquet")], run.arrow_filesystem())
        rows += sorted(json.dumps(row, sort_keys=True, default=str) for row in table.to_table().to_pylist())
    return sha256("\n".join(rows).encode()).hexdigest()


def as_table(report: dict[str, Any]) -> str:
    """The medians, and the ratio of each pair of runs' wall times."""
    measured = report["measured"]
    lines = [
        f"{report['what']}; {report['repeats']} runs each, in turn; medians.",
        "",
        f"{report['machine']}",
        "",
        "| | stage | run |",
        "|---|---|---|",
    ]
    for name, title in FIGURES.items():
        values = [median(one[name] for one in measured[lifetime]) for lifetime in LIFETIMES]
        lines.append(f"| {title} | {' | '.join(f'{value:.3g}' for value in values)} |")
    ratios = [run["seconds"] / stage["seconds"] for stage, run in zip(*measured.values(), strict=True)]
    lines.append(
        f"| wall time, run over stage: median (smallest to largest) | | {median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}) |"
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
