"""How much memory training workers need to load a model at ZeRO stage 3, and to export it: whole, and in parts.

    python -m benchmarks.sharded_loading                                     models of 0.3B and 1.1B of random weights
    python -m benchmarks.sharded_loading --cases tiny --output OUTPUT        one that is made and loaded in seconds

Workers are plain processes that gloo joins, on one machine, which is the node. Each loads the model both ways, in fresh
processes: `whole` is `from_pretrained` and then DeepSpeed's sharding of all that it made, as earlier releases loaded;
`own part` is `training.sharded_loading`, as a run does it. Measured is what loading adds to a worker that has imported
everything: its resident memory at most, by the kernel's own count, and its proportional share of memory at most (PSS,
where a page that workers share counts once for all of them), sampled. Then they export it, `whole` all of it gathered
first, as earlier releases did, `own part` file by file (`training.sharded_export`); neither is loaded back, as no large
policy is. Writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

WAYS = ("whole", "own part")
SAMPLED_SECONDS = 0.05
MIB = 1024**2
# What the node may hold while loading: its share of the weights by this, and one file.
SHARE = 1.3


@dataclass(frozen=True)
class Case:
    """A Llama of random weights: sizes of its configuration, dtypes of its files and of training, bytes of a file."""

    sizes: dict[str, int]
    stored: str
    trained: str
    file_bytes: int = 200 * MIB


_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
_SMALL = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32_000,
}
_LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
}
CASES = {
    "tiny": Case(_TINY, "bfloat16", "float32", file_bytes=MIB // 8),
    "0.3B": Case(_SMALL, "bfloat16", "bfloat16"),
    "0.3B, cast": Case(_SMALL, "bfloat16", "float32"),
    "1.1B": Case(_LARGE, "bfloat16", "bfloat16"),
}
DEFAULT_CASES = ("0.3B", "0.3B, cast", "1.1B")


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of training workers while they load a model at ZeRO stage 3.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=DEFAULT_CASES)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--output", default="benchmarks/results/sharded_loading", help="without suffix")
    parser.add_argument("--scratch", help="where models are made for a while; default: the temporary directory")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": describe_machine(), "workers": options.workers, "cases": {}}
    for name in options.cases:
        report["cases"][name] = measure_case(CASES[name], options.workers, options.scratch)
        print(name, report["cases"][name], flush=True)
    output = Path(options.output)
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    output.with_suffix(".md").write_text(as_table(report))
    print(as_table(report))


def measure_case(case: Case, workers: int, scratch: str | None = None) -> dict[str, Any]:
    """Bytes of the weights as trained and of the largest file, and what `load` found, by way and worker."""
    import torch

    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        parameters = make_model(case, Path(directory, "model"))
        files = [file.stat().st_size for file in Path(directory, "model").glob("*.safetensors")]
        for way in WAYS:
            torch.multiprocessing.spawn(load, (workers, directory, way, case), nprocs=workers)
        return {
            "parameters": parameters,
            "weight_bytes": parameters * getattr(torch, case.trained).itemsize,
            "file_bytes": case.file_bytes,
            "largest_file_bytes": max(files),
            "files": len(files),
            "ways": {
                way: [json.loads(found_by(directory, way, rank).read_text()) for rank in range(workers)] for way in WAYS
            },
        }


def found_by(directory: str, way: str, rank: int) -> Path:
    return Path(directory, f"{way} {rank}.json")


def make_model(case: Case, directory: Path) -> int:
    """Writes the model to `directory`, never holding more of it than a file; returns how many parameters it has."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**case.sizes, tie_word_embeddings=False)
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    dtype = getattr(torch, case.stored)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}

    def write() -> None:
        file = f"model-{len(set(weight_map.values())):05d}.safetensors"
        weight_map.update(dict.fromkeys(tensors, file))
        save_file(tensors, directory / file, metadata={"format": "pt"})
        tensors.clear()

    for name, shape in shapes.items():
        if tensors and sum(one.nbytes for one in tensors.values()) + shape.numel() * dtype.itemsize > case.file_bytes:
            write()
        tensors[name] = torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
    write()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(shape.numel() for shape in shapes.values())


def load(rank: int, workers: int, directory: str, way: str, case: Case) -> None:
    """One worker: loads the model and exports it, and writes what each took."""
    import torch
    from torch import distributed
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  # imported before the memory is looked at

    from mipo_ray.config.train import TrainConfig
    from mipo_ray.training.deepspeed_config import deepspeed_config
    from mipo_ray.training.deepspeed_engine import DTYPES, quiet_libraries
    from mipo_ray.training.export import export_policy
    from mipo_ray.training.sharded_loading import load_own_part

    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    quiet_libraries("cpu")
    distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous {way}", rank=rank, world_size=workers
    )
    import deepspeed

    dtype, file_bytes = case.trained, case.file_bytes
    config = deepspeed_config(TrainConfig(zero_stage=3), dtype)
    model_dir = f"{directory}/model"
    distributed.barrier()
    with memory_at_most() as loading:
        if way == "whole":
            model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=DTYPES[dtype], use_safetensors=True)
        else:
            model = load_own_part(model_dir, config, DTYPES[dtype], trust_remote_code=False)
        deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=DTYPES[dtype])
        distributed.barrier()  # nobody's memory goes before all have loaded: pages that are shared would count more
    with memory_at_most() as exporting, exported_as(way, file_bytes):
        export_policy(model, model_dir, f"{directory}/{way} exported")
        distributed.barrier()
    found_by(directory, way, rank).write_text(json.dumps({"load": loading, "export": exporting}))
    distributed.destroy_process_group()


@contextlib.contextmanager
def exported_as(way: str, file_bytes: int) -> Iterator[None]:
    """Inside it files of an export have `file_bytes` at most, and a policy counts as too large to be loaded back."""
    from unittest.mock import patch

    from mipo_ray.training import export, export_check, sharded_export

    with contextlib.ExitStack() as changed:
        changed.enter_context(patch.object(export, "MOST_BYTES", file_bytes))
        for module in (export_check, sharded_export):
            changed.enter_context(patch.object(module, "WHOLE_BYTES", 0))
        if way == "whole":
            changed.enter_context(patch.object(export, "plan_files", lambda *_: None))
        yield


@contextlib.contextmanager
def memory_at_most() -> Iterator[dict[str, float]]:
    """While inside: what this process's memory grew by at most, in bytes, is in the dictionary afterwards.

    resident_bytes: by the kernel's high-water mark. proportional_bytes: PSS, sampled, without what is shorter than a
    sample. seconds: how long it was.
    """
    found: dict[str, float] = {}
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = {"resident_bytes": _kilobytes("status", "VmHWM"), "proportional_bytes": _kilobytes("smaps_rollup", "Pss")}
    sampled, started = [before["proportional_bytes"]], time.perf_counter()
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLED_SECONDS):
            sampled.append(_kilobytes("smaps_rollup", "Pss"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield found
    finally:
        ended.set()
        sampler.join()
    after = {"resident_bytes": _kilobytes("status", "VmHWM"), "proportional_bytes": max(sampled)}
    found.update({name: 1024.0 * (after[name] - before[name]) for name in after})
    found["seconds"] = time.perf_counter() - started


def _kilobytes(file: str, field: str) -> int:
    for line in Path("/proc/self", file).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise ValueError(f"/proc/self/{file}: expected {field}, found none")


def as_table(report: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Memory of training workers that load and export a model at ZeRO stage 3",
        "",
        f"`python -m benchmarks.sharded_loading`, {report['workers']} gloo workers on one machine; what loading or the "
        f"export added to a process at most. The node's bound is {SHARE} x the weights as they are trained, plus one "
        "file.",
        "",
        f"{report['machine']}",
        "",
        "| loading | weights, MiB | way | resident, a worker at most, MiB | PSS, a worker at most, MiB "
        "| PSS, all workers, MiB | the node's bound, MiB | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case, way, workers in _rows(report):
        found = [worker["load"] for worker in workers]
        proportional = [one["proportional_bytes"] for one in found]
        bound = SHARE * case["weight_bytes"] + case["largest_file_bytes"]
        resident = max(one["resident_bytes"] for one in found)
        shown = " | ".join(f"{size / MIB:,.0f}" for size in (resident, max(proportional), sum(proportional), bound))
        seconds = max(one["seconds"] for one in found)
        lines.append(f"| {name} | {case['weight_bytes'] / MIB:,.0f} | {way} | {shown} | {seconds:.1f} |")
    lines += [
        "",
        "| export | weights, MiB | a file, MiB | way | resident, the first worker, MiB | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, case, way, workers in _rows(report):
        first = workers[0]["export"]
        sizes = f"{case['weight_bytes'] / MIB:,.0f} | {case['file_bytes'] / MIB:,.0f}"
        lines.append(f"| {name} | {sizes} | {way} | {first['resident_bytes'] / MIB:,.0f} | {first['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str, list[dict[str, Any]]]]:
    for name, case in report["cases"].items():
        for way, workers in case["ways"].items():
            yield name, case, way, workers


if __name__ == "__main__":
    main()
