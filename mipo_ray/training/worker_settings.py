"""What a training worker needs to know; no torch, since Ray Train's controller reads it, too."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mipo_ray.config.train import TrainConfig


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker needs to know; picklable, the same for every worker of a round."""

    policy_dir: str  # local model directory (safetensors) that training starts from
    reference_dir: str  # local model directory of the frozen reference
    output_dir: str  # rank 0 writes the trained policy here
    reference_cache: str | None  # mode cached: directory, on any filesystem, that keeps the log-probs; None: not kept
    train: TrainConfig
    dtype: str  # "float32" or "bfloat16"
    device: str  # "cpu" or "cuda"
    seed: int
    pair_count: int | None  # pairs of an epoch, over all workers; None: not known before the round is generated
    threads: int | None = None  # torch threads on a CPU; None: as torch finds them
    trust_remote_code: bool = False

    @property
    def steps_per_epoch(self) -> int | None:
        """None: not known before the round is generated."""
        return None if self.pair_count is None else math.ceil(self.pair_count / self.train.batch_size)
