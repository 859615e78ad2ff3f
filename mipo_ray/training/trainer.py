"""DPO training on a Ray cluster: Ray Train starts the workers, and Ray Data streams each its share of the pairs."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from typing import Any

import ray
import ray.data
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from mipo_ray.config import Config
from mipo_ray.errors import UserError
from mipo_ray.models import local_model_directory
from mipo_ray.monitoring import Events
from mipo_ray.resources import Resources
from mipo_ray.storage import RunDirectory
from mipo_ray.training.engine import deepspeed_config
from mipo_ray.training.layout import PAIR_COLUMNS
from mipo_ray.training.worker import TrainingDiverged, TrainSummary, WorkerSettings, train_round


def train_policy(
    config: Config,
    pairs: ray.data.Dataset,
    pair_count: int,
    *,
    policy: str,
    reference: str,
    run: RunDirectory,
    stage: str,
    resources: Resources,
    events: Events,
) -> TrainSummary:
    """Trains `policy` (any model path) on the round's pairs; rank 0 writes the result to `stage`/policy of the run.

    `pairs` are `pair_count` rows in their final order: step k trains on rows k * batch_size to (k + 1) * batch_size,
    however many workers share them. Workers must have equally many pairs, so that up to num_workers - 1 pairs at the
    end are left out (`TrainSummary.pairs_unused`). A run directory that is a path must be seen by every
    worker (local on one machine, shared on a cluster). Each step is a `train_step` event with the keys of
    `worker.train_round`; Ray Train keeps its own books in `stage`/ray_train.

    A worker group that loses a worker starts this training again from its first step, `train.max_failures` times.
    Raises UserError for fewer pairs than workers and for a dtype that cannot be trained, TrainingDiverged when
    training diverges (which is not tried again), and RuntimeError with the worker's message first for any other
    failure.
    """
    train = config.train
    workers = train.num_workers
    if pair_count < workers:
        raise UserError(f"train.num_workers: {workers} workers need a pair each at least, found {pair_count} pairs")
    use_gpu = resources.gpus_per_worker > 0
    deepspeed_config(train, resources.dtype, workers)  # refuses here, and not in every worker, what cannot be trained
    settings = WorkerSettings(
        policy_dir=policy,
        reference_dir=reference,
        output_dir="",
        train=train,
        dtype=resources.dtype,
        device="cuda" if use_gpu else "cpu",
        seed=config.seed,
        pairs_per_worker=pair_count // workers,
        trust_remote_code=config.model.trust_remote_code,
    )
    options = ray.data.ExecutionOptions(preserve_order=True)
    trainer = TorchTrainer(
        _worker_loop,  # type: ignore[arg-type]  # its return value comes back, whatever the annotation says
        train_loop_config={"settings": settings, "run": run, "stage": stage, "events": events},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker=_worker_resources(config, resources)
        ),
        run_config=ray.train.RunConfig(
            storage_path=run.path(stage, "ray_train"),
            storage_filesystem=run.arrow_filesystem(),
            failure_config=ray.train.FailureConfig(max_failures=train.max_failures),
        ),
        datasets={"pairs": _in_step_blocks(pairs, pair_count, train.batch_size // workers, workers)},
        dataset_config=ray.train.DataConfig(execution_options=options),
    )
    outcome = _fit(trainer)
    if isinstance(outcome, TrainingDiverged):
        raise outcome
    return replace(outcome, pairs_unused=pair_count % workers)


def _fit(trainer: TorchTrainer) -> TrainSummary | TrainingDiverged:
    """What rank 0 returned."""
    interrupt_handler = signal.getsignal(signal.SIGINT)
    try:
        return trainer.fit().return_value  # type: ignore[attr-defined]
    except ray.train.TrainingFailedError as error:
        raise RuntimeError(_worker_message(error)) from error
    finally:
        # Ray Train leaves its own handler behind, which would go on to catch Ctrl-C for a training that is over.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt_handler)


def _in_step_blocks(
    pairs: ray.data.Dataset, pair_count: int, pairs_per_worker_step: int, workers: int
) -> ray.data.Dataset:
    """Blocks of one worker's share of a step.

    With the order preserved, the split deals blocks to the workers in turn, so that a step's blocks, one for each
    worker, are neighbours in the dataset, and the steps hold the same pairs whatever the number of workers.
    """
    pairs = pairs.select_columns(PAIR_COLUMNS)
    if pair_count % workers:
        # The split itself would drop some pair of the last step, which one depends on how it cuts blocks.
        pairs = pairs.limit(pair_count - pair_count % workers)
    return pairs.repartition(target_num_rows_per_block=pairs_per_worker_step, strict=True)


def _worker_loop(loop_config: dict[str, Any]) -> TrainSummary | TrainingDiverged:
    # Ray sets OMP_NUM_THREADS from the logical CPUs of the worker; on a CPU the cores themselves are what counts.
    threads = max(1, len(os.sched_getaffinity(0)) // ray.train.get_context().get_local_world_size())
    settings: WorkerSettings = loop_config["settings"]
    run: RunDirectory = loop_config["run"]
    events: Events = loop_config["events"]
    shard = ray.train.get_dataset_shard("pairs")
    assert shard is not None

    def pairs_in_epoch(epoch: int) -> Any:
        return shard.iter_batches(batch_size=settings.train.micro_batch_size, prefetch_batches=1)

    def report(metrics: dict[str, float]) -> None:
        events.emit({"event": "train_step", **metrics})

    try:
        with run.local_output(f"{loop_config['stage']}/policy") as output:
            settings = replace(
                settings,
                policy_dir=local_model_directory(settings.policy_dir, settings.trust_remote_code),
                reference_dir=local_model_directory(settings.reference_dir, settings.trust_remote_code),
                output_dir=output,
                threads=threads,
            )
            return train_round(settings, pairs_in_epoch, report)
    except TrainingDiverged as error:
        # All workers diverge together. Returned and not raised: a worker that fails is started again.
        return error


def _worker_resources(config: Config, resources: Resources) -> dict[str, float]:
    worker = {"CPU": config.train.cpus_per_worker}
    if resources.gpus_per_worker:
        worker["GPU"] = resources.gpus_per_worker
    return worker


def _worker_message(error: ray.train.TrainingFailedError) -> str:
    for rank, failure in sorted(getattr(error, "worker_failures", {}).items()):
        # The text of Ray's own wrapper is the whole traceback, which `error` holds anyhow.
        return f"training worker {rank}: {getattr(failure, '_base_exc', failure)}"
    return str(error)
