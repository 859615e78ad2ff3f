"""Runs of the tiny model whose pairs a reward chooses: their prompts and their options."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.runs import write_prompts

ROWS = 12


def options(address: str, model: Path, folder: Path, *more: str) -> tuple[str, ...]:
    return (
        f"ray.address={address}",
        f"run_dir={folder}/run",
        f"model.path={model}",
        "model.max_model_len=256",
        "rounds=1",
        f"prompts.path={folder}/prompts.jsonl",
        "conditioning.block_size=8",
        "generation.sampling.max_tokens=16",
        "generation.sampling.temperature=1.0",
        "filters.max_dropped_share=1",
        "filters.truncated=keep",
        "train.learning_rate=1e-3",
        "evaluate.enabled=false",
        *more,
    )


def write_rows(folder: Path) -> None:
    write_prompts(folder / "prompts.jsonl", "reward", ROWS)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "favourite": "ae"[index % 2]}) for index, row in enumerate(rows)]
    (folder / "prompts.jsonl").write_text("".join(f"{line}\n" for line in lines))
