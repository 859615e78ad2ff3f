"""Our trainer beside TRL's DPOTrainer, on the same work: speed, memory and counted FLOPs of an optimizer step.

    python -m benchmarks.trainer [--tables check,trl,own,memory] [--repeats 5] [--output benchmarks/results/trainer]

check   losses of 20 steps of both, with the reference live and computed beforehand; stops when they differ
trl     both trainers, in turns, on four shapes of pairs, some with gradient checkpointing or a cached reference
own     our layouts, reference modes and gradient checkpointing
memory  the peak of one forward and backward pass by the length of prompt and response

All run the embedded model in float32 on CPU cores; `python -m benchmarks.gpu` is for GPUs.

Every trainer runs in a process of its own. Tables are written to OUTPUT.json row by row, and OUTPUT.md shows all that
it holds, those of earlier runs, too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.trainer_contestants import LEARNING_RATE, Specification
from benchmarks.trainer_race import ContestantProcess, compare, losses, race
from benchmarks.trainer_report import markdown
from benchmarks.trainer_workload import Shape, fixed, mixed, random_pairs

SEED = 20
TABLES = ("check", "trl", "own", "memory")
CHECKED_STEPS = 20
CHECKED_BATCHES = 4  # gone through again and again, so that the loss falls
LOSS_TOLERANCE = 1e-4  # nats
LN_2 = 0.693147
# Short, since it is the agreement that counts; ragged, so that padding is in it.
CHECK_SHAPE = Shape("check", (12, 24), (4, 12), 2)
# Few pairs, so that a step takes less than a minute on two cores.
LONG_PROMPT = fixed(1024, 64, 1)
SHAPES = (fixed(256, 256, 1), fixed(64, 256, 2), mixed(4), LONG_PROMPT)
# Shape, reference mode, and which trainers compute activations again in backward.
TRL_RACES: tuple[tuple[Shape, str, tuple[str, ...]], ...] = (
    *((shape, "colocated", ()) for shape in SHAPES),
    (LONG_PROMPT, "colocated", ("ours",)),
    (LONG_PROMPT, "colocated", ("trl", "ours")),
    (mixed(4), "cached", ()),
)
OWN_SHAPES = (mixed(2),)
# Prompt and response tokens of the points; the first three give the bytes for each token.
SMALL = [(64, 64), (128, 64), (64, 128)]
MEMORY_POINTS = [*SMALL, (64, 512), (64, 1024), (512, 64), (2048, 64)]


def main() -> None:
    from mipo_ray.models.embedded import prepare_embedded_model

    options = _options()
    model = str(prepare_embedded_model())
    vocabulary = json.loads(Path(model, "config.json").read_text())["vocab_size"]
    tables = {"check": check_losses, "trl": measure_trl, "own": measure_own, "memory": measure_memory}
    base = Specification("ours", model, "cpu", "float32", options.threads, "colocated")
    for name in options.tables.split(","):
        for table in tables[name](base, vocabulary, options):
            _write(options.output, name, table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each trainer")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--output", default="benchmarks/results/trainer", help="without suffix")
    options = parser.parse_args()
    if unknown := set(options.tables.split(",")) - set(TABLES):
        parser.error(f"--tables: expected some of {', '.join(TABLES)}, found {', '.join(sorted(unknown))}")
    return options


def check_losses(base: Specification, vocabulary: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Losses of the first steps of both trainers, from the same weights, on the same pairs.

    Ends the program where they differ by more than LOSS_TOLERANCE, or stay at ln 2, which would show nothing.
    """
    batches = [random_pairs(CHECK_SHAPE, vocabulary=vocabulary, seed=SEED + batch) for batch in range(CHECKED_BATCHES)]
    steps = [batches[step % CHECKED_BATCHES] for step in range(CHECKED_STEPS)]
    found = {
        f"{trainer}, {mode}": losses(replace(base, trainer=trainer, reference_mode=mode), steps)
        for trainer, mode in itertools.product(("trl", "ours"), ("colocated", "cached"))
    }
    expected = found["trl, colocated"]
    worst = max(abs(a - b) for values in found.values() for a, b in zip(values, expected, strict=True))
    moved = max(abs(value - LN_2) for value in expected)
    print(f"check: losses of {CHECKED_STEPS} steps differ by {worst:.2g} at most, and move by {moved:.2g}", flush=True)
    if not worst <= LOSS_TOLERANCE or moved < 100 * LOSS_TOLERANCE:
        sys.exit(f"check: expected at most {LOSS_TOLERANCE} apart and {100 * LOSS_TOLERANCE} from ln 2:\n{found}")
    yield {"losses": found, "worst_difference": worst, "largest_move": moved, "learning_rate": LEARNING_RATE}


def measure_trl(base: Specification, vocabulary: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Both trainers, in turns, in every one of TRL_RACES."""
    rows = []
    for shape, mode, checkpointing in TRL_RACES:
        pairs = random_pairs(shape, vocabulary=vocabulary, seed=SEED)
        contestants = {
            name: replace(
                base, trainer=name, reference_mode=mode, options={"gradient_checkpointing": name in checkpointing}
            )
            for name in ("trl", "ours")
        }
        found = race(contestants, pairs, repeats=options.repeats)
        row = {"shape": shape.name, "pairs": shape.pairs, "reference": mode, "checkpointing": checkpointing, **found}
        row["ratio"] = compare(found["trl"], found["ours"])
        rows.append(row)
        print(f"trl: {shape.name} {mode} {checkpointing}: {json.dumps(row['ratio'])}", flush=True)
        yield {"threads": base.threads, "rows": rows}


def measure_own(base: Specification, vocabulary: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every layout x reference mode x checkpointing; the three layouts of a row take turns."""
    rows = []
    for shape, mode, checkpointing in itertools.product(OWN_SHAPES, ("colocated", "cached", "adapter"), (False, True)):
        train = {"gradient_checkpointing": checkpointing, "lora": {"rank": 16 if mode == "adapter" else 0}}
        contestants = {
            layout: replace(base, reference_mode=mode, options={**train, "layout": layout})
            for layout in ("padded", "packed", "shared")
        }
        found = race(contestants, random_pairs(shape, vocabulary=vocabulary, seed=SEED), repeats=options.repeats)
        for layout, figures in found.items():
            place = {"shape": shape.name, "pairs": shape.pairs, "layout": layout, "reference": mode}
            rows.append({**place, "checkpointing": checkpointing, **figures})
        rates = ", ".join(f"{layout} {figures['pairs_per_second']:.2f}" for layout, figures in found.items())
        print(f"own: {shape.name} {mode} checkpointing {checkpointing}: pairs/s {rates}", flush=True)
        yield {"threads": base.threads, "rows": rows}


def measure_memory(base: Specification, vocabulary: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Peak memory of a forward and backward pass on one pair beside what the shapes of its tensors predict.

    Measured above what the process holds after a first pass over a few tokens, which are weights and gradients.
    """
    from mipo_ray.training.logprobs import CHUNK_BYTES

    hidden = json.loads(Path(base.model, "config.json").read_text())["hidden_size"]
    found = {}
    for prompt, response in MEMORY_POINTS:
        with ContestantProcess(replace(base, reference_mode="cached")) as contestant:
            few = random_pairs(fixed(2, 2, 1), vocabulary=vocabulary, seed=SEED)
            contestant.ask("forward_backward", pairs=few)
            contestant.ask("forget_memory")
            pairs = random_pairs(fixed(prompt, response, 1), vocabulary=vocabulary, seed=SEED)
            found[prompt, response] = contestant.ask("forward_backward", pairs=pairs) | contestant.ask("memory")
        print(f"memory: {prompt}/{response}: {found[prompt, response]}", flush=True)
    small, longer_prompt, longer_response = (found[point]["kept_bytes"] for point in SMALL)
    per_prompt_token = (longer_prompt - small) / 64
    per_response_token = (longer_response - small) / 64  # of both responses
    rows = []
    for (prompt, response), figures in found.items():
        kept = small + (prompt - 64) * per_prompt_token + (response - 64) * per_response_token
        # The head's part of backward: logits of a chunk, the gradient of its weight and of its input.
        chunk = min(CHUNK_BYTES, 2 * response * vocabulary * 4)
        head = chunk + vocabulary * hidden * 4 + figures["forward_tokens"] * hidden * 4
        rows.append(
            {
                "prompt": prompt,
                "response": response,
                **figures,
                "predicted_kept_bytes": kept,
                "predicted_bytes": kept + head,
                "full_logits_bytes": figures["forward_tokens"] * vocabulary * 4,
            }
        )
    yield {"chunk_bytes": CHUNK_BYTES, "rows": rows}


def _write(output: str, name: str, table: dict[str, Any]) -> None:
    """Adds a table to those that OUTPUT.json holds, and shows them all in OUTPUT.md."""
    path = Path(f"{output}.json")
    tables = json.loads(path.read_text()) if path.exists() else {}
    machine = f"{describe_machine()}, trl {importlib.metadata.version('trl')}"
    tables[name] = {"machine": machine, "seed": SEED, **table}
    path.write_text(json.dumps(tables, indent=2) + "\n")
    Path(f"{output}.md").write_text(markdown(tables))


if __name__ == "__main__":
    main()
