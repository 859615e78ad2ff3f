"""The command: parse, plan, connect to Ray, run the rounds, exit code.

    python -m mipo_ray.run [key=value ...]                            the demo: mipo_ray/examples/demo.yaml
    python -m mipo_ray.run jobs/NAME.yaml train.beta=0.2 rounds=3     a recipe with overrides
    python -m mipo_ray.run --dry-run jobs/NAME.yaml                   check everything and print the plan
    ray job submit -- python -m mipo_ray.run run_dir=s3://...         on a cluster

Exit codes: 0 finished, 1 failed, 2 something to mend in the configuration, the input or the cluster, 130 stopped by
Ctrl-C, 143 stopped by SIGTERM (`ray job stop`, Kubernetes). The same command resumes a run that failed or was stopped.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mipo_ray import run_lock
from mipo_ray.config import Config
from mipo_ray.errors import UserError
from mipo_ray.plan import Plan, describe, make_plan
from mipo_ray.recipe import fields, load_config
from mipo_ray.resources import Node, NodeType, ResourceError, local_cpus, total
from mipo_ray.stop_signals import StopSignals, stop_signals
from mipo_ray.storage import open_run

DEMO_RECIPE = str(Path(__file__).parent / "examples" / "demo.yaml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = _parse(arguments)
    with stop_signals() as signals:
        try:
            config = load_config(options.recipe, options.overrides)
            return _dry_run(config) if options.dry_run else _run(config, signals)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (KeyboardInterrupt, SystemExit) as error:
            if signals.received is None and getattr(error, "code", None) != signal.SIGTERM:
                raise
            # While it starts, Ray turns SIGTERM into its number as exit code.
            number = signals.received or signal.SIGTERM
            resume = "" if options.dry_run else ": the same command resumes this run"
            print(f"stopped by {number.name}{resume}", file=sys.stderr, flush=True)
            return 128 + number


def _dry_run(config: Config) -> int:
    run = open_run(config.run_dir)
    if _address(config) is None:
        nodes, types = [Node({"CPU": float(local_cpus(config)), "GPU": _local_gpus()})], None
    else:
        nodes, types = _connect(config)
    plan = make_plan(config, run, total(nodes), nodes, types)
    print(describe(plan))
    print("finished: nothing to do" if plan.is_finished else "dry run: nothing was started")
    return 0


def _run(config: Config, signals: StopSignals) -> int:
    run = open_run(config.run_dir)
    run.check_writable()
    with run_lock.hold(run):
        started = time.monotonic()
        # A first plan from what this machine knows, so that most mistakes are told before Ray starts.
        is_local = _address(config) is None
        here = Node({"CPU": float(local_cpus(config)) if is_local else float("inf"), "GPU": float("inf")})
        plan = make_plan(config, run, here.resources, [here] if is_local else None)
        if plan.is_finished:
            return _finished(plan)
        nodes, types = _connect(config)
        signals.listen()
        plan = make_plan(config, run, total(nodes), nodes, types)
        run.record_config(config)
        print(describe(plan), flush=True)

        import ray

        from mipo_ray.loop import run_rounds

        try:
            run_rounds(config, run, plan.resources)
        except ray.exceptions.RayError as error:
            if (cause := _user_error(error)) is not None:
                raise cause from None
            raise
        finally:
            ray.shutdown()
        minutes = (time.monotonic() - started) / 60
        print(f"finished in {minutes:.1f} minutes; results and report: {run.url}")
    return 0


def _finished(plan: Plan) -> int:
    from mipo_ray.evaluation.results import final_table
    from mipo_ray.run_report import read_results

    print(f"{plan.run.url}: finished before, nothing to do")
    if plan.config.evaluate.enabled:
        print(final_table(read_results(plan.run)))
    return 0


def _connect(config: Config) -> tuple[list[Node], list[NodeType] | None]:
    """Joins or starts a Ray cluster; returns its nodes and, where they are known, its autoscaler's node types."""
    import ray
    import ray.data

    from mipo_ray.cluster import node_types, present_nodes

    address = _address(config)
    quiet = ray.LoggingConfig(log_level="WARNING")
    if address is None:
        ray.init(
            address="local",
            num_cpus=local_cpus(config),
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            logging_level=logging.WARNING,
            logging_config=quiet,
        )
    else:
        try:
            ray.init(address=address, logging_level=logging.WARNING, logging_config=quiet)
        except (ConnectionError, ValueError) as error:  # nobody answers; no address
            raise ResourceError(f"ray.address {address!r}: cannot join this cluster: {error}") from None
    # The stages show their own progress; Ray Data's would repeat every operator of every small pass.
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A UserError in a task must reach `_user_error` as what it is, and not wrapped as a failed transformation.
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # At every pass over Parquet files Ray Data makes actors that read footers, by default 32. Each is a process to
    # start and asks for a CPU, for which an autoscaler would start nodes; one reads 128 footers at a time.
    os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
    return present_nodes(), node_types()


def _address(config: Config) -> str | None:
    return config.ray.address or os.environ.get("RAY_ADDRESS") or None


def _local_gpus() -> float:
    """GPUs that a local cluster would find, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # -1 is the usual way to hide every GPU.
        return float(len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
    return float(len([name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit()]))


def _user_error(error: BaseException | None) -> UserError | None:
    """The UserError that a Ray task or actor failed with, if that is what happened."""
    while error is not None:
        cause = getattr(error, "cause", None) or error.__cause__
        # Ray raises a task's UserError as a class of its own, too, whose text is the whole traceback.
        if isinstance(error, UserError) and not isinstance(cause, UserError):
            return type(error)(str(error.args[0])) if error.args else error
        error = cause
    return None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mipo_ray.run",
        description="Improve a language model with preference pairs from its own answers (MIPO).",
        epilog=_field_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="*", metavar="[RECIPE.yaml] [key=value ...]", help="recipe and overrides")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    options = parser.parse_intermixed_args(arguments)
    recipes = [argument for argument in options.arguments if "=" not in argument]
    if len(recipes) > 1:
        parser.error(f"expected one recipe, found {', '.join(recipes)}")
    options.recipe = recipes[0] if recipes else DEMO_RECIPE
    options.overrides = [argument for argument in options.arguments if "=" in argument]
    return options


def _field_help() -> str:
    lines = ["Without a recipe the demo runs: mipo_ray/examples/demo.yaml. Fields (key = default: meaning):"]
    defaults = Config()
    for path, info in fields():
        # Of the whole configuration: a section may be given other defaults than its class (evaluate.prompts).
        default = functools.reduce(getattr, path.split("."), defaults)
        shown = "null" if default is None else str(default).replace("\n", "\\n")
        lines.append(f"  {path} = {shown}: {info.description}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
