"""The conditioning section: what the mismatched response is sampled under."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mipo_ray.config.base import Section
from mipo_ray.config.field_types import PositiveFloat, PositiveInt

# A mixture chooses among the others, row by row.
SingleStrategy = Literal[
    "random_prompt", "swapped_response", "missing_context", "random_context", "partial_prompt", "similar_prompt"
]
Strategy = Literal[SingleStrategy, "mixture"]
Similarity = Annotated[float, Field(ge=-1, le=1)]


class SimilarConfig(Section):
    """How similar_prompt finds prompts that are near, but no paraphrases."""

    model: str | None = Field(
        None, description="embedding model, named as model.path is; null: mean hidden state of the policy itself"
    )
    neighbours: PositiveInt = Field(8, description="nearest prompts inside the band, among which one is drawn")
    min_similarity: Similarity = Field(
        0.0, description="lower end of the band, cosine of two embeddings after the block's mean was subtracted"
    )
    max_similarity: Similarity = Field(0.6, description="upper end of the band: above it two prompts say the same")

    @model_validator(mode="after")
    def _is_a_band(self) -> SimilarConfig:
        if self.min_similarity >= self.max_similarity:
            raise ValueError(
                f"min_similarity ({self.min_similarity}) is not below max_similarity ({self.max_similarity})"
            )
        return self


class ConditioningConfig(Section):
    """What the mismatched response is sampled under."""

    strategy: Strategy = Field(
        "missing_context",
        description="random_prompt: another prompt; swapped_response: another prompt, its matched response reused; "
        "missing_context: the same question without the user's context; random_context: the same question with "
        "another user's context; partial_prompt: the prompt without one of its sentences; similar_prompt: one of the "
        "nearest other prompts; mixture: one of these for each row",
    )
    mixture: dict[SingleStrategy, PositiveFloat] = Field(
        default_factory=dict, description="strategy mixture: strategies and their weights"
    )
    fallback: Literal[SingleStrategy, "drop"] | None = Field(
        None,
        description="for rows to which the strategy does not apply: another strategy, or drop: leave them out and "
        "count them. null: refuse rows without a needed context or without a neighbour in the band, drop the others",
    )
    similar: SimilarConfig = Field(default_factory=SimilarConfig, description="similar_prompt's neighbours")
    block_size: Annotated[int, Field(ge=2)] = Field(
        32, description="rows among which mismatched prompts are drawn; also the grain of resume"
    )

    @property
    def strategies(self) -> tuple[str, ...]:
        """Every single strategy that a row may get; the fallback, where it is one, comes last."""
        names: list[str] = list(self.mixture) if self.strategy == "mixture" else [self.strategy]
        if self.fallback not in (None, "drop", *names):
            names.append(str(self.fallback))
        return tuple(names)

    @model_validator(mode="after")
    def _mixture_is_there(self) -> ConditioningConfig:
        if self.strategy == "mixture" and not self.mixture:
            raise ValueError(
                "strategy mixture needs weights, for example mixture: {random_prompt: 1, random_context: 3}"
            )
        if self.strategy != "mixture" and self.mixture:
            raise ValueError(f"mixture has weights, but strategy is {self.strategy}; set strategy: mixture")
        return self
