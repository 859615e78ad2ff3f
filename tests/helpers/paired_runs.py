"""Run directories that hold finished pairs of texts, for what hands a run's pairs on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet

from mipo_ray.config.recipe import load_config
from mipo_ray.pairs.schema import write_form
from mipo_ray.storage.configuration import record_config
from mipo_ray.storage.pair_statistics import PairStatistics
from mipo_ray.storage.run_directory import RunDirectory, open_run
from tests.helpers.stages import commit

PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What grows in “März”?"}]


def make_pair(number: int, rejected: Sequence[str] = ("No.",), **columns: Any) -> dict[str, Any]:
    """A pair in the form of version 2 with `rejected`; `columns` replaces others of its columns."""
    return {
        "pair_id": f"{number:016x}",
        "prompt_id": f"prompt-{number}",
        "messages": PROMPT,
        "mismatched_messages": [PROMPT[:1]] * len(rejected),
        "context": "",
        "strategy": "random_prompt",
        "mismatched_prompt_id": ["other"] * len(rejected),
        "prompt_token_ids": [1, 2],
        "mismatched_prompt_token_ids": [[1]] * len(rejected),
        "chosen_token_ids": [3, 4],
        "rejected_token_ids": [[5]] * len(rejected),
        "chosen": f"Answer {number}.",
        "rejected": list(rejected),
        "chosen_finish_reason": "stop",
        "rejected_finish_reason": ["stop"] * len(rejected),
        "chosen_logprob": -1.0,
        "rejected_logprob": [-2.0] * len(rejected),
        "round": 0,
        "sample": 0,
        "dropped": "",
        "extra": "{}",
    } | columns


def make_run(directory: Path, rounds: Sequence[Sequence[dict[str, Any]]], *overrides: str) -> RunDirectory:
    """A run whose rounds have these pairs, a file for every two of them, under the defaults and `overrides`."""
    config = load_config(None, [f"run_dir={directory}", f"rounds={max(1, len(rounds))}", *overrides])
    run = open_run(str(directory))
    record_config(run, config)
    for number, pairs in enumerate(rounds):
        stage = f"rounds/{number:03d}/generate"
        place = directory / stage
        place.mkdir(parents=True)
        names = []
        for start in range(0, len(pairs), 2):
            names.append(f"{start:06d}.parquet")
            part = list(pairs[start : start + 2])
            most = max(len(pair["rejected"]) for pair in pairs)
            pyarrow.parquet.write_table(write_form(part, most), place / names[-1])
        dropped: dict[str, int] = {}
        for pair in pairs:
            if pair["dropped"]:
                dropped[pair["dropped"]] = dropped.get(pair["dropped"], 0) + 1
        kept = len(pairs) - sum(dropped.values())
        statistics = PairStatistics(rows=len(pairs), kept=kept, dropped=dropped)
        commit(run, stage, config, pairs=names, statistics=statistics)
    return run
