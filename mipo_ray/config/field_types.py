"""The types of the configuration's fields that several sections share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from mipo_ray.config.label_selectors import check_selector

SMALLEST_SHARE = 0.0001  # of a CPU or a GPU that Ray counts


def _countable(amount: float) -> float:
    if 0 < amount < SMALLEST_SHARE:
        raise ValueError(f"expected at least {SMALLEST_SHARE}, which is the least that Ray counts, found {amount:g}")
    return amount


PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# CPUs or GPUs that an actor reserves.
ReservedCpus = Annotated[PositiveFloat, AfterValidator(_countable)]
ReservedGpus = Annotated[NonNegativeFloat, AfterValidator(_countable)]
Share = Annotated[float, Field(ge=0, le=1)]
# Not float16: it needs loss scaling, which the training does not do.
Dtype = Literal["auto", "float32", "bfloat16"]
# A context window in tokens.
Window = Annotated[int, Field(ge=16)]
# Conditions on the labels of Ray nodes; see mipo_ray/config/label_selectors.py.
LabelSelector = Annotated[dict[str, str], AfterValidator(check_selector)]
