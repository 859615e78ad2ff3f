"""The command that hands a run's preference pairs to other tools.

    python -m mipo_ray.pairs export RUN --format trl --output DIR       a file for each round, and a data card
    python -m mipo_ray.pairs export RUN --format axolotl --output DIR --round 1
    python -m mipo_ray.pairs export s3://bucket/run --format parquet --output DIR    with token ids and log-probs

RUN is a run directory whose pairs are all generated, of one round at least; DIR is empty or not there yet. Nothing is
sampled, and nothing in RUN is changed. Exit codes are those of mipo_ray.run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mipo_ray.command import run_command
from mipo_ray.pairs.card import write_card
from mipo_ray.pairs.export import CARD, write_pairs
from mipo_ray.pairs.formats import FORMATS
from mipo_ray.storage.run_directory import open_run
from mipo_ray.terminal import say


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = _parse(arguments)

    def work() -> int:
        run = open_run(options.run)
        export = write_pairs(run, options.format, options.output, options.rounds)
        write_card(export, run, options.output)
        for each in export.rounds:
            say(f"{options.output / each.file}: {each.rows} rows of {each.pairs} pairs")
        say(f"{options.output / CARD}: the data card")
        return 0

    return run_command(work, resumes=False)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mipo_ray.pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="export")
    export = commands.add_parser("export", help="write a run's pairs in the form of another tool")
    export.add_argument("run", metavar="RUN", help="run directory: a local path or a URL")
    export.add_argument("--format", required=True, choices=FORMATS, help="whose form")
    export.add_argument("--output", required=True, type=Path, metavar="DIR", help="directory to write to")
    export.add_argument(
        "--round",
        dest="rounds",
        action="append",
        default=[],
        type=int,
        metavar="N",
        help="only this round, from 0; may be given several times (default: every finished one)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
