"""The cost section: by which GPU, price and earlier runs the plan reckons. Nothing of it changes what a run does."""

from __future__ import annotations

from typing import Literal

from mipo_ray.config.base import Section, execution_only
from mipo_ray.config.field_types import PositiveFloat

# Those of planning/prices.yaml.
GpuName = Literal["H200", "H100", "A100", "L40S", "L4"]


class CostConfig(Section):
    """What `--dry-run` reckons hours and dollars by."""

    gpu: GpuName = execution_only(
        "H100", "the GPU of the plan's hours and dollars, in bfloat16: H200, H100 (SXM), A100 (80 GB), L40S, L4"
    )
    gpu_hour_dollars: PositiveFloat | None = execution_only(
        None,
        "what an hour of one GPU costs you, dollars; null: the list price in mipo_ray/planning/prices.yaml, which has "
        "a date and is never fetched",
    )
    earlier_runs: tuple[str, ...] = execution_only(
        (),
        "run directories of finished rounds like these, on the same kind of machine: their metrics.jsonl says how fast "
        "they were, and the plan uses that. Rounds in run_dir itself always count",
        strict=False,
    )
