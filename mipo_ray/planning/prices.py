"""The price table of `prices.yaml`, and what a run's configuration makes of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from mipo_ray.config.cost import CostConfig
from mipo_ray.config.yaml_text import load_yaml

TABLE = Path(__file__).with_name("prices.yaml")


@dataclass(frozen=True)
class Gpu:
    """One GPU of the plan: its dense peak by the dtype, in FLOP/s, and what an hour of it costs."""

    name: str
    peak_flops: dict[str, float]
    dollars_per_hour: float
    price: str
    """Where the price is from, in words for the plan."""


@functools.cache
def price_table() -> dict[str, Gpu]:
    """Every GPU of the table, by name."""
    table = load_yaml(TABLE.read_text(encoding="utf-8"))
    price = f"list price of {table['date']}, which changes: set cost.gpu_hour_dollars to what you pay"
    return {
        name: Gpu(
            name=name,
            peak_flops={dtype: 1e12 * row[f"{dtype}_tflops"] for dtype in ("bfloat16", "float32")},
            dollars_per_hour=row["dollars_per_hour"],
            price=price,
        )
        for name, row in table["gpus"].items()
    }


def planned_gpu(cost: CostConfig) -> Gpu:
    """The GPU that a configuration names, at the user's own price where it says one."""
    gpu = price_table()[cost.gpu]
    if cost.gpu_hour_dollars is None:
        return gpu
    return Gpu(gpu.name, gpu.peak_flops, cost.gpu_hour_dollars, "cost.gpu_hour_dollars")
