"""The section of the configuration that says what is measured of each policy.

Nothing here imports torch, ray or vllm.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from mipo_ray.config_judge import JudgeConfig
from mipo_ray.config_pairs import PromptsConfig
from mipo_ray.config_types import EXECUTION_ONLY, PositiveInt, Section


class EvaluateConfig(Section):
    """Held-out measurement before round 0 and after every round."""

    enabled: bool = Field(True, description="measure the base and every round's policy")
    prompts: PromptsConfig = Field(
        default_factory=lambda: PromptsConfig(path="bundled:personalization_heldout"),
        description="held-out prompts, never trained on",
    )
    samples_per_prompt: PositiveInt = Field(2, description="responses sampled for each held-out prompt")
    other_prompts: PositiveInt = Field(
        3, description="K: other held-out conditionings that each response is scored under"
    )
    matrix: Annotated[int, Field(ge=0)] = Field(
        8,
        description="M: held-out answers that are scored under each other's prompts, and under each other's contexts, "
        "M x M sequences each (0: none); fixed when the base is measured",
        json_schema_extra=EXECUTION_ONLY,
    )
    scoring_batch_size: PositiveInt = Field(
        8, description="sequences per forward pass when scoring", json_schema_extra=EXECUTION_ONLY
    )
    scorers: PositiveInt = Field(1, description="scoring actors at most", json_schema_extra=EXECUTION_ONLY)
    bootstrap_samples: Annotated[int, Field(ge=100)] = Field(
        2000, description="bootstrap resamples behind each 95 % interval"
    )
    judge: JudgeConfig = Field(default_factory=JudgeConfig, description="a model that judges the held-out answers")

    @model_validator(mode="after")
    def _judge_has_answers(self) -> EvaluateConfig:
        if self.judge.is_on and not self.enabled:
            raise ValueError("judge judges the held-out answers, which enabled=false leaves out; set enabled=true")
        return self
