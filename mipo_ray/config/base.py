"""What every section of the configuration is made of: its base class, its number types, its mark for execution."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mipo_ray.config.label_selectors import check_selector

# Marks a field that says where or how fast a run executes but not what it computes: it may change between two
# calls over the same run directory.
EXECUTION_ONLY: Any = {"execution_only": True}

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
# Not float16: it needs loss scaling, which the training does not do.
Dtype = Literal["auto", "float32", "bfloat16"]
# Conditions on the labels of Ray nodes; see mipo_ray/config/label_selectors.py.
LabelSelector = Annotated[dict[str, str], AfterValidator(check_selector)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)
