"""A round on GPUs by paper and pencil: 1M prompts on Llama-3.1-8B and 8 to 256 H100s. Nothing is run.

    python -m benchmarks.paper_model

Engines and training workers have GPUs of their own, and the round streams. Speeds are published measurements, what
stands around them is measured by this project or assumed; `ASSUMPTIONS` names every number with where it is from. Each
shared thing (the network between workers, the driver, the store) gets its load at the speed that the GPUs alone would
have: the first one to reach 1 bounds the round. Writes benchmarks/results/paper_model.md. Takes a second.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mipo_ray.planning.prices import price_table

GPUS = (8, 16, 32, 64, 128, 256)
RESULT = Path("benchmarks/results/paper_model.md")
MEASURED_DRIVER = Path("benchmarks/results/scale_prompts.json")  # by `python -m benchmarks.scale prompts`
SCALE_BLOCK_ROWS = 8  # of that measurement
PARAMETERS = 8.03e9  # of Llama-3.1-8B


@dataclass(frozen=True)
class Assumption:
    """One number of the model, and where it is from."""

    value: float
    unit: str
    source: str


def _driver_ms() -> Assumption:
    """CPU of the driver for one block: measured where that was done, else a guess."""
    if not MEASURED_DRIVER.exists():
        return Assumption(16.0, "ms a block", "a guess until `python -m benchmarks.scale prompts` was run")
    runs = json.loads(MEASURED_DRIVER.read_text())["measured"]
    largest = max(runs, key=int)
    each = sorted(1000 * run["cpu_seconds"] / run["pairs"] for run in runs[largest])
    source = f"`python -m benchmarks.scale prompts`, {int(largest):,} prompts in blocks of {SCALE_BLOCK_ROWS}"
    return Assumption(SCALE_BLOCK_ROWS * each[len(each) // 2], "ms a block", source)


ASSUMPTIONS = {
    "prompts": Assumption(1_000_000, "", "the question"),
    "prompt_tokens": Assumption(150, "tokens", "instructions with a short context; assumed"),
    "answer_tokens": Assumption(250, "tokens", "assumed, chosen and rejected alike"),
    "kept": Assumption(0.8, "of the pairs", "assumed; the demo's filters keep a quarter, a 0.5B's pairs two thirds"),
    "block_rows": Assumption(32, "prompts", "the default of conditioning.block_size"),
    "batch_pairs": Assumption(256, "pairs a step", "assumed; the default of train.batch_size is 4"),
    "engine_tokens": Assumption(
        5_777,
        "generated tokens/s a GPU",
        "vLLM 0.10, FP8, MLPerf Inference v5.1 offline, one H100, its longer prompts read too "
        "(https://www.redhat.com/en/blog/efficient-and-reproducible-llm-inference-red-hat-mlperf-inference-v51-results);"
        " vLLM 0.5.4 gave 3,400 with 320 prompts "
        "(https://github.com/LambdaLabsML/vllm-benchmark/blob/main/benchmark_v0.md). bfloat16 was not measured",
    ),
    "score_tokens": Assumption(
        0.4 * 989e12 / (2 * PARAMETERS), "scored tokens/s a GPU", "40 % of 989 TFLOP/s, as the plan assumes"
    ),
    "train_tokens": Assumption(
        0.75 * 5_762,
        "trained tokens/s a GPU",
        "torchtitan, FSDP on 8 H100s, bfloat16, 5,762 tokens/s "
        "(https://github.com/pytorch/torchtitan/blob/main/docs/performance.md), times 6 of 8 FLOPs, for the "
        "reference's forward. Ours on an H200 with 1.24B parameters at 256/256: 38.0 pairs/s, which is 4,500 tokens/s "
        "at this size (benchmarks/results/gpu.md)",
    ),
    "node_bandwidth": Assumption(
        400e9, "bytes/s a GPU", "NVLink of an HGX H100, 450 GB/s each way by data sheet, less"
    ),
    "network_bandwidth": Assumption(
        40e9, "bytes/s a GPU", "400 Gb/s a GPU as on torchtitan's machines, less; no overlap"
    ),
    "start_seconds": Assumption(180, "s", "engines and workers of 8B parameters on GPUs; assumed, never measured"),
    "export_seconds": Assumption(60, "s", "16 GB of weights to the store and back into engines; assumed"),
    "driver_ms": _driver_ms(),
    "store_bandwidth": Assumption(1e9, "bytes/s", "an object store from many nodes; assumed, cautious"),
    "store_requests": Assumption(100, "writes/s", "of a shared file system or store; assumed, cautious"),
    "files_a_block": Assumption(2, "files", "the pairs and Ray Data's note of what is written; counted in a run"),
}


@dataclass(frozen=True)
class RoundOnGpus:
    """A round on so many GPUs. Seconds are those of the GPUs alone; `loads` are shares of what is shared, at that
    speed; `bound` is the first of them."""

    engines: int
    workers: int
    sampling_seconds: float
    training_seconds: float
    loads: dict[str, float]

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.engines + self.workers

    @property
    def seconds(self) -> float:
        """From start to the policy in the engines: the longer side, stretched where something shared is full."""
        busy = max(self.sampling_seconds, self.training_seconds) * max(1.0, *self.loads.values())
        return busy + _value("start_seconds") + _value("export_seconds")

    @property
    def bound(self) -> tuple[str, float]:
        """What is fullest, and how full."""
        return max(self.loads.items(), key=lambda load: load[1])


def round_on(gpus: int) -> RoundOnGpus:
    """The split of so many GPUs by which the longer side is shortest; training takes 4 at least, for its memory."""
    found = [_split(gpus - workers, workers) for workers in range(4, gpus)]
    return min(found, key=lambda one: max(one.sampling_seconds, one.training_seconds))


def _split(engines: int, workers: int) -> RoundOnGpus:
    sampling, training = sampling_gpu_seconds() / engines, training_seconds(workers)
    prompts, seconds = _value("prompts"), max(sampling, training)
    blocks = prompts / _value("block_rows")
    step = training / steps()
    return RoundOnGpus(
        engines=engines,
        workers=workers,
        sampling_seconds=sampling,
        training_seconds=training,
        loads={
            "the network between training workers": exchange_seconds(workers) / step,
            "one core of the driver": blocks * _value("driver_ms") / 1000 / seconds,
            "writes to the store": blocks * _value("files_a_block") / seconds / _value("store_requests"),
            "bytes to the store": 2 * prompts * pair_bytes() / seconds / _value("store_bandwidth"),
        },
    )


def sampling_gpu_seconds() -> float:
    """GPU seconds to sample two answers for each prompt, and to score the chosen one under the mismatched prompt."""
    prompts, answer = _value("prompts"), _value("answer_tokens")
    scored = prompts * (_value("prompt_tokens") + answer)
    return 2 * prompts * answer / _value("engine_tokens") + scored / _value("score_tokens")


def steps() -> int:
    """Optimizer steps of the round."""
    return math.ceil(_value("prompts") * _value("kept") / _value("batch_pairs"))


def training_seconds(workers: int) -> float:
    """All steps: the tokens of each worker's share of a step, the prompt once for both answers, and the exchange."""
    pairs = math.ceil(_value("batch_pairs") / workers)  # the fullest worker; below one pair each some have none
    tokens = pairs * (_value("prompt_tokens") + 2 * _value("answer_tokens"))
    return steps() * (tokens / _value("train_tokens") + exchange_seconds(workers))


def exchange_seconds(workers: int) -> float:
    """Of one step: gradients reduced and scattered, weights gathered, 2 bytes a parameter each (ZeRO 2 in bfloat16)."""
    bandwidth = _value("node_bandwidth") if workers <= 8 else _value("network_bandwidth")
    return 2 * 2 * PARAMETERS * (workers - 1) / workers / bandwidth


def pair_bytes() -> float:
    """Of a pair in Arrow: ids of 4 bytes, texts of about 4.2 characters a token (the prompt twice), and 350 more.

    The demo's pairs have 1,600 bytes; by this 1,600.
    """
    prompt, answer = _value("prompt_tokens"), _value("answer_tokens")
    return 4 * (prompt + 2 * answer) + 4.2 * (2 * prompt + 2 * answer) + 350


def table() -> str:
    """The model's Markdown: what the round takes, what saturates first, and every assumption."""
    price = price_table()["H100"]
    rounds = [round_on(gpus) for gpus in GPUS]
    lines = [
        "One streamed round of 1M prompts on Llama-3.1-8B, by paper and pencil: nothing of this was run.",
        "",
        f"| H100s | engines + workers | hours | GPU-hours | dollars at ${price.dollars_per_hour:.2f} | pairs/s | "
        "what is fullest | its load | driver | writes | bytes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in rounds:
        hours = one.seconds / 3600
        name, load = one.bound
        driver, writes, amount = list(one.loads.values())[1:]
        lines.append(
            f"| {one.gpus} | {one.engines} + {one.workers} | {hours:.2f} | {one.gpus * hours:,.0f} | "
            f"{one.gpus * hours * price.dollars_per_hour:,.0f} | {_value('prompts') / one.seconds:,.0f} | {name} | "
            f"{load:.2f} | {driver:.2f} | {writes:.2f} | {amount:.3f} |"
        )
    lines += [
        "",
        "Loads are shares of what one has: of a step's time for the network, else of a core, writes or bytes a second. "
        f"Prices: {price.price}.",
        "",
        *_findings(rounds),
        "",
        "| assumption | value | from |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {one.value:,.6g} {one.unit} | {one.source} |" for name, one in ASSUMPTIONS.items()]
    return "\n".join(lines) + "\n"


def _findings(rounds: list[RoundOnGpus]) -> list[str]:
    """What the table says, in words that follow it."""
    first, last = rounds[0], rounds[-1]
    cost: Callable[[RoundOnGpus], float] = lambda one: one.gpus * one.seconds  # noqa: E731
    name, load = last.bound
    half = next((one.gpus for one in rounds if one.bound[1] >= 0.5), None)
    reached = "at none of these sizes" if half is None else f"from {half} GPUs on"
    return [
        f"{last.gpus} GPUs are {first.seconds / last.seconds:.1f} times as fast as {first.gpus} for "
        f"{cost(last) / cost(first):.2f} times the GPU-hours. What saturates first is {name}: {load:.2f} at "
        f"{last.gpus} GPUs, half or more {reached}. The driver's core and the store are at "
        f"{last.loads['one core of the driver']:.2f} and {last.loads['writes to the store']:.2f} there; larger blocks "
        "make both smaller, a larger train.batch_size the first.",
    ]


def _value(name: str) -> float:
    return ASSUMPTIONS[name].value


if __name__ == "__main__":
    RESULT.write_text(table())
    print(RESULT.read_text())
