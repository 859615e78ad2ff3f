"""How conditioning scales: time, and memory of the driver, over 10 thousand to a million prompt rows.

    python -m benchmarks.conditioning [--rows 10000 100000 1000000] [--strategy random_context]

Each size runs the program's own first pass in a process of its own: every row of the prompt files is checked, the rows
are read, cut into blocks, conditioned and written as Parquet by Ray Data, on a local cluster. Tokenisation, which the
run adds to the same pass, is left out unless --tokenise names a model. Writes benchmarks/results/conditioning.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

RESULT = Path("benchmarks/results/conditioning.json")
ROWS_PER_FILE = 50_000


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and driver memory of conditioning.")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--strategy", default="random_context")
    parser.add_argument("--block-size", type=int, default=1000)
    parser.add_argument("--tokenise", help="path of a model whose tokenizer renders the prompts too")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a size's own process
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.rows[0], options.strategy, options.block_size, options.tokenise)))
        return
    results = []
    for rows in options.rows:
        command = [sys.executable, "-m", "benchmarks.conditioning", "--one", "--rows", str(rows)]
        command += ["--strategy", options.strategy, "--block-size", str(options.block_size)]
        command += ["--tokenise", options.tokenise] if options.tokenise else []
        finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(finished.stdout.splitlines()[-1]))
        print(results[-1], flush=True)
    RESULT.write_text(json.dumps({"machine": describe_machine(), "results": results}, indent=2) + "\n")


def measure(rows: int, strategy: str, block_size: int, tokenise: str | None) -> dict[str, Any]:
    """Checks, reads, conditions and writes `rows` prompts; times in seconds, memory of this process in MiB."""
    import pyarrow.fs
    import ray

    from mipo_ray.conditioning.blocks import condition_block, rows_per_block
    from mipo_ray.conditioning.needs import check_training_prompts
    from mipo_ray.config.recipe import load_config
    from mipo_ray.generation.requests import add_requests
    from mipo_ray.prompts.dataset import blocks_of, read_prompts
    from mipo_ray.ray_cluster.blocks import map_blocks, ordered_context
    from mipo_ray.ray_cluster.tables import read_rows

    with tempfile.TemporaryDirectory() as scratch:
        _write_prompts(Path(scratch), rows)
        overrides = [f"prompts.path={scratch}/*.jsonl", f"conditioning.strategy={strategy}"]
        config = load_config(None, [*overrides, f"conditioning.block_size={block_size}"])
        ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        before = _peak_mebibytes()

        started = time.perf_counter()
        summary = check_training_prompts(config)
        checked = time.perf_counter()
        with ordered_context():
            dataset = blocks_of(read_prompts(config.prompts, summary), rows_per_block(rows, block_size))
            dataset = map_blocks(
                dataset,
                condition_block,
                conditioning=config.conditioning,
                prompts=config.prompts,
                seed=0,
                round_index=0,
            )
            if tokenise:
                dataset = map_blocks(dataset, add_requests, config=config, policy=tokenise, round_index=0)
            dataset.write_parquet(f"{scratch}/conditioned")
        finished = time.perf_counter()

        written = read_rows(f"{scratch}/conditioned", pyarrow.fs.LocalFileSystem(), ["prompt_id"]).count()
        if written != rows:
            raise RuntimeError(f"expected {rows} conditioned rows, found {written}")
        return {
            "rows": rows,
            "strategy": strategy,
            "rows_per_block": rows_per_block(rows, block_size),
            "tokenised": tokenise is not None,
            "check_seconds": round(checked - started, 2),
            "condition_seconds": round(finished - checked, 2),
            "microseconds_per_row": round(1e6 * (finished - started) / rows, 1),
            "driver_peak_mebibytes": round(_peak_mebibytes()),
            "driver_mebibytes_before": round(before),
        }


def _write_prompts(directory: Path, rows: int) -> None:
    """Users with ten questions each, of lengths as in the bundled prompts."""
    for start in range(0, rows, ROWS_PER_FILE):
        with (directory / f"prompts-{start:09d}.jsonl").open("w", encoding="utf-8") as file:
            for row in range(start, min(rows, start + ROWS_PER_FILE)):
                user = row // 10
                prompt = {
                    "prompt_id": f"row-{row}",
                    "prompt": f"What should I know about matter number {row % 9973} before next weekend?",
                    "context": f"I am worker number {user} in town {user % 613}, I cook for {user % 7} and I cannot "
                    f"eat dish {user % 89}. I live beside river {user % 31}.",
                    "group": f"user-{user}",
                }
                file.write(json.dumps(prompt) + "\n")


def _peak_mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
