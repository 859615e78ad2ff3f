"""What the pipeline does on more engines than this machine could run: simulated ones, under real Ray Data and Train.

    python -m benchmarks.scale engines     1 to 16 engines, equally many prompts for each: share of the ideal speed
    python -m benchmarks.scale schedule    a round of which both sides take equally long, streaming and sequential
    python -m benchmarks.scale prompts     engines that take no time, 2,000 to 32,000 prompts: CPU and memory of a pair

Engines and optimizer steps sleep (`benchmarks/simulated.py` says what else is real). Each measurement is a process of
its own with a Ray cluster of its own, of nodes that this machine pretends to have. Writes
benchmarks/results/scale_PART.json and .md. None of the three has run whole yet.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.simulated import Speeds
from tests.helpers.runs import write_prompts

NODE_ENGINES = 8
# Mean tokens of a prompt of `write_prompts`, by the tiny model's tokenizer, are few; the work is that of the answers.
OPTIONS = (
    "model.max_model_len=1024",
    "generation.sampling.max_tokens=512",
    "generation.pool.lifetime=stage",
    "generation.pool.batches_in_flight=16",  # of small blocks: an engine never waits for a block's longest answer
    "conditioning.block_size=8",
    "train.batch_size=32",
    "evaluate.enabled=false",
    "generation.pool.label_selector={mipo.io/role: generate}",
    "train.label_selector={mipo.io/role: train}",
)


@dataclass(frozen=True)
class Setting:
    """One measurement: a round of so many prompts on so many machines."""

    prompts: int
    engines: int
    workers: int = 0
    """0: the round is generated and not trained on."""
    streams: bool = False
    speeds: Speeds = field(default_factory=Speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "one"], help="what to measure; one: a setting as JSON")
    parser.add_argument("setting", nargs="?", help="for one")
    parser.add_argument("--repeats", type=int, default=5, help="of each setting, in turn")
    options = parser.parse_args()
    if options.part == "one":
        values = json.loads(options.setting)
        print(json.dumps(measure_here(Setting(**values | {"speeds": Speeds(**values["speeds"])}))))
        return
    settings, as_table = PARTS[options.part]
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in settings}
    for repeat in range(options.repeats):
        for name in settings if repeat % 2 == 0 else reversed(settings):
            measured[name].append(measure(settings[name]))
            print(repeat, name, measured[name][-1], flush=True)
    report = {"machine": describe_machine(), "settings": {name: asdict(one) for name, one in settings.items()}}
    table = f"{as_table(settings, measured)}\n{options.repeats} runs of each, in turn; medians. {report['machine']}\n"
    output = Path(f"benchmarks/results/scale_{options.part}")
    output.with_suffix(".json").write_text(json.dumps(report | {"measured": measured}, indent=1) + "\n")
    output.with_suffix(".md").write_text(table)
    print(table)


def measure(setting: Setting) -> dict[str, float]:
    """A setting's figures, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "one", json.dumps(asdict(setting))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure_here(setting: Setting) -> dict[str, float]:
    """Runs one round in this process, which must not have joined a cluster before.

    seconds: from the first engine at work to the end of the round. engine_seconds, worker_seconds: the same for
    machines that are never idle (of engines by the tokens that were sampled). present_seconds: from an engine's own
    first block to the last block of all, the mean of the engines: two cores start 16 actors one after the other, which
    16 nodes would not. driver_mib: the driver's largest memory. cpu_seconds: of the driver; all_cpu_seconds: of every
    process.
    """
    from benchmarks.simulated import VARIABLE, as_text, simulate

    os.environ[VARIABLE] = as_text(setting.speeds)
    simulate()
    with tempfile.TemporaryDirectory() as scratch:
        cluster = _cluster(setting)
        try:
            return _measured_round(setting, Path(scratch), cluster)
        finally:
            _end(cluster)


def _cluster(setting: Setting) -> Any:
    """Nodes for the engines, one for the workers and one for the driver, all on this machine."""
    import ray
    import ray.data
    from ray.cluster_utils import Cluster

    from mipo_ray.ray_cluster.connection import WORKERS_KEPT

    os.environ[WORKERS_KEPT] = str(2 * (setting.engines + setting.workers) + 16)
    memory = {"object_store_memory": 200 * 1024**2}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 6, **memory})
    for first in range(0, setting.engines, NODE_ENGINES):
        count = min(NODE_ENGINES, setting.engines - first)
        cluster.add_node(num_cpus=count, labels={"mipo.io/role": "generate"}, **memory)
    if setting.workers:
        cluster.add_node(num_cpus=setting.workers, labels={"mipo.io/role": "train"}, **memory)
    ray.init(address=cluster.address, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    return cluster


def _end(cluster: Any) -> None:
    import ray

    ray.shutdown()
    cluster.shutdown()


def _measured_round(setting: Setting, scratch: Path, cluster: Any) -> dict[str, float]:
    from mipo_ray.conditioning.needs import check_training_prompts
    from mipo_ray.config.recipe import load_config
    from mipo_ray.generation.requests import condition_prompts
    from mipo_ray.generation.stage import generate
    from mipo_ray.loop import stream_round
    from mipo_ray.monitoring.events import read_events, recording
    from mipo_ray.ray_cluster.resources import resolve
    from mipo_ray.session import Session
    from mipo_ray.storage.manifests import GenerateFacts
    from mipo_ray.storage.rounds import Round
    from mipo_ray.storage.run_directory import open_run
    from mipo_ray.training.stage import train
    from tests.helpers.tiny_model import make_tiny_model

    write_prompts(scratch / "train.jsonl", "train", setting.prompts)
    overrides = [
        f"run_dir={scratch}/run",
        f"model.path={make_tiny_model(scratch / 'model')}",
        f"prompts.path={scratch}/train.jsonl",
        f"generation.pool.min_size={setting.engines}",
        f"generation.pool.max_size={setting.engines}",
        f"train.num_workers={max(1, setting.workers)}",
    ]
    config = load_config(None, [*OPTIONS, *overrides])
    run, round = open_run(config.run_dir), Round(0)
    prompts = check_training_prompts(config)
    with recording(run) as events:
        session = Session(config, run, resolve(config, {"CPU": 6.0}), events)
        condition_prompts(session, round, prompts)
        before, started = _cpu_seconds(), time.time()
        if setting.streams:
            stream_round(session, round, prompts)
        else:
            generate(session, round, prompts)
            if setting.workers:
                train(session, round)
        ended, after = time.time(), _cpu_seconds()
    seen = read_events(run)
    statistics = session.stage(round, "generate").finished_manifest(GenerateFacts).facts.statistics
    blocks = [event for event in seen if event["event"] == "generated"]
    firsts: dict[str, float] = {}
    for event in blocks:
        began = event["time"] - event["block_seconds"]
        firsts[event["engine"]] = min(began, firsts.get(event["engine"], began))
    first, last = min(firsts.values()), max(event["time"] for event in blocks)
    trained = sum(event["step_seconds"] for event in seen if event["event"] == "train_step")
    speed = setting.engines * setting.speeds.engine_tokens_per_second()
    scored = statistics.kept * setting.speeds.score_seconds / (setting.engines * setting.speeds.sequences)
    return {
        "seconds": ended - first,
        "start_seconds": first - started,
        "sampling_seconds": last - first,
        "present_seconds": last - fmean(firsts.values()),
        "engine_seconds": statistics.generated_tokens / speed + scored,
        "worker_seconds": trained,
        "pairs": statistics.rows,
        "driver_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "cpu_seconds": after[0] - before[0],
        "all_cpu_seconds": after[1] - before[1],
    }


def _cpu_seconds() -> tuple[float, float]:
    """CPU seconds so far of this process, and of it with every process of its cluster."""
    import psutil

    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *_alive(here.children(recursive=True)))]
    own = [one.user + one.system for one in times]
    # Processes that ended are in their parents' figures.
    ended = [one.children_user + one.children_system for one in times]
    return own[0], sum(own) + sum(ended)


def _alive(processes: list[Any]) -> list[Any]:
    import psutil

    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def _engines_table(settings: dict[str, Setting], measured: dict[str, list[dict[str, float]]]) -> str:
    lines = [
        "Engines of 2,000 tokens a second, equally many prompts for each: sampling beside engines that are never idle.",
        "An engine is there from its own first block on; this machine starts their actors one after the other.",
        "",
        "| engines | prompts | sampling, s | engines are there, s | never idle, s | share of the ideal while there | "
        "in all | CPU of all processes, ms a pair |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, setting in settings.items():
        figures = _medians(measured[name])
        there, in_all = (
            median(one["engine_seconds"] / one[seconds] for one in measured[name])
            for seconds in ("present_seconds", "sampling_seconds")
        )
        lines.append(
            f"| {setting.engines} | {setting.prompts:,} | {figures['sampling_seconds']:.1f} | "
            f"{figures['present_seconds']:.1f} | {figures['engine_seconds']:.1f} | {there:.3f} | {in_all:.3f} | "
            f"{1000 * figures['all_cpu_seconds'] / figures['pairs']:.1f} |"
        )
    return "\n".join([*lines, ""])


def _schedule_table(settings: dict[str, Setting], measured: dict[str, list[dict[str, float]]]) -> str:
    one = settings["streaming"]
    lines = [
        f"A round of {one.prompts:,} prompts on {one.engines} engines and {one.workers} workers, from the first engine "
        "at work to the committed policy.",
        "",
        "| schedule | round, s | engines never idle: G, s | workers never idle: T, s | round / max(G, T) |",
        "|---|---|---|---|---|",
    ]
    for name in settings:
        figures = _medians(measured[name])
        ratio = median(run["seconds"] / max(run["engine_seconds"], run["worker_seconds"]) for run in measured[name])
        lines.append(
            f"| {name} | {figures['seconds']:.0f} | {figures['engine_seconds']:.0f} | "
            f"{figures['worker_seconds']:.0f} | {ratio:.2f} |"
        )
    return "\n".join([*lines, ""])


def _prompts_table(settings: dict[str, Setting], measured: dict[str, list[dict[str, float]]]) -> str:
    lines = [
        "Two engines whose answers take no time: what a pair costs beside them, in a generate stage.",
        "",
        "| prompts | CPU of the driver, ms a pair | of all processes, ms a pair | driver's memory, MiB |",
        "|---|---|---|---|",
    ]
    for name, setting in settings.items():
        figures = _medians(measured[name])
        each = [1000 * figures[cpu] / figures["pairs"] for cpu in ("cpu_seconds", "all_cpu_seconds")]
        lines.append(f"| {setting.prompts:,} | {each[0]:.2f} | {each[1]:.2f} | {figures['driver_mib']:.0f} |")
    return "\n".join([*lines, ""])


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: median(run[name] for run in runs) for name in runs[0]}


NO_TIME = Speeds(token_seconds=0.0, score_seconds=0.0)
# 4 engines sample 40 prompts a second, of two answers each; 2 workers train on as many.
ROUND = Setting(prompts=7_200, engines=4, workers=2, speeds=Speeds(train_tokens_per_second=5_000.0))

Table = Callable[[dict[str, Setting], dict[str, list[dict[str, float]]]], str]
PARTS: dict[str, tuple[dict[str, Setting], Table]] = {
    "engines": ({str(count): Setting(600 * count, count) for count in (1, 2, 4, 8, 16)}, _engines_table),
    "schedule": ({"sequential": ROUND, "streaming": replace(ROUND, streams=True)}, _schedule_table),
    "prompts": ({str(count): Setting(count, 2, speeds=NO_TIME) for count in (2_000, 8_000, 32_000)}, _prompts_table),
}


if __name__ == "__main__":
    main()
