"""What the generate stage adds to its engine: the same requests through bare vLLM, our stage, and Ray Data's plain way.

    python -m benchmarks.generation [--repeats 5] [--prompts 96]

    bare     every request at once to one AsyncLLM, in one process
    stage    the generate stage: conditioned rows, the pool's actor, pairs assembled and written
    plain    a map_batches actor that calls LLM.generate for each batch of 32 requests, rows written

One engine of the embedded model each, with the same arguments, requests, seeds and sampling; its start does not count.
Answers end where the model ends them, so that their lengths are skewed. Each measurement is a process of its own, the
three in turn. Writes benchmarks/results/generation.json and .md. Ray gives its workers niceness 15, which bare vLLM has
not: where anything else works on the machine set RAY_worker_niceness=0, as for the committed results.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import describe_machine

BATCH = 32
WINDOW = 512
OPTIONS = (
    f"model.max_model_len={WINDOW}",
    "prompts.path=bundled:personalization",
    "prompts.system=Answer in one short sentence.",  # most answers are short, and some run to the limit
    "conditioning.strategy=random_context",
    "generation.score_pmi=false",
    "generation.sampling.temperature=0.7",
    "generation.sampling.max_tokens=256",
    "generation.pool.lifetime=stage",
    "filters.max_dropped_share=1.0",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant", nargs="?", choices=CONTESTANTS, help="measure this one, here; default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=96, help="two requests each")
    options = parser.parse_args()
    if options.contestant:
        with tempfile.TemporaryDirectory() as scratch:
            figures = CONTESTANTS[options.contestant](Path(scratch), options.prompts)
        print(json.dumps(figures))
        sys.stdout.flush()
        os._exit(0)  # whatever the engine's processes think of it
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for repeat in range(options.repeats):
        for name in CONTESTANTS if repeat % 2 == 0 else reversed(CONTESTANTS):
            measured[name].append(_in_a_process(name, options.prompts))
            print(repeat, name, measured[name][-1], flush=True)
    report = {
        "machine": describe_machine(),
        "settings": [*OPTIONS, f"prompts.limit={options.prompts}"],
        "measured": measured,
    }
    output = Path("benchmarks/results/generation")
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    output.with_suffix(".md").write_text(_as_table(measured, options.prompts, report["machine"]))
    print(output.with_suffix(".md").read_text())


def _in_a_process(name: str, prompts: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.generation", name, f"--prompts={prompts}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _session(scratch: Path, prompts: int) -> Any:
    """A session on a local cluster whose conditioned rows are written; returns it with the checked prompts."""
    import ray

    from mipo_ray.conditioning.needs import check_training_prompts
    from mipo_ray.config.recipe import load_config
    from mipo_ray.generation.requests import condition_prompts
    from mipo_ray.monitoring.events import start
    from mipo_ray.ray_cluster.resources import resolve
    from mipo_ray.session import Session
    from mipo_ray.storage.rounds import Round
    from mipo_ray.storage.run_directory import open_run

    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False)
    config = load_config(None, [*OPTIONS, f"prompts.limit={prompts}", f"run_dir={scratch}/run"])
    run = open_run(config.run_dir)
    session = Session(config, run, resolve(config, {"CPU": 6.0}), start(run))
    checked = check_training_prompts(config)
    condition_prompts(session, Round(0), checked)
    return session, checked


def _requests(session: Any) -> list[dict[str, Any]]:
    """The conditioned rows' requests, in order."""
    from mipo_ray.storage.rounds import Round
    from mipo_ray.tables.parquet import open_table

    place = session.stage(Round(0), "generate").path("conditioned")
    rows = open_table(place, session.run.arrow_filesystem(), ["requests"]).to_table(columns=["requests"])
    return [request for row in rows["requests"].to_pylist() for request in row]


def _vllm_arguments(config: Any) -> dict[str, Any]:
    from mipo_ray.generation.vllm_arguments import engine_arguments, engine_settings, set_environment
    from mipo_ray.models.source import local_model_directory
    from mipo_ray.ray_cluster.resources import resolve

    set_environment(on_gpu=False)
    settings = engine_settings(config, config.model.source, resolve(config, {"CPU": 6.0}))
    model = local_model_directory(config.model.source, trust_remote_code=False)
    return engine_arguments(model, settings) | {"enable_prefix_caching": True, "generation_config": "vllm"}


def _parameters(config: Any, seed: int) -> Any:
    from vllm import SamplingParams

    sampling = config.generation.sampling
    return SamplingParams(
        temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_tokens, seed=seed, logprobs=0
    )


def measure_bare(scratch: Path, prompts: int) -> dict[str, float]:
    """All requests at once to one engine in this process."""
    import ray

    session, _ = _session(scratch, prompts)
    requests, config = _requests(session), session.config
    ray.shutdown()
    arguments = _vllm_arguments(config)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.inputs import TokensPrompt
    from vllm.v1.engine.async_llm import AsyncLLM

    async def run() -> dict[str, float]:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

        async def answer(number: int, request: dict[str, Any]) -> int:
            prompt = TokensPrompt(prompt_token_ids=request["prompt_token_ids"])
            async for output in engine.generate(prompt, _parameters(config, request["seed"]), str(number)):
                final = output
            return len(final.outputs[0].token_ids)

        started = time.monotonic()
        tokens = await asyncio.gather(*(answer(number, request) for number, request in enumerate(requests)))
        return {"seconds": time.monotonic() - started, "tokens": sum(tokens)}

    return asyncio.run(run())


def measure_stage(scratch: Path, prompts: int) -> dict[str, float]:
    """The generate stage, from its engine's start to its commit."""
    from mipo_ray.generation.stage import generate
    from mipo_ray.monitoring.events import read_events
    from mipo_ray.storage.rounds import Round

    session, checked = _session(scratch, prompts)
    manifest = generate(session, Round(0), checked)
    ended = time.time()
    session.events.flush()
    (ready,) = [event["time"] for event in read_events(session.run) if event["event"] == "engine_start"]
    return {"seconds": ended - ready, "tokens": manifest.facts.statistics.generated_tokens}


class PlainActor:
    """What a Ray Data user writes first: a batch of requests to LLM.generate."""

    def __init__(self, config: Any, ready: str) -> None:
        arguments = _vllm_arguments(config)
        from vllm import LLM

        self._config = config
        self._llm = LLM(**arguments)
        Path(ready).write_text(str(time.time()))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from vllm.inputs import TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=list(map(int, ids))) for ids in batch["prompt_token_ids"]]
        parameters = [_parameters(self._config, int(seed)) for seed in batch["seed"]]
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        return {
            "seed": batch["seed"],
            "text": [output.outputs[0].text for output in outputs],
            "tokens": [len(output.outputs[0].token_ids) for output in outputs],
        }


def measure_plain(scratch: Path, prompts: int) -> dict[str, float]:
    """Ray Data's plain way, from its engine's start to the end of the write."""
    import ray.data

    from mipo_ray.tables.parquet import open_table

    session, _ = _session(scratch, prompts)
    rows, ready = ray.data.from_items(_requests(session)).repartition(-(-2 * prompts // BATCH)), f"{scratch}/ready"
    answers = rows.map_batches(
        PlainActor, fn_constructor_args=(session.config, ready), batch_size=BATCH, concurrency=1, num_cpus=1
    )
    answers.write_parquet(f"{scratch}/answers")
    ended = time.time()
    table = open_table(f"{scratch}/answers", session.run.arrow_filesystem(), ["tokens"]).to_table(columns=["tokens"])
    return {"seconds": ended - float(Path(ready).read_text()), "tokens": sum(table["tokens"].to_pylist())}


CONTESTANTS = {"bare": measure_bare, "stage": measure_stage, "plain": measure_plain}


def _as_table(measured: dict[str, list[dict[str, float]]], prompts: int, machine: str) -> str:
    speeds = {name: [run["tokens"] / run["seconds"] for run in runs] for name, runs in measured.items()}
    lines = [
        f"{2 * prompts} requests to the embedded model; {len(measured['bare'])} runs each, in turn. {machine}.",
        "",
        "| | tokens | tokens/s, median | smallest to largest |",
        "|---|---|---|---|",
    ]
    for name, runs in measured.items():
        lines.append(
            f"| {name} | {median(run['tokens'] for run in runs):,.0f} | {median(speeds[name]):.1f} | "
            f"{min(speeds[name]):.1f} to {max(speeds[name]):.1f} |"
        )
    for other in ("bare", "plain"):
        ratios = [one / two for one, two in zip(speeds["stage"], speeds[other], strict=True)]
        lines.append(
            f"| stage over {other}, of each turn | | {median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
