"""Figures of a task as evaluation.json holds them."""

from __future__ import annotations

from typing import Any

from mipo_ray.storage.entries import Entry

ENTRY = Entry(value=0.5, low=0.24, high=0.76, n=10, unit="share", interval="wilson")
CHANGE: dict[str, Any] = {
    "change": 0.1,
    "change_low": -0.1,
    "change_high": 0.3,
    "fixed": 2,
    "broken": 1,
    "p_value": 1.0,
}
