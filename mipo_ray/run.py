"""The command: parse, plan, connect to Ray, run the rounds, exit code.

    python -m mipo_ray.run [key=value ...]                            the demo: mipo_ray/examples/demo.yaml
    python -m mipo_ray.run jobs/NAME.yaml train.beta=0.2 rounds=3     a recipe with overrides
    python -m mipo_ray.run pairs.path=FILE model.path=NAME            on preference pairs that exist
    python -m mipo_ray.run --dry-run jobs/NAME.yaml                   check everything and print the plan
    python -m mipo_ray.run --dry-run --tokens jobs/NAME.yaml          count the tokens of every long prompt, too
    python -m mipo_ray.run --trust-recipe jobs/NAME.yaml              one that may run code (docs/security.md)
    python -m mipo_ray.run --full run_dir=runs/mine                   end with the table of every measure
    python -m mipo_ray.run --quiet | --json ...                       errors and the end alone; JSON for machines
    ray job submit -- python -m mipo_ray.run run_dir=s3://...         on a cluster

Exit codes: 0 finished, 1 failed, 2 something to mend in the configuration, the input or the cluster, 130 stopped by
Ctrl-C, 143 stopped by SIGTERM (`ray job stop`, Kubernetes). The same command resumes a run that failed or was stopped.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mipo_ray.command import parse_recipe, run_command
from mipo_ray.config.recipe import fields, load_config
from mipo_ray.config.schema import Config
from mipo_ray.monitoring.display import said_as, shown, tell
from mipo_ray.planning.describe import describe
from mipo_ray.planning.plan import Inputs, check_inputs, make_plan
from mipo_ray.planning.token_counts import TOKENS_HELP
from mipo_ray.ray_cluster.connection import connect, connected_work, nodes_for_dry_run, unbounded_node
from mipo_ray.storage.configuration import record_config
from mipo_ray.storage.lock import hold_lock
from mipo_ray.storage.run_directory import RunDirectory, open_run
from mipo_ray.storage.verdicts import last_good
from mipo_ray.terminal import say

DEMO_RECIPE = str(Path(__file__).parent / "examples" / "demo.yaml")
PAIRS_RECIPE = str(Path(__file__).parent / "examples" / "preferences.yaml")  # the same, where pairs exist


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = _parse(arguments)

    def work() -> int:
        config = load_config(options.recipe, options.overrides, trusts_recipe=options.trust_recipe)
        run = open_run(config.run_dir)
        if options.dry_run:
            return _dry_run(config, run, count_all=options.tokens)
        run.check_writable()
        with hold_lock(run):
            started = time.monotonic()
            inputs = check_inputs(config, run, count_all=options.tokens)
            here, is_local = unbounded_node(config)
            make_plan(inputs, [here], are_all=is_local)  # what this machine alone refuses costs no cluster
            if inputs.is_finished:
                _say_end(inputs, f"{run.url}: finished before, nothing to do", full=options.full)
                return 0
            with shown(run, options.display):
                plan = make_plan(inputs, connect(config))
                record_config(run, plan.config)
                say(describe(plan))

                from mipo_ray.loop import run_rounds
                from mipo_ray.monitoring.failure_logs import kept_logs

                with connected_work(), kept_logs(run):
                    run_rounds(plan)
            minutes = (time.monotonic() - started) / 60
            is_stopped = len(plan.rounds) < config.rounds
            why = f", stopped by the guard after {plan.rounds[-1].label}" if is_stopped else ""
            _say_end(plan, f"finished in {minutes:.1f} minutes{why}; results and report: {run.url}", full=options.full)
        return 0

    def as_asked() -> int:
        with said_as(options.display):
            return work()

    return run_command(as_asked, resumes=not options.dry_run)


def _dry_run(config: Config, run: RunDirectory, *, count_all: bool) -> int:
    inputs = check_inputs(config, run, count_all=count_all)
    plan = make_plan(inputs, nodes_for_dry_run(config))
    say(describe(plan))
    say("finished: nothing to do" if plan.is_finished else "dry run: nothing was started")
    return 0


def _say_end(inputs: Inputs, last: str, *, full: bool) -> None:
    """Says what the run reached; for machines, too."""
    from mipo_ray.evaluation.summary import closing_text, closing_values, found_bad

    run = inputs.run
    text = closing_text(run, full=full)
    event = {
        "event": "end",
        "run_dir": run.url,
        "policy": last_good(run, inputs.rounds[-1]).key,
        "bad_rounds": {round.key: why for round, why in found_bad(run).items()},
        "findings": closing_values(run),
        "text": last,
    }
    tell(event, "\n".join([*([text, ""] if text else []), last]))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mipo_ray.run",
        description="Improve a language model with preference pairs from its own answers (MIPO).",
        epilog=_field_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", action="store_true", help=TOKENS_HELP)
    parser.add_argument("--full", action="store_true", help="end with the table of every measure")
    options = parse_recipe(parser, arguments, default=DEMO_RECIPE)
    if options.recipe == DEMO_RECIPE and any(override.startswith("pairs.path=") for override in options.overrides):
        options.recipe = PAIRS_RECIPE
    return options


def _field_help() -> str:
    lines = [
        "Without a recipe the demo runs, mipo_ray/examples/demo.yaml; with pairs.path preferences.yaml beside it. "
        "Fields (key = default: meaning):"
    ]
    defaults = Config()
    for path, info in fields():
        # Of the whole configuration: a section may be given other defaults than its class (evaluate.prompts).
        default = functools.reduce(getattr, path.split("."), defaults)
        shown = "null" if default is None else str(default).replace("\n", "\\n")
        lines.append(f"  {path} = {shown}: {info.description}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
