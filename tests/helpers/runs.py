"""Runs of the commands as drivers of the session's cluster: their arguments, their ends, and what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

# Ray Data 2.60 lists files with threads of its own, and the one that ends them is itself interrupted where it loses a
# race, on a busy machine: its worker prints this, and nothing is lost.
_LOST_RACE_OF_RAY = re.compile(r"Exception in thread \S*completion-signaler:\n(?:.*\n)*?.*\bInterruptedError\b")

TOPICS = ["bread", "rivers", "stars", "maps", "tea", "trains", "moss", "chess", "rain", "clocks"]


def write_prompts(path: Path, prefix: str, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            row = {
                "prompt_id": f"{prefix}-{index}",
                "prompt": f"Question {index}: what should I know about {TOPICS[index % len(TOPICS)]}?",
                "context": f"I am user {index} of {prefix} and I like {TOPICS[(index + 3) % len(TOPICS)]}.",
                "group": f"{prefix}-user-{index}",
            }
            file.write(json.dumps(row) + "\n")


def arguments(run_dir: Path | str, model: Path, prompts: Path, *overrides: str) -> list[str]:
    return [
        f"{prompts}/recipe.yaml",
        f"run_dir={run_dir}",
        f"model.path={model}",
        "model.max_model_len=256",
        f"prompts.path={prompts}/train.jsonl",
        f"evaluate.prompts.path={prompts}/held_out.jsonl",
        "evaluate.other_prompts=2",
        "generation.sampling.max_tokens=16",
        "generation.sampling.temperature=1.0",
        "conditioning.block_size=8",
        "train.learning_rate=1e-3",
        *overrides,
    ]


def start(address: str, *options: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Starts the command as a driver of the session's cluster."""
    command = [sys.executable, "-m", "mipo_ray.run", f"ray.address={address}", *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(environment or {})},
    )


@contextlib.contextmanager
def joined_cluster() -> Iterator[None]:
    """Commands that are called in this process find the session's cluster joined, and do not leave it.

    The start of a process of its own, with its imports, costs more than what most refusals take.
    """
    import ray
    from ray.data import DataContext

    with pytest.MonkeyPatch.context() as patch, DataContext.current(DataContext.get_current().copy()):
        patch.setattr(ray, "init", lambda **_: None)
        patch.setattr(ray, "shutdown", lambda: None)
        yield


def finish(process: subprocess.Popen[str], *, seconds: float = 600) -> str:
    """Its output, once it ended well."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output
    return output


def has_traceback(output: str) -> bool:
    return "Traceback" in _LOST_RACE_OF_RAY.sub("", output)


def kill_when(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """SIGKILL at the first moment that `condition` holds."""
    wait_until(process, condition)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def stop_when(process: subprocess.Popen[str], stop: signal.Signals, condition: Callable[[], bool]) -> None:
    """Ctrl-C or SIGTERM at the first moment that `condition` holds: it ends in order, and says how to go on."""
    wait_until(process, condition)
    process.send_signal(stop)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + stop, output
    assert f"stopped by {stop.name}: the same command resumes this run\n" in output
    assert not has_traceback(output), output


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the moment to stop it never came"
        time.sleep(0.05)


def events(run_dir: Path) -> list[dict]:
    if not (run_dir / "metrics.jsonl").exists():
        return []
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_pairs(run_dir: Path, round_index: int) -> list[dict]:
    stage = run_dir / f"rounds/{round_index:03d}/generate"
    files = json.loads((stage / "manifest.json").read_text())["files"]
    return pyarrow.parquet.ParquetDataset([stage / name for name in files], partitioning=None).read().to_pylist()


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and modification time."""
    return {
        str(path.relative_to(directory)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def start_evaluation(address: str, *options: str) -> subprocess.Popen[str]:
    """Starts the evaluate command as a driver of the session's cluster."""
    words = [sys.executable, "-m", "mipo_ray.evaluate", *options, f"ray.address={address}"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def examples(run_dir: Path, policy: str, task: str) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(run_dir / policy / "tasks" / task / "examples", partitioning=None).to_pylist()


def run_command(address: str, *options: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """The command as a driver of the session's cluster: its exit code and its output."""
    process = subprocess.run(
        [sys.executable, "-m", "mipo_ray.run", f"ray.address={address}", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        env={**os.environ, **(environment or {})},
    )
    return process.returncode, process.stdout


def read_directory(directory: Path) -> list[dict[str, Any]]:
    """The rows of the Parquet files of one directory."""
    tables = [pyarrow.parquet.read_table(path, partitioning=None) for path in sorted(directory.glob("*.parquet"))]
    return [row for table in tables for row in table.to_pylist()]
