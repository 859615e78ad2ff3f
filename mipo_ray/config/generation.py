"""The generation section: sampling, and the pool of vLLM actors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mipo_ray.config.base import (
    Section,
    check_at_most,
    check_engine_arguments,
    execution_only,
    node_labels,
    reserved_cpus,
    reserved_gpus,
)
from mipo_ray.config.field_types import (
    LabelSelector,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ReservedCpus,
    ReservedGpus,
    Share,
)


class SamplingConfig(Section):
    """vLLM sampling parameters of every response."""

    temperature: NonNegativeFloat = Field(0.7, description="0 is greedy decoding")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="nucleus sampling mass")
    top_k: NonNegativeInt = Field(0, description="0: no limit")
    max_tokens: PositiveInt = Field(48, description="response length limit in tokens")
    min_tokens: NonNegativeInt = Field(0, description="no end token before this many tokens")


class EnginePoolConfig(Section):
    """The pool of vLLM actors. Sizes are execution only: they never change a pair's conditioning or seeds."""

    min_size: PositiveInt = execution_only(1, "engines at least")
    max_size: PositiveInt = execution_only(1, "engines at most")
    lifetime: Literal["auto", "run", "stage"] = execution_only(
        "auto",
        "how long engines live. run: min_size of them until the run ends, and each new policy's weights go into them; "
        "stage: they are gone when their stage is, and what they reserve is free for the next; auto: run where engines "
        "and all that comes beside them fit at once, else stage (the plan says which)",
    )
    tensor_parallel_size: PositiveInt = execution_only(1, "GPUs that share one engine, inside a node")
    gpus_per_engine: ReservedGpus | None = reserved_gpus("an engine", "tensor_parallel_size")
    cpus_per_engine: ReservedCpus = reserved_cpus("an engine")
    label_selector: LabelSelector = node_labels(
        "engines, those of the evaluation too, and scoring actors", role="generate"
    )
    batches_in_flight: PositiveInt = execution_only(
        4, "blocks that one engine works on at the same time, so that it never waits for a block's longest answer"
    )
    engine_args: dict[str, Any] = execution_only(
        {}, "raw vLLM engine arguments, passed through (max_num_seqs, gpu_memory_utilization, ...)"
    )

    @model_validator(mode="after")
    def _sizes_agree(self) -> EnginePoolConfig:
        check_at_most(("min_size", self.min_size), ("max_size", self.max_size))
        check_engine_arguments(self.engine_args, of_policy=True)
        return self


class GenerationConfig(Section):
    """Sampling matched and mismatched responses."""

    samples_per_prompt: PositiveInt = Field(1, description="n: matched responses of each prompt, one pair row each")
    negatives_per_prompt: PositiveInt = Field(
        1,
        description="K: mismatched responses of each prompt, each under another mismatched prompt where there are any",
    )
    pairing: Literal["zip", "all"] = Field(
        "zip",
        description="which mismatched responses a matched one is paired with. zip: K / n of them, no two matched ones "
        "with the same; all: all K",
    )
    score_pmi: bool = Field(
        True, description="score each chosen response under the mismatched prompt too, which gives the pair's PMI"
    )
    stall_minutes: PositiveFloat | None = execution_only(
        30.0, "an engine that has requests and does no step for so long is replaced; null: it is waited for without end"
    )
    max_quarantined_share: Share = execution_only(
        0.01,
        "stop the run when engines die of more than this share of a round's prompts, rounded up to whole ones; fewer "
        "are set aside and give no pair",
    )
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="sampling parameters")
    pool: EnginePoolConfig = Field(default_factory=EnginePoolConfig, description="the vLLM actors")

    @property
    def rejected_per_pair(self) -> int:
        """Rejected responses of one pair row; above 1 the pairs have schema version 2. One where a reward chooses."""
        if self.pairing == "all":
            return self.negatives_per_prompt
        return self.negatives_per_prompt // self.samples_per_prompt

    @model_validator(mode="after")
    def _samples_fit(self) -> GenerationConfig:
        if self.samples_per_prompt > 1 and self.sampling.temperature == 0:
            raise ValueError("samples_per_prompt above 1 at sampling.temperature 0 would be the same answer each time")
        if self.pairing == "zip" and self.negatives_per_prompt % self.samples_per_prompt:
            raise ValueError(
                f"pairing zip shares negatives_per_prompt ({self.negatives_per_prompt}) out to samples_per_prompt "
                f"({self.samples_per_prompt}) matched responses: expected a multiple; or set pairing=all"
            )
        return self
