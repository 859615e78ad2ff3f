"""The train stage: preference optimisation of a policy on its round's pairs."""

from __future__ import annotations

from hashlib import sha256

import ray.data

from mipo_ray.config.schema import Config
from mipo_ray.monitoring.progress import progress
from mipo_ray.ray_cluster.blocks import named
from mipo_ray.ray_cluster.resources import most_gpus, worker_request
from mipo_ray.session import Session, Stage
from mipo_ray.storage.manifests import GenerateFacts, Manifest, TrainFacts
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.training.ray_worker import CHECKPOINTS
from mipo_ray.training.shares import stream_kept_pairs
from mipo_ray.training.trainer import Models, train_policy


def train(session: Session, round: Round, only: frozenset[str] | None = None) -> Manifest[TrainFacts]:
    """The train stage: preference optimisation of the policy that the round starts from, on the round's pairs, which
    must be finished. Returns the stage's manifest; the policy lies in `policy` below the stage.

    `only`: the pair_ids among the kept pairs to train on, each of which must be there; None: all. A stage that was
    interrupted goes on from its newest checkpoint, unless its pairs were generated again since, or are others.
    """
    config, run, stage = session.config, session.run, session.stage(round, "train")
    if (manifest := stage.finished_before(TrainFacts)) is not None:
        return manifest
    with stage.reported() as report:
        pairs = session.stage(round, "generate").finished_manifest(GenerateFacts)
        _keep_work_on(stage, pairs.finished if only is None else f"{pairs.finished} {pair_set_hash(only)}")
        policy = session.policy(round.before)
        models = Models(policy, reference=policy if config.train.reference == "round_start" else config.model.source)
        with progress(stage.events, "train_step", "step", f"{round.label}  train"):
            count = pairs.facts.statistics.kept if only is None else len(only)
            summary = train_policy(stage, models, _training_pairs(config, run, pairs, only), count)
        run.remove(f"{stage.directory}/{CHECKPOINTS}")
        facts = TrainFacts(
            summary=summary,
            reference=models.reference if config.train.needs_reference else None,
            gpus=most_gpus(worker_request(config, session.resources)) + session.kept_gpus,
            pair_set=None if only is None else pair_set_hash(only),
        )
        manifest = report.commit(stage, facts)
        report.closing = f": {summary.steps} steps, loss {summary.first_loss:.4f} -> {summary.last_loss:.4f}"
    return manifest


def _keep_work_on(stage: Stage, trained_on: str) -> None:
    """Leaves what an interruption left where it was trained on the same pairs, and removes it else."""
    if stage.run.read_text(f"{stage.directory}/pairs.txt") != trained_on:
        stage.run.remove(stage.directory)
        stage.run.write_text(f"{stage.directory}/pairs.txt", trained_on)
    stage.run.remove(f"{stage.directory}/policy")


def pair_set_hash(pair_ids: frozenset[str]) -> str:
    """Names a set of pairs, 16 hex digits."""
    return sha256("\n".join(sorted(pair_ids)).encode()).hexdigest()[:16]


def _training_pairs(
    config: Config, run: RunDirectory, pairs: Manifest[GenerateFacts], only: frozenset[str] | None
) -> ray.data.Dataset:
    """The round's kept pairs in training order; `only`: see `train`."""
    files = [run.path(pairs.stage, name) for name in pairs.facts.pairs]
    seed = config.seed if config.train.shuffle_labels else None
    kept = stream_kept_pairs(files, run.arrow_filesystem(), config.train.objective, only=only, shuffle_seed=seed)
    return named(kept, f"round_{pairs.round}_training_pairs")
