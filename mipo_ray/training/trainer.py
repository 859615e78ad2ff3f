"""Training on a Ray cluster: Ray Train starts the workers, starts them again, and keeps their checkpoints."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from mipo_ray.config.schema import Config
from mipo_ray.config.train import TrainConfig
from mipo_ray.errors import UserError
from mipo_ray.models.source import check_policy_model, local_model_directory
from mipo_ray.ray_cluster.resources import Request, worker_request
from mipo_ray.ray_cluster.watch import WorkerWatch, watch_workers
from mipo_ray.session import Stage
from mipo_ray.storage.faults import StorageError, full_disk
from mipo_ray.storage.manifests import TrainSummary
from mipo_ray.training.agreement import SamplerDisagrees
from mipo_ray.training.checkpoint import CheckpointRefused
from mipo_ray.training.checkpoint_books import drop_damaged_books
from mipo_ray.training.deepspeed_config import deepspeed_config
from mipo_ray.training.ray_worker import CHECKPOINTS, worker_loop
from mipo_ray.training.shares import StepShares
from mipo_ray.training.step import TrainingDiverged
from mipo_ray.training.stream import PairStream
from mipo_ray.training.trainable import check_trainable
from mipo_ray.training.worker_settings import WorkerSettings

# Below a stage: the log-probs of reference_mode cached.
REFERENCE_CACHE = "reference_logprobs"

Outcome = TrainSummary | TrainingDiverged | CheckpointRefused | SamplerDisagrees

# The newest, and the one before it for the time in which the newest is not complete.
_CHECKPOINTS_KEPT = 2

# How long Ray Train waits for a worker group's nodes before it asks for them anew, without end.
_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


def check_model_is_trainable(config: Config) -> None:
    """`begin_model_check`, and waits for it."""
    begin_model_check(config)()


def begin_model_check(config: Config) -> Callable[[], None]:
    """Begins to find out, on a node of the cluster and without weights, whether the initial model can be trained so and
    whether engines and trainer read the same model: of one that had to be downloaded this is told here first.

    The function that it returns waits for the end, and raises what `source.check_policy_model` and
    `trainable.check_trainable` raise, as a RayTaskError's cause.
    """
    task = ray.remote(num_cpus=1)(_check_model).options(name="check_model_is_trainable")
    checked = task.remote(config.model.source, config.windows, config.train, config.model.trust_remote_code)
    return lambda: ray.get(checked)


def _check_model(path: str, windows: dict[str, int], train: TrainConfig, trust_remote_code: bool) -> None:
    directory = local_model_directory(path, trust_remote_code)
    check_policy_model(directory, windows)
    check_trainable(directory, train, trust_remote_code=trust_remote_code)


@dataclass(frozen=True)
class Models:
    """Any two model paths: the policy that training starts from, and the reference that it is compared with."""

    policy: str
    reference: str


@dataclass(frozen=True)
class AllPairs:
    """Pairs that are all there: `count` rows in their final order."""

    rows: ray.data.Dataset
    count: int


@dataclass(frozen=True)
class ArrivingPairs:
    """Pairs that are still being generated; `failure` tells why there will be no more of them, None while all is
    well."""

    stream: PairStream
    failure: Callable[[], BaseException | None] = lambda: None


def train_policy(stage: Stage, models: Models, pairs: AllPairs | ArrivingPairs) -> TrainSummary:
    """Trains a policy on the round's pairs; rank 0 writes the result to `policy` below the stage.

    Step k trains on pairs k * batch_size to (k + 1) * batch_size, however many workers share them. A run directory that
    is a path must be seen by every worker (local on one machine, shared on a cluster). Each step is a `train_step`
    event with the keys of `worker.train_round`; a step that is done again after a restart is a second one.

    A worker group that loses a worker goes on after its newest checkpoint, `train.max_failures` times, with
    train.min_workers at least. So does another call for the same stage after this one failed or was killed: Ray Train
    keeps the checkpoints in `ray_train` below the stage, which is for the caller to remove.

    Raises UserError for no pairs, a dtype that cannot be trained, and checkpoints that cannot be gone on from;
    WaitTimeoutError when the workers get no nodes within ray.wait_timeout_minutes;
    TrainingDiverged when training diverges and SamplerDisagrees when another model than the one that is trained sampled
    the pairs (neither is tried again); and for any other failure RuntimeError, or UserError where the worker raised
    one, with the worker's message first.
    """
    config, resources = stage.config, stage.session.resources
    stream, pair_count = (None, pairs.count) if isinstance(pairs, AllPairs) else (pairs.stream, None)
    if pair_count == 0:
        raise UserError(f"{stage.path()}: expected at least one pair to train on, found none")
    deepspeed_config(config.train, resources.dtype)  # refuses here what no worker could train
    request = worker_request(config, resources)
    settings = WorkerSettings(
        policy_dir=models.policy,
        reference_dir=models.reference,
        output_dir="",
        # By dtype: a round that was begun on CPUs may go on on GPUs.
        reference_cache=stage.run.model_path(f"{stage.directory}/{REFERENCE_CACHE}/{resources.dtype}"),
        train=config.train.model_copy(update={"learning_rate": stage.session.learning_rate(stage.round)}),
        dtype=resources.dtype,
        device="cuda" if request.gpus > 0 else "cpu",
        seed=config.seed,
        pair_count=pair_count,
        trust_remote_code=config.model.trust_remote_code,
    )
    if wrong := drop_damaged_books(stage.run, f"{stage.directory}/{CHECKPOINTS}"):
        text = f"warning: {stage.path(CHECKPOINTS)}: Ray Train's list of checkpoints {wrong}; whole ones are used"
        stage.events.emit({"event": "warning", "text": text})
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # what the dashboard's Train API reads
    trainer = _Trainer(
        worker_loop,
        train_loop_config={"settings": settings, "stage": stage, "stream": stream},
        torch_config=TorchConfig(backend="nccl" if request.gpus > 0 else "gloo"),
        scaling_config=_scaling(config.train, request),
        run_config=_run_config(stage),
        datasets={"pairs": pairs.rows} if isinstance(pairs, AllPairs) else None,
        dataset_config=StepShares(config),
    )
    watched = functools.partial(watch_workers, request, config.ray.wait_timeout_minutes, trainer.end)
    if isinstance(pairs, ArrivingPairs):
        watched = functools.partial(watched, pairs.failure)
    with _named_failures(watched, stage.path(CHECKPOINTS), config.ray.wait_timeout_minutes):
        outcome: Outcome = trainer.fit().return_value  # type: ignore[attr-defined]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _scaling(train: TrainConfig, request: Request) -> ray.train.ScalingConfig:
    workers: Any = train.num_workers if train.min_workers is None else (train.min_workers, train.num_workers)
    return ray.train.ScalingConfig(
        num_workers=workers,  # as a tuple: at least, at most
        use_gpu=request.gpus > 0,
        resources_per_worker={kind: amount for kind, amount in request.each.items() if amount},
        label_selector=dict(request.selector) or None,  # type: ignore[call-arg]  # mypy sees that of Train V1
        placement_strategy=request.strategy,
    )


def _run_config(stage: Stage) -> ray.train.RunConfig:
    return ray.train.RunConfig(
        # Under a name of its own every call would start from the beginning.
        name=CHECKPOINTS,
        storage_path=stage.path(),
        storage_filesystem=stage.run.arrow_filesystem(),
        failure_config=ray.train.FailureConfig(max_failures=stage.config.train.max_failures),
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=_CHECKPOINTS_KEPT),
    )


class _Trainer(TorchTrainer):
    """Can be ended from another thread, also while Ray Train's controller waits for nodes and hears nothing else."""

    _controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        # Nothing is registered: Ray Train's handler would end the process before the run directory is in order.
        self._controller = controller

    def end(self) -> None:
        """Makes `fit`, where it runs in the main thread, raise ActorDiedError; the placement group goes as well."""
        if self._controller is not None:
            ray.kill(self._controller)


@contextlib.contextmanager
def _named_failures(
    watched: Callable[[], AbstractContextManager[WorkerWatch]], checkpoints: str, wait_minutes: float
) -> Iterator[None]:
    """For the time of a fit: watches that the workers get their nodes, and names what the fit failed of."""
    # Longer than the watch waits: asking anew would let the autoscaler forget the nodes that it is starting.
    os.environ[_START_TIMEOUT] = str(60 * wait_minutes + 60)
    watch = None
    try:
        with watched() as watch:
            yield
    except ray.train.TrainingFailedError as error:
        raise _worker_error(error) from error
    except ray.exceptions.ActorDiedError as error:
        if watch is not None and watch.failure is not None:
            raise watch.failure from None
        # Ray Train's controller reads the books of an earlier call when it is made, and dies of what it cannot read.
        if "CheckpointManagerInitializationError" not in str(error):
            raise
        raise UserError(
            f"{checkpoints}: the checkpoints of an interrupted training cannot be gone on from: "
            f"{str(error).strip().splitlines()[-1]}\nRemove {checkpoints} to train this round from its beginning."
        ) from error


def _worker_error(error: ray.train.TrainingFailedError) -> RuntimeError | UserError:
    for rank, failure in sorted(getattr(error, "worker_failures", {}).items()):
        # The text of Ray's own wrapper is the whole traceback, which `error` holds anyhow.
        reason = getattr(failure, "_base_exc", failure)
        message = f"training worker {rank}: {full_disk(reason) or reason}"
        if full_disk(reason):
            return StorageError(message)
        return UserError(message) if isinstance(reason, UserError) else RuntimeError(message)
    return RuntimeError(str(error))
