"""One data-parallel worker of training: the DeepSpeed loop over a round's pairs, without Ray.

python -m mipo_ray.training.worker --pairs PAIRS.parquet --model embedded|DIR [--output DIR] [train.batch_size=8 ...]

trains in one plain process and prints one line per optimizer step. It is one worker, and writes no checkpoints.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
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
from mipo_ray.training.steps import Step, Steps, known_steps, steps_of
from mipo_ray.training.worker_settings import WorkerSettings


def train_round(
    settings: WorkerSettings,
    steps: Steps,
    report: Callable[[dict[str, float]], None],
    checkpoints: Checkpoints | None = None,
) -> TrainSummary:
    """Trains the policy on a round's pairs and writes it to `settings.output_dir`.

    `steps(epoch)` streams this worker's optimizer steps of that epoch; the workers' pairs of a step are together
    `train.batch_size` pairs, in the last step of an epoch perhaps fewer. `report` is called on rank 0 after each
    optimizer step with its metrics over all workers: step, total_steps, those of `step.optimizer_step`, learning_rate,
    step_seconds and tokens_per_second (of all sequences, without padding). Joins the torch process group that is there,
    or else makes one of this process alone.

    With `checkpoints`, training goes on after the newest one, with the pairs of the steps that were not done, and
    publishes new ones as `train.checkpoint_steps` says.

    Raises TrainingDiverged for a loss or gradient norm that is not finite, before such a policy is written, and
    ValueError when a step holds another number of pairs than was said.
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
        steps=lambda: (step.pairs for step in steps(0)),
        pair_count=settings.pair_count,
        cache=settings.reference_cache,
    )
    progress = Progress()
    if checkpoints is not None:
        with checkpoints.latest() as directory:
            progress = progress if directory is None else load_checkpoint(engine, directory)

    is_due = _checkpoint_clock(train)
    for place, step in _steps_after(progress.steps, steps, settings):
        step_started = time.perf_counter()
        total_steps = train.epochs * math.ceil(step.epoch_pairs / train.batch_size)
        learning_rate = _learning_rate(train, progress.steps, total_steps)
        metrics = optimizer_step(engine, reference, step.pairs, train, learning_rate, progress.steps)
        seconds = time.perf_counter() - step_started
        if (found := int(metrics["pairs"])) != step.step_pairs:
            raise ValueError(f"{place}: expected {step.step_pairs} pairs over all workers, found {found}")
        progress = Progress(
            steps=progress.steps + 1,
            pairs=progress.pairs + step.step_pairs,
            tokens=progress.tokens + int(metrics["tokens"]),
            first_loss=metrics["loss"] if progress.steps == 0 else progress.first_loss,
            last_loss=metrics["loss"],
        )
        if distributed.get_rank() == 0:
            count = {"step": progress.steps - 1, "total_steps": total_steps}
            speed = {"step_seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds}
            report({**count, **metrics, "learning_rate": learning_rate, **speed})
        if checkpoints is not None and progress.steps < total_steps and is_due(progress.steps):
            with tempfile.TemporaryDirectory(prefix="mipo-ray-checkpoint-", dir=checkpoints.scratch) as shard:
                save_checkpoint(engine, Path(shard), progress)
                checkpoints.publish(Path(shard), progress.steps)

    if not progress.steps:
        raise UserError("expected at least one pair to train on, found none")
    probe_logprobs = policy_probe_logprobs(engine, train.layout)
    export_policy(engine, settings.policy_dir, settings.output_dir)
    return TrainSummary(
        steps=progress.steps,
        pairs=progress.pairs // train.epochs if settings.pair_count is None else settings.pair_count,
        tokens=progress.tokens,
        first_loss=progress.first_loss,
        last_loss=progress.last_loss,
        seconds=time.perf_counter() - started,
        probe_logprobs=probe_logprobs,
    )


def _steps_after(done: int, steps: Steps, settings: WorkerSettings) -> Iterator[tuple[str, Step]]:
    """The steps of all epochs after the first `done`, each with its place in words.

    Epochs that are done are not streamed again where it is known how many steps they had.
    """
    before = 0  # steps of the epochs before this one
    for epoch in range(settings.train.epochs):
        known = settings.steps_per_epoch
        if known is not None and before + known <= done:
            before += known
            continue
        index = -1
        for index, step in enumerate(steps(epoch)):
            if before + index >= done:
                yield f"epoch {epoch}, step {index}", step
        before += index + 1


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
        steps = known_steps(settings, lambda epoch: steps_of(pairs, config.train.batch_size))
        say(str(train_round(settings, steps, _print_step)))


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
