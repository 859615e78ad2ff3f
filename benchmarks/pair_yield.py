"""How many of the prompts give a pair, on three sets, where cut answers are dropped and where they are trimmed.

    python -m benchmarks.pair_yield [--prompts 48] [--recipe RECIPE] [--output OUTPUT] [key=value ...]

Runs the generate stage of a recipe (the demo's) once for each set and each value of `filters.truncated`, with the same
seeds, so that drop and trim see the same answers. The filters are the recipe's. The sets:

- bundled: the first rows that the demo reads;
- statements: users of two or three statements of different traits (persona_statements) that such a user would make;
- personas: users that are texts of personas.

The last two are drawn by a seed, each user with two questions: an instruction of self_instruct and an opening prompt of
PRISM. They are read from ../shared/data, and nothing of them is kept. Nothing is left out beforehand for its length: a
prompt beyond the window counts as one without a pair. Writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine
from mipo_ray.config.recipe import load_config
from mipo_ray.evaluation.significance import wilson
from mipo_ray.run import DEMO_RECIPE
from mipo_ray.storage.run_directory import RunDirectory, open_run
from mipo_ray.tables.parquet import open_table

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
SETTINGS = ("drop", "trim")
SEED = 0
MOST_PROMPTS = 230  # there are 115 opening prompts
STAGE = "rounds/000/generate"
FIXED = ["rounds=1", "filters.max_dropped_share=1.0", "filters.drop_too_long=true", "evaluate.enabled=false"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Prompts that give a pair, with cut answers dropped and trimmed.")
    parser.add_argument("--prompts", type=int, default=48, help="of each set, an even number")
    parser.add_argument("--recipe", default=DEMO_RECIPE, help="whose settings and filters hold")
    parser.add_argument("--output", default="benchmarks/results/pair_yield", help="without suffix")
    parser.add_argument("overrides", nargs="*", help="configuration overrides, key=value")
    options = parser.parse_args()
    if not SHARED_DATA.is_dir():
        parser.error(f"no data sets at {SHARED_DATA}")
    if options.prompts % 2 or not 0 < options.prompts <= MOST_PROMPTS:
        parser.error(f"--prompts: expected an even number up to {MOST_PROMPTS}, found {options.prompts}")

    import ray

    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as scratch:
        paths = {"bundled": "bundled:personalization"}
        for name, users in {"statements": statement_users, "personas": persona_users}.items():
            paths[name] = f"{scratch}/{name}.jsonl"
            rows = with_questions(users(options.prompts // 2))
            Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        overrides = [*FIXED, f"prompts.limit={options.prompts}", *options.overrides]
        sets = measure(options.recipe, overrides, paths, Path(scratch))
    ray.shutdown()
    recipe = "the demo's" if options.recipe == DEMO_RECIPE else options.recipe
    result = {"machine": describe_machine(), "recipe": recipe, "settings": overrides, "sets": sets}
    Path(f"{options.output}.json").write_text(json.dumps(result, indent=2) + "\n")
    Path(f"{options.output}.md").write_text(_markdown(result))


def statement_users(count: int) -> list[str]:
    """Users of two or three statements that each would make, of as many traits."""
    by_trait: dict[str, list[str]] = defaultdict(list)
    for row in _lines("persona_statements/statements.jsonl"):
        if row["holds"]:
            by_trait[row["trait"]].append(row["statement"].rstrip("."))
    draw = np.random.default_rng(SEED)
    users = []
    for _ in range(count):
        traits = draw.choice(sorted(by_trait), draw.integers(2, 4), replace=False)
        users.append(" ".join(f"{draw.choice(by_trait[trait])}." for trait in traits))
    return users


def persona_users(count: int) -> list[str]:
    """Users that are texts of personas."""
    with (SHARED_DATA / "personas/prompts.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["prompt"] for row in csv.DictReader(file)]
    return np.random.default_rng(SEED).permutation(texts)[:count].tolist()


def with_questions(users: list[str]) -> list[dict[str, str]]:
    """Prompt rows: each user with an instruction and an opening prompt, no question twice."""
    draw = np.random.default_rng(SEED + 1)
    instructions = [row["prompt"] for row in _lines("self_instruct/self_instruct_seed_prompts.jsonl")]
    openings = [row["prompt"] for row in _lines("prism_openings/prism_opening_prompts_115.jsonl")]
    drawn = zip(draw.permutation(instructions).tolist(), draw.permutation(openings).tolist(), strict=False)
    return [
        {"prompt_id": f"{user}-{number}", "prompt": question, "context": text, "group": f"user-{user}"}
        for user, (text, questions) in enumerate(zip(users, drawn, strict=False))
        for number, question in enumerate(questions)
    ]


def _lines(name: str) -> Iterator[dict[str, Any]]:
    for line in (SHARED_DATA / name).read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def measure(recipe: str, overrides: list[str], paths: dict[str, str], scratch: Path) -> dict[str, Any]:
    """The figures of every set and setting, all sampled by one engine."""
    from mipo_ray.conditioning.needs import check_training_prompts
    from mipo_ray.generation.living_engine import engines_of_run
    from mipo_ray.generation.requests import TooManyDroppedError
    from mipo_ray.generation.stage import generate_pairs
    from mipo_ray.monitoring.events import start
    from mipo_ray.ray_cluster.resources import resolve
    from mipo_ray.session import Session
    from mipo_ray.storage.rounds import Round

    first = load_config(recipe, overrides)
    resources = resolve(first, {"CPU": 6, "GPU": 0})
    measured: dict[str, Any] = {name: {} for name in paths}
    with engines_of_run(first, resources, 1) as engines:
        for name, path in paths.items():
            for setting in SETTINGS:
                config = load_config(
                    recipe,
                    [
                        *overrides,
                        f"prompts.path={path}",
                        f"filters.truncated={setting}",
                        f"run_dir={scratch}/runs/{name}/{setting}",
                    ],
                )
                run = open_run(config.run_dir)
                session = Session(config, run, resources, start(run), engines)
                began = time.monotonic()
                try:
                    generate_pairs(session.stage(Round(0), "generate"), check_training_prompts(config))
                except TooManyDroppedError as error:  # not one pair: the rows are written, and counted below
                    print(f"{name}, {setting}: {error}", flush=True)
                measured[name][setting] = {**figures(run), "seconds": round(time.monotonic() - began, 1)}
                print(_line(name, setting, measured[name][setting]), flush=True)
    return measured


def figures(run: RunDirectory) -> dict[str, Any]:
    """What became of the prompts, from the pairs as they are written."""
    files = [run.path(STAGE, name) for name in run.list_parquet(STAGE)]
    rows = open_table(files, run.arrow_filesystem()).to_table().to_pylist()
    kept = [row for row in rows if not row["dropped"]]
    prompts, with_pair = {row["prompt_id"] for row in rows}, {row["prompt_id"] for row in kept}
    share = wilson(len(with_pair), len(prompts))
    finished = [row[f"{side}_finish_reason"] for row in rows for side in ("chosen", "rejected")]
    sampled = [reason for reason in finished if reason]
    lengths = [len(row[f"{side}_token_ids"]) for row in kept for side in ("chosen", "rejected")]
    pmi = [row["pmi"] for row in kept if row["pmi"] is not None]
    return {
        "prompts": len(prompts),
        "prompts_with_a_pair": len(with_pair),
        "share": {"value": share.value, "low": share.low, "high": share.high},
        "dropped": dict(Counter(row["dropped"] for row in rows if row["dropped"]).most_common()),
        "answers_cut_by_the_limit": sampled.count("length") / max(1, len(sampled)),
        "trimmed_responses_of_pairs": sum(row.get("trimmed_responses") or 0 for row in kept),
        "mean_tokens_of_pairs": sum(lengths) / max(1, len(lengths)),
        "mean_pmi_of_pairs": sum(pmi) / len(pmi) if pmi else None,
    }


def _line(name: str, setting: str, found: dict[str, Any]) -> str:
    share, pmi = found["share"], found["mean_pmi_of_pairs"]
    reasons = ", ".join(f"{reason} {count}" for reason, count in found["dropped"].items())
    return (
        f"| {name} | `{setting}` | {found['prompts_with_a_pair']} of {found['prompts']} | {share['value']:.2f} "
        f"[{share['low']:.2f}, {share['high']:.2f}] | {found['answers_cut_by_the_limit']:.2f} | "
        f"{found['trimmed_responses_of_pairs']} | {found['mean_tokens_of_pairs']:.1f} | "
        f"{'' if pmi is None else f'{pmi:.1f}'} | {reasons} | {found['seconds']:.0f} |"
    )


def _markdown(result: dict[str, Any]) -> str:
    lines = [
        "| prompts | `filters.truncated` | with a pair | share [95 %] | answers cut by the limit | trimmed answers of "
        "pairs | tokens of an answer of a pair | PMI, nats | dropped | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(
            _line(name, setting, found)
            for name, settings in result["sets"].items()
            for setting, found in settings.items()
        ),
        "",
        f"{result['machine']}; the recipe is {result['recipe']}, with {', '.join(result['settings'])}. Intervals are "
        "Wilson's, which take prompts as independent.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
