"""What Ray Train runs in each of its workers.

A module of its own that imports no torch: Ray Train's controller has to import it as well, each round in a new process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import posixpath
import resource
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train

from mipo_ray.models.source import local_model_directory
from mipo_ray.monitoring.idle import IdleClock
from mipo_ray.paths import plain_path
from mipo_ray.ray_cluster.gpus import check_torch_gpu
from mipo_ray.session import Stage
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.training.shares import own_steps
from mipo_ray.training.steps import Steps, known_steps
from mipo_ray.training.stream import PairStream, streamed_steps
from mipo_ray.training.worker_settings import WorkerSettings

# Below a stage: Ray Train's own books and the checkpoints.
CHECKPOINTS = "ray_train"


def worker_loop(loop_config: dict[str, Any]) -> Any:
    """One worker's training; returns its summary, or the error that all workers met together (`trainer.Outcome`)."""
    from mipo_ray.training.agreement import SamplerDisagrees
    from mipo_ray.training.checkpoint import CheckpointRefused, Checkpoints
    from mipo_ray.training.step import TrainingDiverged
    from mipo_ray.training.worker import train_round

    # Ray sets OMP_NUM_THREADS from the logical CPUs of the worker; on a CPU the cores themselves are what counts.
    context = ray.train.get_context()
    threads = max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size())
    settings: WorkerSettings = loop_config["settings"]
    stage: Stage = loop_config["stage"]
    stream: PairStream | None = loop_config["stream"]
    if settings.device == "cuda":
        check_torch_gpu(settings.dtype)  # raised: another node may have what this one lacks

    def steps(settings: WorkerSettings) -> Steps:
        workers = context.get_world_size()
        if stream is not None:
            return streamed_steps(stream, settings, context.get_world_rank(), workers)
        shard = ray.train.get_dataset_shard("pairs")
        assert shard is not None
        return known_steps(settings, lambda epoch: own_steps(shard, settings.train, workers))

    # The workers move in step: what rank 0 waits, all of them wait.
    idle = IdleClock(context.get_world_size() * stage.session.resources.gpus_per_worker)

    def report(metrics: dict[str, float]) -> None:
        idle.work_was(metrics["step_seconds"])
        memory = {"memory_bytes": peak_memory(settings.device)}
        stage.events.emit({"event": "train_step", **metrics, **memory, **idle.take()})

    def publish(directory: Path, steps: int) -> None:
        _publish(stage.run, f"{stage.directory}/{CHECKPOINTS}", directory, steps)

    if context.get_world_rank() == 0:
        stage.events.tell({"event": "ready"})
    try:
        with stage.run.local_output(f"{stage.directory}/policy") as output:
            settings = replace(
                settings,
                policy_dir=local_model_directory(settings.policy_dir, settings.trust_remote_code),
                reference_dir=local_model_directory(settings.reference_dir, settings.trust_remote_code),
                output_dir=output,
                threads=threads,
            )
            latest = functools.partial(_latest, stage)
            checkpoints = Checkpoints(publish, latest, _scratch(stage, is_first=context.get_world_rank() == 0))
            return train_round(settings, steps(settings), report, checkpoints)
    except (TrainingDiverged, CheckpointRefused, SamplerDisagrees) as error:
        # All workers meet it together. Returned and not raised: a worker that fails is started again.
        return error


def peak_memory(device: str) -> int:
    """The most bytes that this process has held so far: of its GPU, on a CPU of main memory."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_reserved())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _scratch(stage: Stage, *, is_first: bool) -> Path | None:
    """On a path that every node sees, a directory beside the checkpoints: a shard is written there once, and renamed.
    Elsewhere none, as DeepSpeed writes to paths alone: a shard goes through the node's disk.

    The first worker makes it anew, without what killed workers left; no worker saves before all of them have met.
    """
    if not stage.run.is_local:
        return None
    scratch = Path(stage.path(CHECKPOINTS, "shards"))
    if is_first:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True, exist_ok=True)
    return Path(plain_path(str(scratch)))


def _publish(run: RunDirectory, checkpoints: str, shard: Path, steps: int) -> None:
    """Brings the shards of all workers together below `checkpoints` of the run; returns when Ray Train knows of it."""
    from torch import distributed

    def upload(_: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        (run.take if run.is_local else run.upload)(str(shard), f"{checkpoints}/{name}")
        # Ray Train would take note of a checkpoint without the shard of a worker whose node is being taken away.
        distributed.barrier()
        return ray.train.Checkpoint(run.path(checkpoints, name), run.arrow_filesystem())

    checkpoint = ray.train.Checkpoint.from_directory(shard)
    ray.train.report({"steps": steps}, checkpoint=checkpoint, checkpoint_upload_fn=upload)
    # It does so some time after the report, and a worker that is lost before would cost the checkpoint.
    ray.train.get_all_reported_checkpoints(consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED)


def _latest(stage: Stage) -> AbstractContextManager[Path | None]:
    """The newest checkpoint of the stage that is whole; None where none is, which is told where there were some."""
    from mipo_ray.training.whole_checkpoints import first_whole

    run, checkpoints = stage.run, f"{stage.directory}/{CHECKPOINTS}"
    # Ray Train names them by the time. What is newer than it knows of was not complete; where it knows of none, since
    # its list of them was lost, the notes beside the shards tell.
    newest = ray.train.get_checkpoint()
    known = [] if newest is None else [posixpath.basename(newest.path.rstrip("/"))]
    found = {file.partition("/")[0] for file in run.list_files(checkpoints)}
    older = [name for name in found if name.startswith("checkpoint_") and all(name < other for other in known)]

    def warn(text: str) -> None:
        stage.events.emit({"event": "warning", "text": text})

    @contextlib.contextmanager
    def opened(name: str) -> Iterator[Path]:
        with ray.train.Checkpoint(run.path(checkpoints, name), run.arrow_filesystem()).as_directory() as directory:
            yield Path(plain_path(directory))

    return first_whole(run.path(checkpoints), [*known, *sorted(older, reverse=True)], opened, warn)
