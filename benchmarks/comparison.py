"""Puts the table of a comparison that was run into benchmarks/results, with what it was made by. Trains nothing.

    python -m mipo_ray.compare jobs/compare/personalization.yaml
    python -m benchmarks.comparison jobs/compare/personalization.yaml [key=value ...] --commit HASH [--note TEXT]

The recipe and overrides are those of the run; --commit names the code that trained and measured. Results:
benchmarks/results/compare.json and compare.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from benchmarks.machine import describe_machine
from mipo_ray.comparison.definition import load_comparison
from mipo_ray.comparison.outcome import gather
from mipo_ray.comparison.tables import markdown

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparison")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--commit", required=True, help="of the code that trained and measured")
    parser.add_argument("--note", default="", help="what else a reader must know of the run")
    options = parser.parse_intermixed_args()
    found = gather(load_comparison(options.recipe, options.overrides))
    seconds = sum(sum(arm["seconds"].values()) for arm in found["arms"].values())
    made_by = {
        "recipe": options.recipe,
        "overrides": options.overrides,
        "commit": options.commit,
        "machine": describe_machine(),
        "stage_seconds": round(seconds),
        "note": options.note,
    }
    arguments = shlex.join([options.recipe, *options.overrides])
    foot = (
        f"`python -m mipo_ray.compare {arguments}` at commit {options.commit}, {seconds / 60:.0f} minutes in the "
        f"stages of the arms above. {made_by['machine']}. {options.note}".rstrip()
    )
    (RESULTS / "compare.json").write_text(json.dumps({"made_by": made_by, **found}, indent=1) + "\n")
    (RESULTS / "compare.md").write_text(f"{markdown(found)}\n{foot}\n")
    print(markdown(found))


if __name__ == "__main__":
    main()
