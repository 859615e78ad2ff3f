"""The train stage: preference optimisation of a policy on its round's pairs."""

from __future__ import annotations

from dataclasses import asdict
from hashlib import sha256
from typing import Any

import ray.data

from mipo_ray.config.schema import Config
from mipo_ray.monitoring.events import Events
from mipo_ray.monitoring.progress import progress
from mipo_ray.ray_cluster.blocks import named
from mipo_ray.ray_cluster.resources import Resources, most_gpus, worker_request
from mipo_ray.session import once
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.training.shares import stream_kept_pairs
from mipo_ray.training.trainer import CHECKPOINTS, train_policy


def train(
    config: Config,
    run: RunDirectory,
    round_index: int,
    policy: str,
    pairs: dict[str, Any],
    resources: Resources,
    events: Events,
    only: frozenset[str] | None = None,
) -> str:
    """The train stage: preference optimisation of `policy` on the round's pairs. Returns the new policy's path.

    `only`: the pair_ids among the kept pairs to train on, each of which must be there; None: all. A stage that was
    interrupted goes on from its newest checkpoint, unless its pairs were generated again since, or are others.
    """
    stage = run.stage(round_index, "train")
    reference = policy if config.train.reference == "round_start" else config.model.path

    trained_on = pairs["finished"] if only is None else f"{pairs['finished']} {pair_set_hash(only)}"

    def work(stage_events: Events) -> dict[str, Any]:
        if run.read_text(f"{stage}/pairs.txt") != trained_on:
            run.remove(stage)
            run.write_text(f"{stage}/pairs.txt", trained_on)
        run.remove(f"{stage}/policy")
        with progress(stage_events, "train_step", "step", f"round {round_index}  train"):
            summary = train_policy(
                config,
                _training_pairs(config, run, pairs, only),
                pairs["statistics"]["kept"] if only is None else len(only),
                policy=policy,
                reference=reference,
                run=run,
                stage=stage,
                resources=resources,
                events=stage_events,
            )
        run.remove(f"{stage}/{CHECKPOINTS}")
        facts = {
            "summary": asdict(summary),
            "reference": reference if config.train.needs_reference else None,
            "gpus": most_gpus(worker_request(config, resources)),
        }
        return facts if only is None else {**facts, "pair_set": pair_set_hash(only)}

    once(config, run, round_index, "train", events, work)
    return run.model_path(f"{stage}/policy")


def pair_set_hash(pair_ids: frozenset[str]) -> str:
    """Names a set of pairs, 16 hex digits."""
    return sha256("\n".join(sorted(pair_ids)).encode()).hexdigest()[:16]


def _training_pairs(
    config: Config, run: RunDirectory, pairs: dict[str, Any], only: frozenset[str] | None
) -> ray.data.Dataset:
    """The round's kept pairs in training order; `only`: see `train`."""
    files = [run.path(pairs["stage"], name) for name in pairs["pairs"]]
    seed = config.seed if config.train.shuffle_labels else None
    kept = stream_kept_pairs(files, run.arrow_filesystem(), config.train.objective, only=only, shuffle_seed=seed)
    return named(kept, f"round_{pairs['round']}_training_pairs")
