"""Checkpoints inside a round: DeepSpeed's sharded files, and how far training had come.

Every worker writes its own shard to a local directory; who calls this brings the shards of all workers together (Ray
Train uploads them to the run directory's filesystem) and hands them back when training starts again.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import distributed

_TAG = "state"
_UNIVERSAL = "universal"


@dataclass(frozen=True)
class Progress:
    """How far a round's training has come."""

    steps: int = 0  # optimizer steps that are done
    tokens: int = 0  # of the sequences trained on, see `worker.TrainSummary`
    first_loss: float = float("nan")
    last_loss: float = float("nan")


@dataclass(frozen=True)
class Checkpoints:
    """Where checkpoints go and come from.

    publish(directory, steps): called by every worker with the local directory of its shard, which may go afterwards.
    latest(): a context with the local directory that holds the newest checkpoint, all shards of it, or None.
    """

    publish: Callable[[Path, int], None]
    latest: Callable[[], AbstractContextManager[Path | None]]


def no_checkpoints() -> Checkpoints:
    """For training that starts from the beginning and saves nothing on its way."""
    return Checkpoints(publish=lambda directory, steps: None, latest=contextlib.nullcontext)


def save_checkpoint(engine: Any, directory: Path, progress: Progress) -> None:
    """Writes this worker's shard of a DeepSpeed engine to `directory`; every worker must call it."""
    state = {"progress": asdict(progress), "workers": distributed.get_world_size()}
    with contextlib.redirect_stdout(io.StringIO()):
        engine.save_checkpoint(str(directory), tag=_TAG, client_state=state, exclude_frozen_parameters=True)


def load_checkpoint(engine: Any, directory: Path) -> Progress:
    """Restores weights and optimizer of a DeepSpeed engine from all shards; every worker must call it.

    A checkpoint of another number of workers is first converted to DeepSpeed's universal format, on local disk.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        path, state = engine.load_checkpoint(str(directory), tag=_TAG, load_module_strict=False)
    if path is None:
        raise RuntimeError(f"{directory}: expected a DeepSpeed checkpoint {_TAG!r}, found none")
    return Progress(**state["progress"])
