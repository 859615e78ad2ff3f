"""The typed configuration of a run: every field, its default and its meaning.

`recipe.load_config` makes one from a YAML recipe and overrides. Nothing here imports torch, ray or vllm, so that
`--help` and `--dry-run` answer at once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
Strategy = Literal["missing_context", "random_prompt", "swapped_response"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class ModelConfig(Section):
    """The initial policy."""

    path: str = Field(
        "embedded",
        description="'embedded' (SmolLM2-135M-Instruct), a local directory, a remote URL (s3://, gs://) of a model "
        "directory, or a Hugging Face id",
    )
    dtype: Dtype = Field("auto", description="dtype of the policy; auto: bfloat16 on GPUs, float32 on CPUs")
    max_model_len: Annotated[int, Field(ge=16)] = Field(
        1024, description="context window in tokens, prompt and response together"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class PromptsConfig(Section):
    """A table of prompts and how a row becomes chat messages."""

    path: str = Field(
        "bundled:personalization",
        description="JSONL, Parquet or CSV: one file or a glob, on any filesystem that fsspec opens; "
        "bundled:NAME is a file of mipo_ray/examples",
    )
    column: str = Field("prompt", description="column with the prompt: a string, or chat messages that end with user")
    context_column: str = Field("context", description="optional column: what is known of the user")
    group_column: str = Field("group", description="optional column: rows of one group are never mismatched")
    id_column: str = Field("prompt_id", description="optional column with unique ids; without it rows are numbered")
    limit: PositiveInt | None = Field(None, description="use the first rows only; null: all")
    system: str | None = Field(None, description="system message before every prompt that brings none of its own")
    context_template: str = Field(
        "{{ context }}\n\n{{ question }}",
        description="Jinja2 template (sandboxed) that joins context and question into the user message",
    )


class ConditioningConfig(Section):
    """What the mismatched response is sampled under."""

    strategy: Strategy = Field(
        "missing_context",
        description="missing_context: the same question without the user's context; random_prompt: another prompt; "
        "swapped_response: another prompt, its matched response reused",
    )
    block_size: Annotated[int, Field(ge=2)] = Field(
        32, description="rows among which mismatched prompts are drawn; also the grain of resume"
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

    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="sampling parameters")
    pool: EnginePoolConfig = Field(default_factory=EnginePoolConfig, description="the vLLM actors")


class FiltersConfig(Section):
    """Which sampled pairs are left out of training; every reason is counted."""

    drop_too_long: bool = Field(
        False, description="drop prompts that do not fit the context window; false: stop before any engine starts"
    )
    truncated: bool = Field(False, description="drop pairs with a response cut at the length limit")
    min_length_ratio: NonNegativeFloat = Field(
        0.0, description="drop when chosen tokens / rejected tokens is below this"
    )
    max_length_ratio: PositiveFloat | None = Field(
        None, description="drop when chosen tokens / rejected tokens is above this; null: no limit"
    )
    max_copy_rate: Share = Field(
        1.0, description="drop when more than this share of the chosen response's word 3-grams stands in its prompt"
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
        return self


class TrainConfig(Section):
    """DPO on the round's pairs (Rafailov et al. 2023, equation 7)."""

    beta: PositiveFloat = Field(0.1, description="strength of the KL tie to the reference")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="assumed share of pairs with swapped labels (conservative DPO)"
    )
    learning_rate: PositiveFloat = Field(5e-7, description="peak learning rate of AdamW")
    batch_size: PositiveInt = Field(4, description="pairs per optimizer step over all workers")
    micro_batch_size: PositiveInt = Field(
        4, description="pairs per forward pass of one worker", json_schema_extra=EXECUTION_ONLY
    )
    epochs: PositiveInt = Field(1, description="passes over the round's pairs")
    warmup_ratio: Share = Field(0.03, description="share of the steps with a linearly rising learning rate")
    min_learning_rate_ratio: Share = Field(0.1, description="floor of the cosine schedule, as a share of the peak")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradient clipping, L2 norm over all parameters")
    adam_betas: tuple[Share, Share] = Field((0.9, 0.95), description="AdamW betas", strict=False)
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW weight decay")
    num_workers: PositiveInt = Field(1, description="data-parallel training workers")
    gpus_per_worker: NonNegativeFloat | None = Field(
        None,
        description="GPUs of a worker; null: 1 where the cluster has GPUs, else 0",
        json_schema_extra=EXECUTION_ONLY,
    )
    cpus_per_worker: PositiveFloat = Field(
        1.0, description="logical CPUs reserved by a worker", json_schema_extra=EXECUTION_ONLY
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO stage", json_schema_extra=EXECUTION_ONLY)
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in backward", json_schema_extra=EXECUTION_ONLY
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="raw DeepSpeed configuration keys, merged over the generated ones"
    )
    max_failures: NonNegativeInt = Field(
        1, description="restarts of the worker group after a worker dies", json_schema_extra=EXECUTION_ONLY
    )

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainConfig:
        if self.batch_size % self.num_workers:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of num_workers ({self.num_workers})")
        return self


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
    scoring_batch_size: PositiveInt = Field(
        8, description="sequences per forward pass when scoring", json_schema_extra=EXECUTION_ONLY
    )
    scorers: PositiveInt = Field(1, description="scoring actors at most", json_schema_extra=EXECUTION_ONLY)
    bootstrap_samples: Annotated[int, Field(ge=100)] = Field(
        2000, description="bootstrap resamples behind each 95 % interval"
    )


class RayConfig(Section):
    """Where the run executes."""

    address: str | None = Field(
        None,
        description="cluster to join ('auto' or host:port); null: RAY_ADDRESS where it is set (as inside a Ray job), "
        "else a local cluster of this machine",
        json_schema_extra=EXECUTION_ONLY,
    )
    num_cpus: PositiveInt | None = Field(
        None,
        description="logical CPUs of a local cluster; null: the cores of this machine, at least 6 (engine actors "
        "must leave room for read and write tasks)",
        json_schema_extra=EXECUTION_ONLY,
    )
    autoscaling: bool = Field(
        False,
        description="the joined cluster adds nodes on demand: do not refuse a request that its present nodes cannot "
        "hold",
        json_schema_extra=EXECUTION_ONLY,
    )


class Config(Section):
    """Everything that defines a run."""

    run_dir: str = Field(
        "runs/demo",
        description="run directory: a local path (shared between nodes on a cluster) or a remote URL",
        json_schema_extra=EXECUTION_ONLY,
    )
    rounds: PositiveInt = Field(
        2, description="generate -> train -> evaluate passes; may be raised later", json_schema_extra=EXECUTION_ONLY
    )
    seed: NonNegativeInt = Field(0, description="seed of every random choice")
    model: ModelConfig = Field(default_factory=ModelConfig, description="the initial policy")
    prompts: PromptsConfig = Field(default_factory=PromptsConfig, description="training prompts")
    conditioning: ConditioningConfig = Field(default_factory=ConditioningConfig, description="mismatched prompts")
    generation: GenerationConfig = Field(default_factory=GenerationConfig, description="sampling")
    filters: FiltersConfig = Field(default_factory=FiltersConfig, description="pair filters")
    train: TrainConfig = Field(default_factory=TrainConfig, description="DPO training")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="held-out measurement")
    ray: RayConfig = Field(default_factory=RayConfig, description="the cluster")

    @model_validator(mode="after")
    def _fits_the_window(self) -> Config:
        if self.generation.sampling.max_tokens >= self.model.max_model_len:
            raise ValueError(
                f"generation.sampling.max_tokens ({self.generation.sampling.max_tokens}) leaves no room for a prompt "
                f"in model.max_model_len ({self.model.max_model_len})"
            )
        if self.generation.sampling.min_tokens > self.generation.sampling.max_tokens:
            raise ValueError("generation.sampling.min_tokens is larger than generation.sampling.max_tokens")
        return self
