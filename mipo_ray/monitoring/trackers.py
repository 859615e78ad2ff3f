"""Optional experiment trackers: TensorBoard, MLflow and Weights & Biases get the numbers of metrics.jsonl.

Nothing is imported before a tracker is asked for. Addresses and keys come from the environment as each of them
documents it (MLFLOW_TRACKING_URI, WANDB_API_KEY, WANDB_MODE=offline, ...), never from the configuration. A number is
called <stage>/<event>/<key>, and its step is which event of this kind and stage it is, from 0, over all processes of
the run: for train/train_step that is the optimizer step, for evaluate/results 0 is the base.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import posixpath
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from mipo_ray.config.yaml_text import load_yaml
from mipo_ray.errors import UserError
from mipo_ray.monitoring.metrics import run_label
from mipo_ray.redaction import redacted_values
from mipo_ray.storage.records import read_record
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.terminal import say_error

PROJECT = "mipo-ray"
IDS = "ids.json"
DIRECTORY = "trackers"  # below the run directory: what trackers keep on the disk

# Tracker -> the module it needs, and how to install it. tensorboardX comes with Ray.
PACKAGES = {
    "tensorboard": ("tensorboardX", "tensorboardX"),
    "mlflow": ("mlflow", "mlflow"),
    "wandb": ("wandb", "wandb"),
}
_NOT_NUMBERS = ("time", "round")


class TrackerError(UserError):
    """A tracker cannot be used: its package is not installed, or it does not start."""


class Tracker(Protocol):
    """What the event writer needs of a tracker."""

    def log(self, prefix: str, numbers: Mapping[str, float], step: int, seconds: float) -> None:
        """Records the numbers of one event; `seconds` since the epoch."""

    def flush(self) -> None:
        """Brings what was logged to storage."""

    def close(self, succeeded: bool) -> None:
        """Ends the tracker's run, as finished or as failed."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises TrackerError, with what to install, for a tracker whose package is not there; imports none."""
    for name in names:
        module, package = PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            raise TrackerError(
                f"trackers: {name} needs the package {package}, which is not installed here: pip install {package}, on "
                "the node of the driver, or leave it out of trackers"
            )


def tracker_environment() -> dict[str, str]:
    """The environment variables of this process that the trackers read."""
    return {name: value for name, value in os.environ.items() if name.startswith(("MLFLOW_", "WANDB_"))}


class Trackers:
    """The trackers of a run: none until `open`. One that fails on the way is left out from then on, and said to be."""

    def __init__(self, warn: Callable[[str], None] = say_error) -> None:
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        self._steps: Counter[str] = Counter()

    def open(self, names: Sequence[str], run: RunDirectory, environment: Mapping[str, str]) -> None:
        """Starts the trackers in this process, with the driver's environment; raises TrackerError."""
        for variable, value in environment.items():
            os.environ.setdefault(variable, value)
        check_trackers(names)
        for name in names:
            try:
                self._open[name] = _STARTERS[name](run)
            except TrackerError:
                raise
            except Exception as error:  # each has its own exceptions, for a wrong key as for a server that is away
                raise TrackerError(f"trackers: {name} does not start: {type(error).__name__}: {error}") from None

    def count(self, event: Mapping[str, Any]) -> int:
        """Takes note of an event; returns its step."""
        prefix = _prefix(event)
        self._steps[prefix] += 1
        return self._steps[prefix] - 1

    def log(self, event: Mapping[str, Any]) -> None:
        """Passes the numbers of an event on."""
        step = self.count(event)
        numbers = {
            name: float(value)
            for name, value in event.items()
            if name not in _NOT_NUMBERS and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for name in list(self._open):
            with self._left_out_when_it_fails(name):
                self._open[name].log(_prefix(event), numbers, step, event["time"])

    def flush(self) -> None:
        """Brings what was logged to storage."""
        for name in list(self._open):
            with self._left_out_when_it_fails(name):
                self._open[name].flush()

    def close(self, succeeded: bool) -> None:
        """Ends the trackers' runs."""
        for name in list(self._open):
            with self._left_out_when_it_fails(name):
                self._open.pop(name).close(succeeded)

    @contextlib.contextmanager
    def _left_out_when_it_fails(self, name: str) -> Iterator[None]:
        # A tracking server that is away must not end a training; metrics.jsonl has every number.
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            self._warn(f"tracker {name} failed and gets no more numbers: {type(error).__name__}: {error}")


def _prefix(event: Mapping[str, Any]) -> str:
    return f"{event.get('stage')}/{event.get('event')}"


class TensorBoard:
    """Event files in trackers/tensorboard of the run directory; `tensorboard --logdir` reads them."""

    def __init__(self, run: RunDirectory):
        from tensorboardX import SummaryWriter

        self._run = run
        self._name = f"{DIRECTORY}/tensorboard"
        self._directory = run.path(self._name) if run.is_local else tempfile.mkdtemp(prefix="mipo-ray-tensorboard-")
        # Files are named by second and host alone, and a run that goes on must not overwrite what it wrote before.
        self._writer = SummaryWriter(self._directory, filename_suffix=f".{time.time_ns()}")

    def log(self, prefix: str, numbers: Mapping[str, float], step: int, seconds: float) -> None:
        """Records the numbers of one event."""
        for key, value in numbers.items():
            self._writer.add_scalar(f"{prefix}/{key}", value, step, walltime=seconds)

    def flush(self) -> None:
        """Writes the files; an object store gets them anew, as it cannot append."""
        self._writer.flush()
        if not self._run.is_local:
            self._run.upload(self._directory, self._name)

    def close(self, succeeded: bool) -> None:
        """Writes the files for the last time."""
        self._writer.close()
        self.flush()


class MLflow:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME (mipo-ray) at MLFLOW_TRACKING_URI.

    Without an address, a SQLite file in trackers/ of a local run directory.
    """

    def __init__(self, run: RunDirectory):
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if address is None:
            if not run.is_local:
                raise TrackerError("expected MLFLOW_TRACKING_URI in the environment, as the run directory is not local")
            _make_private(run.path(DIRECTORY))
            address = f"sqlite:///{run.path(DIRECTORY, 'mlflow.db')}"
        self._client = MlflowClient(tracking_uri=address)
        known = _stored_id(run, "mlflow")
        if known is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
            created = self._client.create_run(experiment_id, run_name=_run_name(run), tags={"run": run_label(run.url)})
            known = created.info.run_id
            _store_id(run, "mlflow", known)
            parameters = [Param(name, str(value)[:6000]) for name, value in run_parameters(run).items()]
            self._client.log_batch(known, params=parameters[:100])
            for start in range(100, len(parameters), 100):  # as many as one request may hold
                self._client.log_batch(known, params=parameters[start : start + 100])
        else:
            self._client.update_run(known, status="RUNNING")
        self.run_id = known

    def log(self, prefix: str, numbers: Mapping[str, float], step: int, seconds: float) -> None:
        """Records the numbers of one event."""
        metrics = [self._metric(f"{prefix}/{key}", value, int(seconds * 1000), step) for key, value in numbers.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self, succeeded: bool) -> None:
        """Ends the run."""
        self._client.set_terminated(self.run_id, "FINISHED" if succeeded else "FAILED")


class WeightsAndBiases:
    """A run of the project WANDB_PROJECT (mipo-ray); its files in trackers/ of a local run directory."""

    def __init__(self, run: RunDirectory):
        import wandb

        known = _stored_id(run, "wandb")
        if known is None:
            # Two runs at the same path, one after the other, are two runs.
            known = hashlib.sha256(f"{run.url}/{time.time_ns()}".encode()).hexdigest()[:16]
            _store_id(run, "wandb", known)
        directory = run.path(DIRECTORY) if run.is_local else tempfile.mkdtemp(prefix="mipo-ray-wandb-")
        _make_private(directory)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=_run_name(run),
            id=known,
            resume="allow",
            dir=directory,
            config=run_parameters(run),
            settings=wandb.Settings(console="off", quiet=True),
        )
        self._prefixes: set[str] = set()

    def log(self, prefix: str, numbers: Mapping[str, float], step: int, seconds: float) -> None:
        """Records the numbers of one event; the axis of each kind of event is its own `index`."""
        if prefix not in self._prefixes:
            self._prefixes.add(prefix)
            self._run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/index")
        row = {f"{prefix}/{key}": value for key, value in numbers.items()}
        self._run.log({**row, f"{prefix}/index": step, "seconds": seconds})

    def flush(self) -> None:
        """Nothing waits: the package has a process of its own that sends."""

    def close(self, succeeded: bool) -> None:
        """Ends the run."""
        self._run.finish(exit_code=0 if succeeded else 1)


_STARTERS: dict[str, Callable[[RunDirectory], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}


def run_parameters(run: RunDirectory) -> dict[str, Any]:
    """The resolved configuration of the run as dotted keys and values; secrets of earlier versions are left out."""

    def flat(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {key: item for name, part in value.items() for key, item in flat(f"{prefix}.{name}", part).items()}

    parameters = flat("", redacted_values(load_yaml(run.read_text("config.yaml") or "{}")))
    return {name.removeprefix("."): value for name, value in parameters.items() if name}


def _make_private(directory: str) -> None:
    """Makes a directory for files of a tracker, which hold the configuration, for its owner alone."""
    os.makedirs(directory, mode=0o700, exist_ok=True)


def _run_name(run: RunDirectory) -> str:
    return posixpath.basename(run_label(run.url).rstrip("/"))


def _stored_id(run: RunDirectory, tracker: str) -> str | None:
    """The id under which an earlier process of the run was tracked."""
    return _stored_ids(run).get(tracker)


def _store_id(run: RunDirectory, tracker: str, identifier: str) -> None:
    run.write_text(f"{DIRECTORY}/{IDS}", json.dumps({**_stored_ids(run), tracker: identifier}))


def _stored_ids(run: RunDirectory) -> dict[str, str]:
    """By tracker; raises RecordError for a damaged file."""
    name = f"{DIRECTORY}/{IDS}"
    return read_record(dict[str, str], run.read_text(name) or "{}", run.path(name))
