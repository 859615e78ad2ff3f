"""The sections of the configuration that say how pairs are made: prompts, conditioning, generation, filters.

Nothing here imports torch, ray or vllm.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mipo_ray.config_exemplars import Exemplars
from mipo_ray.config_types import (
    EXECUTION_ONLY,
    LabelSelector,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
)

# A mixture chooses among the others, row by row.
SingleStrategy = Literal[
    "random_prompt", "swapped_response", "missing_context", "random_context", "partial_prompt", "similar_prompt"
]
Strategy = Literal[SingleStrategy, "mixture"]
Similarity = Annotated[float, Field(ge=-1, le=1)]


class PromptsConfig(Section):
    """A table of prompts and how a row becomes chat messages."""

    path: str = Field(
        "bundled:personalization",
        description="JSONL, Parquet or CSV: one file or a glob, on any filesystem that fsspec opens; "
        "bundled:NAME is a file of mipo_ray/examples",
    )
    loader: Literal["rows", "prism", "community_alignment", "multi_bench"] = Field(
        "rows",
        description="what the files hold. rows: one prompt a row, in the columns named below; the others: a public "
        "personalization data set with its published columns",
    )
    profiles_path: str | None = Field(
        None, description="loader prism: the file of user profiles (survey.jsonl); path names the conversations"
    )
    column: str = Field("prompt", description="column with the prompt: a string, or chat messages that end with user")
    question_template: str | None = Field(
        None,
        description="Jinja2 template (sandboxed) over the row's columns that makes the prompt; null: prompts.column",
    )
    context_column: str = Field("context", description="optional column: what is known of the user")
    group_column: str = Field("group", description="optional column: rows of one group are never mismatched")
    id_column: str = Field("prompt_id", description="optional column with unique ids; without it rows are numbered")
    reference_column: str = Field(
        "reference",
        description="optional column: a good answer to this prompt, which nothing but the pointwise judge reads",
        json_schema_extra=EXECUTION_ONLY,
    )
    limit: PositiveInt | None = Field(None, description="use the first rows only; null: all")
    system: str | None = Field(None, description="system message before every prompt that brings none of its own")
    exemplars: Exemplars = Field(
        (),
        strict=False,
        description="solved examples, each as a turn of user and assistant before the prompt; bundled:word_problems is "
        "eight of this project's",
    )
    context_role: Literal["user", "system"] = Field(
        "user", description="the message that holds the context: the user's, before the question, or the system's"
    )
    context_template: str | None = Field(
        None,
        description="Jinja2 template (sandboxed) of that message: context and question (user), context alone "
        "(system); null: the context, and for the user an empty line and the question",
    )


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


class SamplingConfig(Section):
    """vLLM sampling parameters of every response."""

    temperature: NonNegativeFloat = Field(0.7, description="0 is greedy decoding")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="nucleus sampling mass")
    top_k: NonNegativeInt = Field(0, description="0: no limit")
    max_tokens: PositiveInt = Field(48, description="response length limit in tokens")
    min_tokens: NonNegativeInt = Field(0, description="no end token before this many tokens")


class EnginePoolConfig(Section):
    """The pool of vLLM actors. Sizes are execution only: they never change a pair's conditioning or seeds."""

    min_size: PositiveInt = Field(1, description="engines at least", json_schema_extra=EXECUTION_ONLY)
    max_size: PositiveInt = Field(1, description="engines at most", json_schema_extra=EXECUTION_ONLY)
    tensor_parallel_size: PositiveInt = Field(
        1, description="GPUs that share one engine, inside a node", json_schema_extra=EXECUTION_ONLY
    )
    gpus_per_engine: NonNegativeFloat | None = Field(
        None,
        description="GPUs reserved by an engine; null: tensor_parallel_size where the cluster has GPUs, else 0",
        json_schema_extra=EXECUTION_ONLY,
    )
    cpus_per_engine: PositiveFloat = Field(
        1.0, description="logical CPUs reserved by an engine", json_schema_extra=EXECUTION_ONLY
    )
    label_selector: LabelSelector = Field(
        default_factory=dict,
        description="labels of the Ray nodes that engines, those of the evaluation too, and scoring actors run on, for "
        "example {mipo.io/role: generate}; conditions: value, !value, in(a, b), !in(a, b)",
        json_schema_extra=EXECUTION_ONLY,
    )
    batches_in_flight: PositiveInt = Field(
        4,
        description="blocks that one engine works on at the same time, so that it never waits for a block's longest "
        "answer",
        json_schema_extra=EXECUTION_ONLY,
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description="raw vLLM engine arguments, passed through (max_num_seqs, gpu_memory_utilization, ...)",
        json_schema_extra=EXECUTION_ONLY,
    )

    @model_validator(mode="after")
    def _sizes_agree(self) -> EnginePoolConfig:
        if self.min_size > self.max_size:
            raise ValueError(f"min_size ({self.min_size}) is larger than max_size ({self.max_size})")
        reserved = {"model", "tokenizer", "dtype", "max_model_len", "tensor_parallel_size", "trust_remote_code"}
        reserved |= {"generation_config", "logprobs_mode"}
        for key in sorted(reserved & self.engine_args.keys()):
            raise ValueError(f"engine_args.{key} is set by the configuration itself; remove it")
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
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="sampling parameters")
    pool: EnginePoolConfig = Field(default_factory=EnginePoolConfig, description="the vLLM actors")

    @property
    def rejected_per_pair(self) -> int:
        """Rejected responses of one pair row; above 1 the pairs have schema version 2."""
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


class PatternFilter(Section):
    """A regular expression that decides over a pair."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="counted as pattern_NAME")
    regex: str = Field(description="Python regular expression, searched anywhere in the response")
    side: Literal["chosen", "rejected", "either"] = Field("chosen", description="which responses are searched")
    drop_when: Literal["found", "missing"] = Field("found", description="drop pairs where it is found, or missing")

    @field_validator("regex")
    @classmethod
    def _compiles(cls, regex: str) -> str:
        try:
            re.compile(regex)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return regex


class FiltersConfig(Section):
    """Which sampled pairs are left out of training; every reason is counted."""

    drop_too_long: bool = Field(
        False, description="drop prompts that do not fit the context window; false: stop before any engine starts"
    )
    identical: bool = Field(True, description="drop pairs whose chosen and rejected responses are the same text")
    equal_answers: Literal["choice", "number"] | None = Field(
        None, description="drop pairs with the same final answer: an option's letter, or a number; null: keep them"
    )
    truncated: bool = Field(False, description="drop pairs with a response cut at the length limit")
    min_length_ratio: NonNegativeFloat = Field(
        0.0, description="drop when chosen tokens / rejected tokens is below this"
    )
    max_length_ratio: PositiveFloat | None = Field(
        None, description="drop when chosen tokens / rejected tokens is above this; null: no limit"
    )
    max_repetition: Share = Field(
        1.0, description="drop when more than this share of a response's word 3-grams repeats earlier ones"
    )
    max_copy_rate: Share = Field(
        1.0, description="drop when more than this share of the chosen response's word 3-grams stands in its prompt"
    )
    min_pmi: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        None, description="drop when log p(chosen | prompt) - log p(chosen | mismatched prompt) is below this, nats"
    )
    patterns: tuple[PatternFilter, ...] = Field(
        (),
        strict=False,
        description="regular expressions (refusals, languages), each with a name, regex, side, drop_when",
    )
    max_dropped_share: Share = Field(
        0.9,
        description="stop the run when filters drop more than this share of the rows",
        json_schema_extra=EXECUTION_ONLY,
    )

    @model_validator(mode="after")
    def _bounds_agree(self) -> FiltersConfig:
        if self.max_length_ratio is not None and self.min_length_ratio > self.max_length_ratio:
            raise ValueError(
                f"min_length_ratio ({self.min_length_ratio}) is above max_length_ratio ({self.max_length_ratio})"
            )
        if len({pattern.name for pattern in self.patterns}) < len(self.patterns):
            raise ValueError("patterns: expected different names")
        return self
