"""The pairs section: preference pairs that exist, which a run trains on in place of pairs that it samples."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from pydantic import Field

from mipo_ray.config.base import Section
from mipo_ray.config.field_types import PositiveInt

PairFormat = Literal["trl", "openrlhf", "axolotl", "llama-factory", "ms-swift"]

# What a run with pairs that exist reads of the training prompts' section; the rest makes prompts.
READ_OF_PROMPTS = ("template_arguments", "control_tokens")
# What only samples have.
OF_SAMPLING = {
    "generation": ("samples_per_prompt", "negatives_per_prompt", "pairing"),
    "filters": ("truncated", "min_pmi"),
}


class PairsConfig(Section):
    """Preference pairs that exist: one round is trained on them, and nothing is sampled for it."""

    path: str | None = Field(
        None,
        description="JSONL, Parquet or CSV with a prompt, a chosen and a rejected response in each row: one file or a "
        "glob, on any filesystem that fsspec opens; bundled:preferences is a file of mipo_ray/examples; null: pairs "
        "are sampled",
    )
    format: Literal["auto", PairFormat] = Field(
        "auto", description="whose columns the rows have; auto: found out by the columns of the first row"
    )
    limit: PositiveInt | None = Field(None, description="use the first rows only; null: all")


def other_than_default(section: Section, names: Collection[str]) -> list[str]:
    """Those of a section's fields `names` that hold another value than their default."""
    fields = type(section).model_fields
    return [name for name in names if getattr(section, name) != fields[name].get_default(call_default_factory=True)]
