"""What every command of this package does around its work: it reads its command line, and mistakes and stops become a
line and an exit code."""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Callable, Collection, Sequence

from mipo_ray.config.recipe import split_arguments
from mipo_ray.config.trust import FLAG, FLAG_HELP
from mipo_ray.errors import UserError
from mipo_ray.stop_signals import stop_signals
from mipo_ray.terminal import guard_tracebacks, guarded_streams, say_error


def run_command(work: Callable[[], int], *, resumes: bool) -> int:
    """Runs a command's work and returns its exit code, or 2 for a UserError, 130 for Ctrl-C, 143 for SIGTERM.

    `resumes`: whether the same command goes on where it was stopped, which its last line then says.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that a terminal cannot show must not end a run
            stream.reconfigure(errors="backslashreplace")
    guard_tracebacks()
    with guarded_streams(), stop_signals() as signals:
        try:
            return work()
        except UserError as error:
            say_error(f"error: {error}")
            return 2
        except (KeyboardInterrupt, SystemExit) as error:
            if signals.received is None and getattr(error, "code", None) != signal.SIGTERM:
                raise
            # While it starts, Ray turns SIGTERM into its number as exit code.
            number = signals.received or signal.SIGTERM
            hint = ": the same command resumes this run" if resumes else ""
            say_error(f"stopped by {number.name}{hint}")
            return 128 + number


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what every command with a recipe knows: `--dry-run`, the word for one that may run code, and `--quiet` or
    `--json`. The namespace has dry_run, trust_recipe and display ("auto", "quiet" or "json")."""
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument(FLAG, action="store_true", help=FLAG_HELP)
    parser.set_defaults(display="auto")
    choice = parser.add_mutually_exclusive_group()
    for name, meaning in (
        ("quiet", "print errors and the end alone"),
        ("json", "print one JSON object on each line, for machines"),
    ):
        choice.add_argument(f"--{name}", dest="display", action="store_const", const=name, help=meaning)


def parse_recipe(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    default: str | None = None,
    more_keys: Collection[str] = (),
) -> argparse.Namespace:
    """Reads `[--dry-run] [--quiet | --json] [RECIPE.yaml] [key=value ...]` in any order: the namespace has dry_run,
    trust_recipe, display, recipe and overrides.

    default: the recipe where none is named; None: one must be. more_keys: keys of the recipe beside those of the
    configuration. Ends the process with code 2 for another number of recipes.
    """
    recipe, number = ("RECIPE.yaml", "+") if default is None else ("[RECIPE.yaml]", "*")
    parser.add_argument("arguments", nargs=number, metavar=f"{recipe} [key=value ...]", help="recipe and overrides")
    add_options(parser)
    options = parser.parse_intermixed_args(arguments)
    recipes, options.overrides = split_arguments(options.arguments, more_keys)
    if not recipes and default is not None:
        recipes = [default]
    if len(recipes) != 1:
        parser.error(f"expected one recipe, found {', '.join(recipes) or 'none'}")
    options.recipe = recipes[0]
    return options
