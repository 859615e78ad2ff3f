"""Starts contestants of the trainer benchmark and has them run the same steps in turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.trainer_contestants import Specification
from benchmarks.trainer_workload import useful_tokens

Pairs = list[dict[str, Any]]


class ContestantFailed(RuntimeError):
    """A contestant's process ended; the message is the end of what it printed."""


class ContestantProcess:
    """A contestant in a process of its own, which waits idly until it is asked something."""

    def __init__(self, specification: Specification) -> None:
        # What torch, DeepSpeed and datasets leave in temporary directories goes away with this one.
        self._scratch = tempfile.TemporaryDirectory(prefix="contestant-")
        self._log = Path(self._scratch.name, "log")
        environment = os.environ | {
            "OMP_NUM_THREADS": str(specification.threads),
            "TMPDIR": self._scratch.name,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.trainer_contestants"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        self._say(asdict(specification))

    def __enter__(self) -> ContestantProcess:
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._scratch.cleanup()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer of the method `do` of `Contestant`. Raises ContestantFailed when the process ends instead."""
        return self._say({"do": do, **arguments})

    def _say(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            print(json.dumps(request), file=stdin, flush=True)
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise ContestantFailed(f"exit status {self._process.wait()}:\n{self._log.read_text()[-4000:]}")
        return json.loads(answer)


def race(
    contestants: Mapping[str, Specification],
    pairs: Pairs,
    *,
    repeats: int,
    warm_up: int = 1,
) -> dict[str, dict[str, Any]]:
    """What each contestant needs for an optimizer step on `pairs`, by the contestants' names.

    They take turns (first, second, first, second, ...), so that a machine that slows down slows all of them. Figures:
    seconds (of each step), median_seconds, pairs_per_second, tokens_per_second (without padding), peak_bytes (of
    resident memory), flops, and padding_share, where the trainer has one.
    """
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(ContestantProcess(replace(specification, known=[pairs])))
            for name, specification in contestants.items()
        }
        steps: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
        for number in range(warm_up + repeats):
            for name, contestant in running.items():
                if number == warm_up:
                    contestant.ask("forget_memory")  # the peak is one of steps, and not of loading
                steps[name].append(contestant.ask("step", pairs=pairs))
        found = {}
        for name, contestant in running.items():
            seconds = [step["seconds"] for step in steps[name][warm_up:]]
            median = statistics.median(seconds)
            found[name] = {
                "seconds": seconds,
                "median_seconds": median,
                "pairs_per_second": len(pairs) / median,
                "tokens_per_second": useful_tokens(pairs) / median,
                "peak_bytes": contestant.ask("memory")["peak_bytes"],
                **{key: value for key, value in steps[name][-1].items() if key == "padding_share"},
                # Last, since counting takes time and memory of its own.
                **contestant.ask("count_flops", pairs=pairs),
            }
        return found


def losses(specification: Specification, steps: list[Pairs]) -> list[float]:
    """The losses of one optimizer step after the other."""
    with ContestantProcess(replace(specification, known=steps)) as contestant:
        return [contestant.ask("step", pairs=pairs)["loss"] for pairs in steps]


def compare(baseline: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Ratios to `baseline` of what `race` found: above 1 is faster, of memory below 1 is leaner.

    speed: of the medians; speed_range: the smallest and the largest of single rounds; peak memory; and flops, the speed
    that the counted FLOPs alone would give.
    """
    rounds = [theirs / own for theirs, own in zip(baseline["seconds"], ours["seconds"], strict=True)]
    return {
        "speed": baseline["median_seconds"] / ours["median_seconds"],
        "speed_range": [min(rounds), max(rounds)],
        "peak_bytes": ours["peak_bytes"] / baseline["peak_bytes"],
        "flops": baseline["flops"] / ours["flops"],
    }
