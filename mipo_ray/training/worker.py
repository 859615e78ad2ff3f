"""One data-parallel worker of training: the DeepSpeed loop over a round's pairs, without Ray.

python -m mipo_ray.training.worker --pairs PAIRS.parquet --model embedded|DIR [--output DIR] [train.batch_size=8 ...]

trains in one plain process and prints one line per optimizer step. It is one worker, and writes no checkpoints.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import distributed

from mipo_ray.config.schema import Config
from mipo_ray.config.train import CHECKPOINT_MINUTES, TrainConfig
from mipo_ray.errors import UserError
from mipo_ray.pairs.schema import as_version_2, kept_pairs, missing_columns, pair_columns
from mipo_ray.paths import open_path
from mipo_ray.storage.manifests import TrainSummary
from mipo_ray.tables.parquet import read_table
from mipo_ray.terminal import say, say_error
from mipo_ray.training.checkpoint import Checkpoints, Progress, load_checkpoint, save_checkpoint
from mipo_ray.training.deepspeed_engine import join_process_group, policy_and_reference, quiet_libraries
from mipo_ray.training.export import export_policy
from mipo_ray.training.layout import Pair, read_pairs
from mipo_ray.training.probes import policy_probe_logprobs
from mipo_ray.training.schedule import learning_rate_at
from mipo_ray.training.step import optimizer_step
from mipo_ray.training.worker_settings import WorkerSettings

# From an epoch to this worker's pairs of each of its optimizer steps, in order.
Steps = Callable[[int], Iterable[Sequence[Pair]]]


def train_round(
    settings: WorkerSettings,
    steps_in_epoch: Steps,
    report: Callable[[dict[str, float]], None],
    checkpoints: Checkpoints | None = None,
) -> TrainSummary:
    """Trains the policy on a round's pairs and writes it to `settings.output_dir`.

    `steps_in_epoch(epoch)` streams this worker's pairs of every optimizer step of that epoch; the workers' pairs of a
    step are together `train.batch_size` pairs, in the last step of an epoch perhaps fewer. `report` is called on rank 0
    after each optimizer step with its metrics over all workers: step, total_steps, those of `step.optimizer_step`,
    learning_rate, step_seconds and tokens_per_second (of all sequences, without padding). Joins the torch process group
    that is there, or else makes one of this process alone.

    With `checkpoints`, training goes on after the newest one, with the pairs of the steps that were not done, and
    publishes new ones as `train.checkpoint_steps` says.

    Raises TrainingDiverged for a loss or gradient norm that is not finite, before such a policy is written, and
    ValueError when an epoch holds another number of steps or pairs than was said.
    """
    started = time.perf_counter()
    train = settings.train
    torch.manual_seed(settings.seed)
    if settings.device == "cpu" and settings.threads is not None:
        torch.set_num_threads(settings.threads)
    quiet_libraries(settings.device)
    join_process_group(settings.device)

    engine, reference = policy_and_reference(
        settings.policy_dir,
        settings.reference_dir,
        train,
        settings.dtype,
        settings.device,
        trust_remote_code=settings.trust_remote_code,
        steps=lambda: _checked_steps(settings, steps_in_epoch, 0),
        pair_count=settings.pair_count,
        cache=settings.reference_cache,
    )
    progress = Progress()
    if checkpoints is not None:
        with checkpoints.latest() as directory:
            progress = progress if directory is None else load_checkpoint(engine, directory)

    total_steps = train.epochs * settings.steps_per_epoch
    is_due = _checkpoint_clock(train)
    while progress.steps < total_steps:
        epoch, done = divmod(progress.steps, settings.steps_per_epoch)
        for index, pairs in enumerate(_checked_steps(settings, steps_in_epoch, epoch)):
            if index < done:
                continue
            step_started = time.perf_counter()
            learning_rate = _learning_rate(settings.train, progress.steps, total_steps)
            metrics = optimizer_step(engine, reference, pairs, settings.train, learning_rate, progress.steps)
            seconds = time.perf_counter() - step_started
            _check_pair_count(settings, epoch, index, int(metrics["pairs"]))
            progress = Progress(
                steps=progress.steps + 1,
                tokens=progress.tokens + int(metrics["tokens"]),
                first_loss=metrics["loss"] if progress.steps == 0 else progress.first_loss,
                last_loss=metrics["loss"],
            )
            if distributed.get_rank() == 0:
                place = {"step": progress.steps - 1, "total_steps": total_steps}
                speed = {"step_seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds}
                report({**place, **metrics, "learning_rate": learning_rate, **speed})
            if checkpoints is not None and progress.steps < total_steps and is_due(progress.steps):
                with tempfile.TemporaryDirectory(prefix="mipo-ray-checkpoint-", dir=checkpoints.scratch) as shard:
                    save_checkpoint(engine, Path(shard), progress)
                    checkpoints.publish(Path(shard), progress.steps)

    probe_logprobs = policy_probe_logprobs(engine, train.layout)
    export_policy(engine, settings.policy_dir, settings.output_dir)
    return TrainSummary(
        steps=total_steps,
        pairs=settings.pair_count,
        tokens=progress.tokens,
        first_loss=progress.first_loss,
        last_loss=progress.last_loss,
        seconds=time.perf_counter() - started,
        probe_logprobs=probe_logprobs,
    )


def _learning_rate(train: TrainConfig, step: int, total_steps: int) -> float:
    return learning_rate_at(
        step,
        total_steps,
        peak=train.learning_rate,
        warmup_ratio=train.warmup_ratio,
        floor_ratio=train.min_learning_rate_ratio,
    )


def _checkpoint_clock(train: TrainConfig) -> Callable[[int], bool]:
    """Whether a checkpoint is due after so many steps: the same answer on every worker, by rank 0's clock."""
    saved_at = time.monotonic()

    def is_due(steps: int) -> bool:
        nonlocal saved_at
        if train.checkpoint_steps is not None:
            answer = [steps % train.checkpoint_steps == 0]
        else:
            answer = [time.monotonic() - saved_at >= 60 * CHECKPOINT_MINUTES]
        distributed.broadcast_object_list(answer, src=0)
        if answer[0]:
            saved_at = time.monotonic()
        return answer[0]

    return is_due


def _checked_steps(settings: WorkerSettings, steps_in_epoch: Steps, epoch: int) -> Iterator[Sequence[Pair]]:
    """An epoch's steps, counted: workers with different numbers of steps would wait for each other for ever."""
    expected, found = settings.steps_per_epoch, 0
    for pairs in steps_in_epoch(epoch):
        found += 1
        if found > expected:
            raise ValueError(f"epoch {epoch}: expected {expected} steps for this worker, found more")
        yield pairs
    if found < expected:
        raise ValueError(f"epoch {epoch}: expected {expected} steps for this worker, found {found}")


def _check_pair_count(settings: WorkerSettings, epoch: int, index: int, found: int) -> None:
    batch_size = settings.train.batch_size
    expected = min(batch_size, settings.pair_count - index * batch_size)
    if found != expected:
        raise ValueError(f"epoch {epoch}, step {index}: expected {expected} pairs over all workers, found {found}")


def steps_of(pairs: Sequence[Pair], batch_size: int) -> Iterator[Sequence[Pair]]:
    """All pairs of an epoch as steps of one worker."""
    for start in range(0, len(pairs), batch_size):
        yield pairs[start : start + batch_size]


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains on a Parquet file of pairs in this process alone and prints one line per step; returns the exit code."""
    from mipo_ray.config.recipe import load_config

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="Parquet file with " + ", ".join(pair_columns("dpo")))
    parser.add_argument("--model", required=True, help="embedded, or a model directory: policy and reference")
    parser.add_argument("--output", help="where the trained policy goes; default: a temporary directory")
    parser.add_argument("overrides", nargs="*", help="dotted configuration overrides, for example train.batch_size=8")
    options = parser.parse_args(arguments)
    try:
        _train_on_file(options, load_config(None, options.overrides))
    except UserError as error:
        say_error(f"error: {error}")
        return 2
    return 0


def _train_on_file(options: argparse.Namespace, config: Config) -> None:
    from mipo_ray.models.source import check_policy_model, local_model_directory

    pairs = _read_pairs(options.pairs, config.train)
    model = local_model_directory(options.model, config.model.trust_remote_code)
    check_policy_model(model, {})
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as scratch:
        settings = WorkerSettings(
            policy_dir=model,
            reference_dir=model,
            output_dir=options.output or scratch,
            reference_cache=None,
            train=config.train,
            dtype=config.model.dtype if config.model.dtype != "auto" else ("bfloat16" if on_gpu else "float32"),
            device="cuda" if on_gpu else "cpu",
            seed=config.seed,
            pair_count=len(pairs),
            trust_remote_code=config.model.trust_remote_code,
        )
        say(str(train_round(settings, lambda epoch: steps_of(pairs, config.train.batch_size), _print_step)))


def _read_pairs(path: str, train: TrainConfig) -> list[Pair]:
    """The pairs of a Parquet file that no filter dropped; raises UserError for a file that does not hold them."""
    import pyarrow as pa

    try:
        filesystem, name = open_path(path)
        with filesystem.open(name, "rb") as file:
            table = read_table(file, path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"--pairs {path}: expected a Parquet file of pairs: {error}") from error
    if missing := missing_columns(pair_columns(train.objective), table.column_names):
        raise UserError(f"--pairs {path}: train.objective {train.objective}: {missing}")
    kept = kept_pairs(table) if "dropped" in table.column_names else as_version_2(table)
    if not kept.num_rows:
        raise UserError(f"--pairs {path}: expected at least one pair that was not dropped, found none")
    return read_pairs(kept, train.objective)


def _print_step(metrics: dict[str, float]) -> None:
    say("  ".join(f"{key} {f'{v:.4g}' if isinstance(v, float) else v}" for key, v in metrics.items()))


if __name__ == "__main__":
    sys.exit(main())
