"""Solved examples of a few-shot prompt, written out in the configuration or named as a file of mipo_ray/examples.

Nothing here imports torch, ray or vllm.
"""

from __future__ import annotations

from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field

from mipo_ray.config_types import Section
from mipo_ray.examples import EXAMPLES_DIRECTORY

ENDING = "_exemplars"  # of the names of exemplar files


class Exemplar(Section):
    """One solved example of a few-shot prompt."""

    question: str = Field(description="what the user asks")
    answer: str = Field(description="what the assistant answers")


def _bundled_exemplars(value: Any) -> Any:
    """The exemplars of mipo_ray/examples/NAME.yaml for bundled:NAME; anything else as it is."""
    if not isinstance(value, str):
        return value
    names = {path.stem.removesuffix(ENDING): path for path in EXAMPLES_DIRECTORY.glob(f"*{ENDING}.yaml")}
    name = value.removeprefix("bundled:")
    if name not in names or name == value:
        known = " or ".join(f"bundled:{name}" for name in sorted(names))
        raise ValueError(f"expected a list of exemplars or {known}; found {value!r}")
    return yaml.safe_load(names[name].read_text(encoding="utf-8"))


Exemplars = Annotated[tuple[Exemplar, ...], BeforeValidator(_bundled_exemplars)]
