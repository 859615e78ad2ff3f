"""Checkpoints inside a round: DeepSpeed's sharded files, and how far training had come.

Every worker writes its own shard to a local directory; who calls this brings the shards of all workers together (Ray
Train uploads them to the run directory's filesystem) and hands them back when training starts again, perhaps with
another number of workers.

DeepSpeed writes pickles and unpickles them as they are, so that whoever can write to a run directory could run code on
every worker. They are unpickled here by PyTorch's restricted reader, which makes tensors, plain values and the few
classes that are named below, and calls nothing else.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import pickle
import re
import socket
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from mipo_ray.errors import cut
from mipo_ray.training.whole_checkpoints import NOTED, PROGRESS, CheckpointRefused, gathered, note_files

_TAG = "state"
_UNIVERSAL = "universal"


@dataclass(frozen=True)
class Progress:
    """How far a round's training has come."""

    steps: int = 0  # optimizer steps that are done
    pairs: int = 0  # pairs of those steps, each as often as there were epochs with it; not in earlier releases
    tokens: int = 0  # of the sequences trained on, see `storage.manifests.TrainSummary`
    first_loss: float = float("nan")
    last_loss: float = float("nan")


@dataclass(frozen=True)
class Checkpoints:
    """Where checkpoints go and come from.

    publish(directory, steps): called by every worker with the local directory of its shard, which may go afterwards.
    latest(): a context with the local directory that holds the newest whole checkpoint, all shards of it, or None.
    scratch: the directory below which shards are written before they are published; None: the temporary one.
    """

    publish: Callable[[Path, int], None]
    latest: Callable[[], AbstractContextManager[Path | None]]
    scratch: Path | None = None


def save_checkpoint(engine: Any, directory: Path, progress: Progress) -> None:
    """Writes this worker's shard of a DeepSpeed engine to `directory`; every worker must call it."""
    with _quiet():
        engine.save_checkpoint(str(directory), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)
    if distributed.get_rank() == 0:
        facts = {
            "workers": distributed.get_world_size(),
            "engine": _kind(engine),
            "progress": asdict(progress),
            NOTED: True,
        }
        (directory / PROGRESS).write_text(json.dumps(facts))
    note_files(directory, distributed.get_rank())


def load_checkpoint(engine: Any, directory: Path) -> Progress:
    """Restores weights and optimizer of a DeepSpeed engine from all shards; every worker must call it.

    A checkpoint of another number of workers is first converted to DeepSpeed's universal format, by one process of
    each node, on its local disk (for a while 24 bytes for each parameter that is trained). Without ZeRO there are no
    shards, and nothing is to be converted.

    Raises CheckpointRefused for a checkpoint of another ZeRO stage or dtype, which DeepSpeed cannot load, and for one
    whose progress cannot be read; RuntimeError for a directory without one.
    """
    if not (directory / PROGRESS).is_file():
        raise RuntimeError(f"{directory}: expected a checkpoint with {PROGRESS}, found none")
    written_with, workers, progress = _read_progress(directory / PROGRESS)
    if written_with != _kind(engine):
        raise CheckpointRefused(
            f"{directory}: this checkpoint was written with {cut(str(written_with))}, and training now runs with "
            f"{_kind(engine)}; set train.zero_stage and model.dtype back, or remove the checkpoints"
        )
    if workers == distributed.get_world_size() or not engine.zero_optimization():
        _load(engine, directory, _TAG)
    else:
        with _universal(directory) as converted, _universal_loading(engine):
            _load(engine, converted, _UNIVERSAL)
        _own_step_counters(engine)
    return progress


def _read_progress(path: Path) -> tuple[str, int, Progress]:
    """What a checkpoint was written with, by how many workers, and how far it is."""
    try:
        facts = json.loads(path.read_text())
        return facts["engine"], int(facts["workers"]), Progress(**facts["progress"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointRefused(
            f"{path}: expected the progress of a checkpoint as save_checkpoint writes it, found something else "
            f"({type(error).__name__}: {cut(str(error))}); remove the checkpoints"
        ) from None


def _kind(engine: Any) -> str:
    """What a checkpoint cannot be loaded without, in words."""
    dtype = "bfloat16" if engine.bfloat16_enabled() else "float32"
    return f"ZeRO stage {engine.zero_optimization_stage()} in {dtype}"


def _load(engine: Any, directory: Path, tag: str) -> None:
    with _quiet(), only_numbers():
        # Frozen weights are not in the checkpoint.
        path, _ = engine.load_checkpoint(str(directory), tag=tag, load_module_strict=False)
    if path is None:
        raise RuntimeError(f"{directory}: expected a DeepSpeed checkpoint {tag!r}, found none")


@contextlib.contextmanager
def _universal(directory: Path) -> Iterator[Path]:
    """A directory of this node that holds the checkpoint in the universal format while all workers are inside."""
    with tempfile.TemporaryDirectory(prefix="mipo-ray-universal-") as scratch:
        node = socket.gethostname()
        first_of_node = gathered(node).index(node) == distributed.get_rank()
        problem, is_refused = None, False
        if first_of_node:
            try:
                _convert(directory / _TAG, Path(scratch) / _UNIVERSAL)
            except CheckpointRefused as error:
                problem, is_refused = str(error), True
            except Exception as error:  # told to all, who would else wait for this process
                problem = f"{type(error).__name__}: {error}"
        # This also makes the others wait for the conversion.
        found = gathered((node, scratch, first_of_node, problem))
        refused = gathered(is_refused)
        for (other_node, _, _, reason), is_foreign in zip(found, refused, strict=True):
            if is_foreign:
                raise CheckpointRefused(reason)
            if reason is not None:
                raise RuntimeError(
                    f"{directory}: cannot be converted on {other_node} to {distributed.get_world_size()} workers: "
                    f"{reason}"
                )
        yield next(Path(path) for where, path, is_first, _ in found if where == node and is_first)
        distributed.barrier()


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        # In this process: Ray's workers and CUDA do not survive a fork.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # What it misses in ZeRO 1 and 2 is a list of exceptions, of which data parallelism has none.
        inject_missing_state=True,
    )
    with _quiet(), only_numbers():
        ds_to_universal.main(arguments)


@contextlib.contextmanager
def only_numbers() -> Iterator[None]:
    """Inside it `torch.load`, whatever it is told, reads tensors, plain values and `_known_classes` alone.

    DeepSpeed calls it at dozens of places and tells each to unpickle whatever is there. Raises CheckpointRefused, which
    names the file, for anything else; nothing of it has run then.
    """
    load = torch.load

    def restricted(file: Any, *arguments: Any, **options: Any) -> Any:
        options |= {"weights_only": True}
        try:
            with torch.serialization.safe_globals(_known_classes()):
                return load(file, *arguments, **options)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f"found {found[1]}" if found else f"found something else: {cut(str(error))}"
            raise CheckpointRefused(
                f"{file}: expected a checkpoint of tensors and plain values, {what}, which may run a program; nothing "
                "of it was run. Remove the round's checkpoints to train it again."
            ) from None

    instead: Any = restricted
    torch.load = instead
    try:
        yield
    finally:
        torch.load = load


def _known_classes() -> list[Any]:
    """What DeepSpeed's checkpoints hold beside tensors and plain values; making one calls nothing."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, Namespace]


@contextlib.contextmanager
def _universal_loading(engine: Any) -> Iterator[None]:
    """The engine as if its configuration had said checkpoint.load_universal, which only this one load needs."""
    engine.load_universal_checkpoint = lambda: True
    try:
        yield
    finally:
        del engine.load_universal_checkpoint


def _own_step_counters(engine: Any) -> None:
    """Gives each tensor of the optimizer a step counter of its own, on its device.

    After a universal load ZeRO 3 has one counter for all, which each tensor's update would raise, and all are on the
    CPU, which the fused AdamW refuses on a GPU.
    """
    for parameter, state in engine.optimizer.optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone().to(parameter.device)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what DeepSpeed prints; its errors remain."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
