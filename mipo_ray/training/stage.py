"""The train stage: preference optimisation of a policy on its round's pairs."""

from __future__ import annotations

from dataclasses import asdict
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
import ray.data

from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.monitoring.progress import progress
from mipo_ray.pairs.label_control import shuffle_labels
from mipo_ray.pairs.schema import as_version_2
from mipo_ray.ray_cluster.blocks import map_blocks, named, ordered_context
from mipo_ray.ray_cluster.resources import most_gpus, worker_request
from mipo_ray.session import Manifest, Session, Stage
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.training.trainer import CHECKPOINTS, Models, train_policy


def train(session: Session, round: Round, only: frozenset[str] | None = None) -> Manifest:
    """The train stage: preference optimisation of the policy that the round starts from, on the round's pairs, which
    must be finished. Returns the stage's manifest; the policy lies in `policy` below the stage.

    `only`: the pair_ids among the kept pairs to train on, each of which must be there; None: all. A stage that was
    interrupted goes on from its newest checkpoint, unless its pairs were generated again since, or are others.
    """
    stage = session.stage(round, "train")
    return stage.run_unless_finished(lambda: _train_on_pairs(stage, only), _closing_line)


def _train_on_pairs(stage: Stage, only: frozenset[str] | None) -> dict[str, Any]:
    config, run, session = stage.config, stage.run, stage.session
    pairs = session.stage(stage.round, "generate").finished_manifest()
    trained_on = pairs["finished"] if only is None else f"{pairs['finished']} {pair_set_hash(only)}"
    if run.read_text(f"{stage.directory}/pairs.txt") != trained_on:
        run.remove(stage.directory)
        run.write_text(f"{stage.directory}/pairs.txt", trained_on)
    run.remove(f"{stage.directory}/policy")
    policy = session.policy(stage.round.before)
    models = Models(policy, reference=policy if config.train.reference == "round_start" else config.model.path)
    with progress(stage.events, "train_step", "step", f"{stage.round.label}  train"):
        count = pairs["statistics"]["kept"] if only is None else len(only)
        summary = train_policy(stage, models, _training_pairs(config, run, pairs, only), count)
    run.remove(f"{stage.directory}/{CHECKPOINTS}")
    facts = {
        "summary": asdict(summary),
        "reference": models.reference if config.train.needs_reference else None,
        "gpus": most_gpus(worker_request(config, session.resources)),
    }
    return facts if only is None else {**facts, "pair_set": pair_set_hash(only)}


def _closing_line(manifest: Manifest) -> str:
    summary = manifest["summary"]
    return f": {summary['steps']} steps, loss {summary['first_loss']:.4f} -> {summary['last_loss']:.4f}"


def pair_set_hash(pair_ids: frozenset[str]) -> str:
    """Names a set of pairs, 16 hex digits."""
    return sha256("\n".join(sorted(pair_ids)).encode()).hexdigest()[:16]


def _training_pairs(
    config: Config, run: RunDirectory, pairs: dict[str, Any], only: frozenset[str] | None
) -> ray.data.Dataset:
    """The round's kept pairs in training order (by pair_id, which is a seeded shuffle), in the form of version 2.

    `only`: see `train`. Raises UserError where the objective reads a column that the pairs were written without.
    """
    files = [run.path(pairs["stage"], name) for name in pairs["pairs"]]
    columns = ["pair_id", "prompt_token_ids", "chosen_token_ids", "rejected_token_ids", "dropped"]
    if config.train.objective == "sami":
        columns.append("mismatched_prompt_token_ids")
    # Ray Data leaves out what a file does not have, without a word.
    found = pyarrow.parquet.read_schema(files[0], filesystem=run.arrow_filesystem()).names
    if missing := set(columns) - set(found):
        raise UserError(
            f"{files[0]}: train.objective {config.train.objective}: expected the columns "
            f"{', '.join(sorted(missing))} too, found {', '.join(found)}; generate these pairs again"
        )
    with ordered_context():
        dataset = ray.data.read_parquet(files, filesystem=run.arrow_filesystem(), columns=columns)
        seed = config.seed if config.train.shuffle_labels else None
        kept = map_blocks(dataset, _kept_only, only=only, shuffle_seed=seed)
        return named(kept.sort("pair_id"), f"round_{pairs['round']}_training_pairs")


def _kept_only(block: pa.Table, *, only: frozenset[str] | None, shuffle_seed: int | None) -> pa.Table:
    kept = block.filter(pyarrow.compute.equal(block["dropped"], "")).drop_columns(["dropped"])
    if only is not None:
        kept = kept.filter(pyarrow.compute.is_in(kept["pair_id"], pa.array(sorted(only), pa.string())))
    kept = as_version_2(kept)
    return kept if shuffle_seed is None else shuffle_labels(kept, shuffle_seed)
