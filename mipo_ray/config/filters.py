"""The filters section: which sampled pairs are left out of training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mipo_ray.config.base import Section, execution_only
from mipo_ray.config.field_types import NonNegativeFloat, PositiveFloat, Share
from mipo_ray.config.removed import present_value
from mipo_ray.text.patterns import compiled


class PatternFilter(Section):
    """A regular expression that decides over a pair."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="counted as pattern_NAME")
    regex: str = Field(description="regular expression as RE2 reads it, searched anywhere in the answer")
    side: Literal["chosen", "rejected", "either"] = Field("chosen", description="which responses are searched")
    drop_when: Literal["found", "missing"] = Field("found", description="drop pairs where it is found, or missing")

    @field_validator("regex")
    @classmethod
    def _compiles(cls, regex: str) -> str:
        try:
            compiled(regex)
        except ValueError as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return regex


class FiltersConfig(Section):
    """Which sampled pairs are left out of training; every reason is counted.

    Pairs with an empty response, or with chosen and rejected responses of the same text, always are.
    An answer is a response without the thoughts before it; where there are none it is the whole response.
    """

    drop_too_long: bool = Field(
        False,
        description="drop prompts, or pairs of pairs.path, that do not fit the context window; false: stop before any "
        "engine starts",
    )
    control_tokens: bool = Field(
        True,
        description="drop pairs with a control token (<|im_start|>, ...) inside a response; false: keep and count them",
    )
    equal_answers: Literal["choice", "number"] | None = Field(
        None, description="drop pairs with the same final answer: an option's letter, or a number; null: keep them"
    )
    thoughts: Literal["drop"] | None = Field(
        None,
        description="null: a response is trained on whole, what the model thought before it answered too; drop: pairs "
        "in which any response holds thoughts are left out",
    )
    truncated: Literal["drop", "keep", "trim"] = Field(
        "keep",
        description="pairs with a response cut at the length limit. drop: they are left out; keep: they are trained on "
        "as they are; trim: such a response is cut back to its last whole sentence as it is sampled, and the pair is "
        "left out only where it has none",
    )
    min_length_ratio: NonNegativeFloat = Field(
        0.0, description="drop when tokens of the chosen answer / tokens of the rejected one is below this"
    )
    max_length_ratio: PositiveFloat | None = Field(None, description="the same above this; null: no limit")
    max_repetition: Share = Field(
        1.0, description="drop when more than this share of an answer's word 3-grams repeats earlier ones"
    )
    max_copy_rate: Share = Field(
        1.0, description="drop when more than this share of the chosen answer's word 3-grams stands in its prompt"
    )
    min_pmi: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        None, description="drop when log p(chosen | prompt) - log p(chosen | mismatched prompt) is below this, nats"
    )
    patterns: tuple[PatternFilter, ...] = Field(
        (),
        strict=False,
        description="regular expressions (refusals, languages), each with a name, regex, side, drop_when",
    )
    max_dropped_share: Share = execution_only(0.9, "stop the run when filters drop more than this share of the rows")

    @field_validator("truncated", mode="before")
    @classmethod
    def _under_its_present_name(cls, value: Any) -> Any:
        return present_value("filters.truncated", value)

    @model_validator(mode="after")
    def _bounds_agree(self) -> FiltersConfig:
        if self.max_length_ratio is not None and self.min_length_ratio > self.max_length_ratio:
            raise ValueError(
                f"min_length_ratio ({self.min_length_ratio}) is above max_length_ratio ({self.max_length_ratio})"
            )
        if len({pattern.name for pattern in self.patterns}) < len(self.patterns):
            raise ValueError("patterns: expected different names")
        return self
