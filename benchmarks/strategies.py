"""What each conditioning strategy makes of the same prompts: PMI, lengths and cost of its pairs, with intervals.

    python -m benchmarks.strategies [--output benchmarks/results/strategies] [key=value ...]

Runs the generate stage once for each strategy, over the same prompts with the same seed (matched responses have the
same seeds everywhere), and writes OUTPUT.json and OUTPUT.md. The defaults take about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks.machine import describe_machine
from mipo_ray.config.conditioning import SingleStrategy
from mipo_ray.config.recipe import load_config
from mipo_ray.config.schema import Config
from mipo_ray.evaluation.intervals import bootstrap_mean
from mipo_ray.evaluation.resampling import Clusters
from mipo_ray.prompts.clusters import question_of, user_of
from mipo_ray.storage.run_directory import open_run
from mipo_ray.tables.parquet import open_table

BOOTSTRAP_SAMPLES = 10_000
QUANTILES = (5, 25, 50, 75, 95)
DEFAULTS = [
    "prompts.path=bundled:personalization",
    "prompts.system=Answer in one short sentence.",
    "prompts.limit=96",
    "generation.sampling.max_tokens=48",
    "filters.max_dropped_share=1.0",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="PMI and cost of each conditioning strategy's pairs.")
    parser.add_argument("--output", default="benchmarks/results/strategies", help="without suffix")
    parser.add_argument("overrides", nargs="*", help="configuration overrides, key=value")
    options = parser.parse_args()
    if any(override.startswith(("generation.samples", "generation.negatives")) for override in options.overrides):
        parser.error("one matched and one mismatched response of each prompt are compared")

    import ray

    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False)
    measured = {}
    with tempfile.TemporaryDirectory() as scratch:
        for strategy in get_args(SingleStrategy):
            overrides = [
                *DEFAULTS,
                *options.overrides,
                f"conditioning.strategy={strategy}",
                f"run_dir={scratch}/{strategy}",
            ]
            measured[strategy] = measure(load_config(None, overrides))
            print(_line(strategy, measured[strategy]), flush=True)
    ray.shutdown()
    result = {"machine": describe_machine(), "settings": [*DEFAULTS, *options.overrides], "strategies": measured}
    Path(f"{options.output}.json").write_text(json.dumps(result, indent=2) + "\n")
    Path(f"{options.output}.md").write_text(_markdown(result))


def measure(config: Config) -> dict[str, Any]:
    """Generates one round's pairs and returns their PMI (nats per response, and per token), lengths and cost."""
    from mipo_ray.conditioning.needs import check_training_prompts
    from mipo_ray.evaluation.judge.rows import held_out_rows
    from mipo_ray.generation.stage import generate_pairs
    from mipo_ray.monitoring.events import start
    from mipo_ray.ray_cluster.resources import resolve
    from mipo_ray.session import Session
    from mipo_ray.storage.rounds import Round

    run = open_run(config.run_dir)
    session = Session(config, run, resolve(config, {"CPU": 6, "GPU": 0}), start(run))
    prompts = check_training_prompts(config)
    facts = generate_pairs(session.stage(Round(0), "generate"), prompts)
    rows = held_out_rows(config.prompts, prompts).items()
    clusters = Clusters({name: user_of(row) for name, row in rows}, {name: question_of(row) for name, row in rows})
    files = [run.path("rounds/000/generate", name) for name in facts.pairs]
    pairs = [row for row in open_table(files, run.arrow_filesystem()).to_table().to_pylist() if not row["dropped"]]
    prompt_ids = [pair["prompt_id"] for pair in pairs]
    pmi = np.asarray([pair["pmi"] for pair in pairs])
    chosen = np.asarray([len(pair["chosen_token_ids"]) for pair in pairs])
    rejected = np.asarray([len(pair["rejected_token_ids"]) for pair in pairs])
    statistics = facts.statistics
    return {
        "rows": statistics.rows,
        "pairs": len(pairs),
        "dropped": statistics.dropped,
        "pmi": _estimate(pmi, prompt_ids, clusters),
        "pmi_per_token": _estimate(pmi / chosen, prompt_ids, clusters),
        "pmi_quantiles": dict(zip(map(str, QUANTILES), np.percentile(pmi, QUANTILES).tolist(), strict=True)),
        "pmi_standard_deviation": float(pmi.std(ddof=1)),
        "pmi_below_zero": _estimate(pmi < 0, prompt_ids, clusters, bounds=(0.0, 1.0)),
        "chosen_minus_rejected_tokens": _estimate(chosen - rejected, prompt_ids, clusters),
        "generated_tokens": statistics.generated_tokens,
        "generated_tokens_per_pair": statistics.generated_tokens_per_pair,
        "prefix_cache_hit_rate": statistics.prefix_cache_hit_rate,
        # Not a number of the table: whether two strategies share the same distribution can be tested from it.
        "pmi_values": {pair["prompt_id"]: round(float(pair["pmi"]), 3) for pair in pairs},
    }


def _estimate(
    values: Any, prompt_ids: list[str], clusters: Clusters, bounds: tuple[float, float] | None = None
) -> dict[str, float]:
    draw: Any = {"samples": BOOTSTRAP_SAMPLES, "seed": 0, "clusters": clusters}
    estimate = bootstrap_mean(np.asarray(values, dtype=float), prompt_ids, **draw).within(bounds)
    return {"mean": estimate.value, "low": estimate.low, "high": estimate.high}


def _line(strategy: str, figures: dict[str, Any]) -> str:
    quantiles = " / ".join(f"{figures['pmi_quantiles'][name]:.1f}" for name in ("5", "50", "95"))
    return (
        f"| `{strategy}` | {figures['pairs']} of {figures['rows']} | {_shown(figures['pmi'], 1)} | "
        f"{quantiles} | "
        f"{_shown(figures['pmi_per_token'], 2)} | {_shown(figures['pmi_below_zero'], 2)} | "
        f"{_shown(figures['chosen_minus_rejected_tokens'], 1)} | {figures['generated_tokens']:,} |"
    )


def _shown(estimate: dict[str, float], digits: int) -> str:
    return f"{estimate['mean']:.{digits}f} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def _markdown(result: dict[str, Any]) -> str:
    lines = [
        "| strategy | pairs of prompts | PMI, nats/response [95 %] | 5 / 50 / 95 % | PMI, nats/token | share below 0 | "
        "chosen - rejected tokens | tokens generated |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(strategy, figures) for strategy, figures in result["strategies"].items()),
        "",
        f"{result['machine']}; settings: {', '.join(result['settings'])}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
