"""The GPU check: one command, at most ten minutes on one H100 or H200, without Ray, vLLM and a network.

    sh benchmarks/gpu/collect_wheels.sh DIR     here: the packages that such a machine lacks
    python -m benchmarks.gpu                    there, with Python 3.12, torch 2.11 or newer, transformers 5 and triton
    python -m benchmarks.gpu --device cpu --model-shape tiny --large-model-shape tiny     the whole of it on a CPU

Parts, in order of worth (--parts leaves some out):

agreement   losses and gradients of all layouts and attention backends beside plain torch
speed       ours beside TRL at --model-shape: pairs/s, model-FLOPs utilisation, peak memory
head        the output head alone beside the bare matrix products
large       ours at --large-model-shape
zero        ZeRO 1 to 3, offload, checkpoint and resume; peak memory beside what --dry-run estimates

Rows are written to OUTPUT.json as they come, and OUTPUT.md shows all that it holds. A part that fails has its error
there, and the next one begins; after --seconds no row is begun. Exits with 1 where a part failed or a number is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import agreement, head, speed, zero
from benchmarks.gpu.report import markdown
from benchmarks.machine import describe_machine
from benchmarks.trainer_contestants import Specification
from benchmarks.trainer_workload import MODEL_SHAPES, Shape, save_random_model

SEED = 20
PARTS = ("agreement", "speed", "head", "large", "zero")


def main() -> int:
    options = _options()
    started = time.monotonic()
    failed = False
    with tempfile.TemporaryDirectory(prefix="models-") as scratch:
        for name in options.parts.split(","):
            rows: list[dict[str, Any]] = []
            error = None
            try:
                for row in _part(name, options, Path(scratch)):
                    rows.append(row)
                    print(f"{time.monotonic() - started:6.0f} s  {name}: {json.dumps(row)[:400]}", flush=True)
                    _write(options, name, rows, None)
                    if time.monotonic() - started > options.seconds:
                        error = f"stopped after {options.seconds} s"
                        break
            except Exception as failure:  # the parts that follow must not be lost with this one
                error = f"{type(failure).__name__}: {str(failure)[-2000:]}"
            _write(options, name, rows, error)
            is_wrong = error is not None or any("error" in row or row.get("within") is False for row in rows)
            print(
                f"{time.monotonic() - started:6.0f} s  {name}: {error or ('WRONG' if is_wrong else 'ok')}", flush=True
            )
            failed = failed or is_wrong
    return int(failed)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--model-shape", choices=tuple(MODEL_SHAPES), default="llama-3.2-1b")
    parser.add_argument("--large-model-shape", choices=tuple(MODEL_SHAPES), default="qwen2.5-3b")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps")
    parser.add_argument("--seconds", type=int, default=560, help="after these no further row is begun")
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="of the GPU, dense bfloat16, by its data sheet"
    )
    parser.add_argument("--output", default="benchmarks/results/gpu", help="without suffix")
    options = parser.parse_args()
    if unknown := set(options.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, found {', '.join(sorted(unknown))}")
    return options


def _part(name: str, options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """The rows of a part; those of trainers run in processes of their own, which leave the device empty."""
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "agreement": lambda: agreement.measure(options.device, SEED),
        "speed": lambda: _speed(options, scratch),
        "head": lambda: head.measure(_head_size(options), _dtype(options), options.device, options.repeats),
        "large": lambda: _large(options, scratch),
        "zero": lambda: _zero(options, scratch),
    }
    return parts[name]()


def _speed(options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    name = options.model_shape
    base = _specification(name, options, scratch)
    return _race(speed.contestants(base), name, speed.shapes(speed.PAIRS_PER_STEP[name]), options)


def _large(options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    name = options.large_model_shape
    runners = speed.contestants(_specification(name, options, scratch))
    ours = {trainer: runner for trainer, runner in runners.items() if trainer in speed.LARGE}
    return _race(ours, name, speed.shapes(speed.PAIRS_PER_STEP[name])[:3], options)


def _race(
    runners: dict[str, Specification], model_shape: str, shapes: Sequence[Shape], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    for row in speed.measure(runners, model_shape, shapes, options.repeats, SEED):
        yield _with_estimate(row, runners["ours"], options)


def _with_estimate(row: dict[str, Any], base: Specification, options: argparse.Namespace) -> dict[str, Any]:
    if "flops_per_second" not in row:
        return row
    row = row | {"utilisation": row["flops_per_second"] / (options.peak_tflops * 1e12)}
    if row["forward_tokens"]:
        row["estimated_bytes"] = zero.estimate(base, row["parameters"], row["forward_tokens"])
    return row


def _zero(options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    name = "tiny" if options.device == "cpu" else "wide"
    return zero.measure(_specification(name, options, scratch), name, SEED)


def _specification(name: str, options: argparse.Namespace, scratch: Path) -> Specification:
    """Ours, colocated; the model is written at its first use."""
    directory = scratch / name
    if not directory.exists():
        save_random_model(name, directory, dtype=_dtype(options), device=options.device)
    return Specification("ours", str(directory), options.device, _dtype(options), 2, "colocated")


def _dtype(options: argparse.Namespace) -> str:
    return "bfloat16" if options.device == "cuda" else "float32"


def _head_size(options: argparse.Namespace) -> head.HeadSize:
    if options.device == "cpu":
        return head.HeadSize(256, 4096, 64)
    return head.HeadSize(8192, 151936, 2048)


def _write(options: argparse.Namespace, part: str, rows: list[dict[str, Any]], error: str | None) -> None:
    path = Path(f"{options.output}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    found[part] = {
        "machine": describe_machine(),
        "seed": SEED,
        "repeats": options.repeats,
        "rows": rows,
        "error": error,
    }
    path.write_text(json.dumps(found, indent=2) + "\n")
    path.with_suffix(".md").write_text(markdown(found))


if __name__ == "__main__":
    sys.exit(main())
