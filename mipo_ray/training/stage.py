"""The train stage: preference optimisation of a policy on its round's pairs."""

from __future__ import annotations

import functools
from concurrent.futures import Future
from hashlib import sha256
from typing import Any

import ray.data

from mipo_ray.config.schema import Config
from mipo_ray.monitoring.progress import progress
from mipo_ray.pairs.written import conditioned_as
from mipo_ray.ray_cluster.blocks import named
from mipo_ray.ray_cluster.resources import most_gpus, worker_request
from mipo_ray.session import Session, Stage
from mipo_ray.storage.manifests import GenerateFacts, Manifest, TrainFacts, TrainSummary
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.training.ray_worker import CHECKPOINTS
from mipo_ray.training.shares import stream_kept_pairs
from mipo_ray.training.stream import PairStream
from mipo_ray.training.trainer import AllPairs, ArrivingPairs, Models, train_policy


def train(
    session: Session,
    round: Round,
    only: frozenset[str] | None = None,
    generated: Future[Any] | None = None,
) -> Manifest[TrainFacts]:
    """The train stage: preference optimisation of the policy that the round starts from, on the round's pairs. Returns
    the stage's manifest; the policy lies in `policy` below the stage.

    `only`: the pair_ids among the kept pairs to train on, each of which must be there; None: all. `generated`: the
    generate stage, which may still be under way, with its rows conditioned; None: it is finished. A stage that was
    interrupted goes on from its newest checkpoint, in the order that it was begun in, unless its pairs were generated
    again since, or are others.
    """
    config, run, stage = session.config, session.run, session.stage(round, "train")
    if (manifest := stage.finished_before(TrainFacts)) is not None:
        return manifest
    with stage.reported() as report:
        pairs = _training_pairs(session, round, only, generated)
        policy = session.policy(session.start(round))
        models = Models(policy, reference=policy if config.train.reference == "round_start" else config.model.source)
        with progress(stage.events, "train", "steps"):
            summary = train_policy(stage, models, pairs)
        is_streamed = isinstance(pairs, ArrivingPairs)
        if is_streamed:
            _check_all_were_there(session, round, summary, generated)
        run.remove(f"{stage.directory}/{CHECKPOINTS}")
        facts = TrainFacts(
            summary=summary,
            reference=models.reference if config.train.needs_reference else None,
            # Beside a generate stage, that counts its engines.
            gpus=most_gpus(worker_request(config, session.resources)) + (0 if is_streamed else session.kept_gpus),
            order="prompts" if is_streamed else "pair_id",
            pair_set=None if only is None else pair_set_hash(only),
            learning_rate=session.learning_rate(round),
        )
        manifest = report.commit(stage, facts)
        report.closing = f": {summary.steps} steps, loss {summary.first_loss:.4f} -> {summary.last_loss:.4f}"
    return manifest


def _training_pairs(
    session: Session, round: Round, only: frozenset[str] | None, generated: Future[Any] | None
) -> AllPairs | ArrivingPairs:
    """The round's pairs, as they arrive or all of them; what an interruption left of another training is removed.

    A training that was begun goes on in its order; a new one streams where `generated` says so.
    """
    stage, generating = session.stage(round, "train"), session.stage(round, "generate")
    conditioned = conditioned_as(session.run, generating.directory)
    as_they_arrive = f"as written, of {conditioned}"
    begun, finished = session.run.read_text(_trained_on(stage)), generating.read_manifest(GenerateFacts)
    begun_by_pair_id = finished is not None and begun == finished.finished
    streams = begun == as_they_arrive or (generated is not None and not begun_by_pair_id)
    if only is None and conditioned is not None and streams:
        _keep_work_on(stage, as_they_arrive)
        stream = PairStream(session.run, generating.directory, session.config.generation.samples_per_prompt)
        return ArrivingPairs(stream, functools.partial(_failure_of, generated))
    pairs = generating.finished_manifest(GenerateFacts)
    _keep_work_on(stage, pairs.finished if only is None else f"{pairs.finished} {pair_set_hash(only)}")
    count = pairs.facts.statistics.kept if only is None else len(only)
    return AllPairs(_kept_pairs(session.config, session.run, pairs, only), count)


def _failure_of(generated: Future[Any] | None) -> BaseException | None:
    """Why a generate stage ended without its pairs; None while it goes on, and when it is finished."""
    return generated.exception() if generated is not None and generated.done() else None


def _check_all_were_there(session: Session, round: Round, summary: TrainSummary, generated: Future[Any] | None) -> None:
    """Waits for the end of the generate stage; raises its error, and RuntimeError where it kept other pairs."""
    if generated is not None:
        generated.result()
    kept = session.stage(round, "generate").finished_manifest(GenerateFacts).facts.statistics.kept
    if summary.pairs != kept:
        raise RuntimeError(f"{round.label}: expected training on the {kept} kept pairs, found {summary.pairs}")


def _trained_on(stage: Stage) -> str:
    return f"{stage.directory}/pairs.txt"


def _keep_work_on(stage: Stage, trained_on: str) -> None:
    """Leaves what an interruption left where it was trained on the same pairs, and removes it else."""
    if stage.run.read_text(_trained_on(stage)) != trained_on:
        stage.run.remove(stage.directory)
        stage.run.write_text(_trained_on(stage), trained_on)
    stage.run.remove(f"{stage.directory}/policy")


def pair_set_hash(pair_ids: frozenset[str]) -> str:
    """Names a set of pairs, 16 hex digits."""
    return sha256("\n".join(sorted(pair_ids)).encode()).hexdigest()[:16]


def _kept_pairs(
    config: Config, run: RunDirectory, pairs: Manifest[GenerateFacts], only: frozenset[str] | None
) -> ray.data.Dataset:
    """The round's kept pairs in training order; `only`: see `train`."""
    files = [run.path(pairs.stage, name) for name in pairs.facts.pairs]
    seed = config.seed if config.train.shuffle_labels else None
    kept = stream_kept_pairs(files, run.arrow_filesystem(), config.train.objective, only=only, shuffle_seed=seed)
    return named(kept, f"round_{pairs.round}_training_pairs")
