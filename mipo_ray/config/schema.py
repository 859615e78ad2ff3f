"""The typed configuration of a run: every field, its default and its meaning.

`recipe.load_config` makes one from a YAML recipe and overrides. Nothing here imports torch, ray or vllm, so that
`--help` and `--dry-run` answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mipo_ray.config.base import Section, check_room, execution_only
from mipo_ray.config.conditioning import ConditioningConfig
from mipo_ray.config.cost import CostConfig
from mipo_ray.config.evaluate import EvaluateConfig
from mipo_ray.config.field_types import Dtype, NonNegativeInt, PositiveFloat, PositiveInt, Window
from mipo_ray.config.filters import FiltersConfig
from mipo_ray.config.generation import GenerationConfig
from mipo_ray.config.guard import GuardConfig
from mipo_ray.config.pairs import OF_SAMPLING, READ_OF_PROMPTS, PairsConfig, other_than_default
from mipo_ray.config.preference import OF_MISMATCHED_PROMPTS, OF_MISMATCHED_RESPONSES, PreferenceConfig
from mipo_ray.config.prompts import TrainingPromptsConfig
from mipo_ray.config.train import TrainConfig
from mipo_ray.errors import brief
from mipo_ray.models.hub import HUB_ID, REVISION

ThoughtMarks = Annotated[tuple[str, str], Field(strict=False)]


class ModelConfig(Section):
    """The initial policy."""

    path: str = Field(
        "embedded",
        description="'embedded' (SmolLM2-135M-Instruct), a local directory, a remote URL (s3://, gs://) of a model "
        "directory, or a Hugging Face id, with @REVISION behind it where wanted",
    )
    revision: str | None = Field(
        None,
        description="branch, tag or commit of a Hugging Face id; null: what path names, else the main branch. A commit "
        "alone is the same model tomorrow",
    )
    dtype: Dtype = Field("auto", description="dtype of the policy; auto: bfloat16 on GPUs, float32 on CPUs")
    max_model_len: Window = Field(1024, description="context window in tokens, prompt and response together")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    thought_marks: Annotated[tuple[ThoughtMarks, ...], Field(strict=False)] | None = Field(
        None,
        description="[opening, closing] marks of the model's thoughts, where they are none of the usual ones (<think>, "
        "[THINK], <|begin_of_thought|>, channels, ...) and its chat template writes none around reasoning_content",
    )

    @field_validator("thought_marks")
    @classmethod
    def _are_marks(cls, marks: tuple[tuple[str, str], ...] | None) -> tuple[tuple[str, str], ...] | None:
        for opening, closing in marks or ():
            if not opening.strip() or not closing.strip() or opening == closing:
                raise ValueError(f"expected two different marks, found {brief(opening)} and {brief(closing)}")
        return marks

    @property
    def source(self) -> str:
        """The model in one word, as `models.source` takes it: its path, and its revision behind an @."""
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    @model_validator(mode="after")
    def _has_one_revision(self) -> ModelConfig:
        if self.revision is not None and (not REVISION.fullmatch(self.revision) or not HUB_ID.fullmatch(self.path)):
            raise ValueError(
                "revision is a branch, tag or commit of a Hugging Face id (organisation/name) in path, found "
                f"{brief(self.revision)} of {brief(self.path)}"
            )
        return self


class RayConfig(Section):
    """Where the run executes."""

    address: str | None = execution_only(
        None,
        "cluster to join ('auto' or host:port); null: RAY_ADDRESS where it is set (as inside a Ray job), "
        "else a local cluster of this machine",
    )
    num_cpus: PositiveInt | None = execution_only(
        None,
        "logical CPUs of a local cluster; null: the cores of this machine, at least 6 (engine actors "
        "must leave room for read and write tasks)",
    )
    autoscaling: bool = execution_only(
        False, "the joined cluster adds nodes on demand: do not refuse a request that its present nodes cannot hold"
    )
    wait_timeout_minutes: PositiveFloat = execution_only(
        30.0,
        "how long a stage waits for nodes for its first engine, or for all the workers that training "
        "starts with, before the run stops with the reason",
    )


Tracker = Literal["tensorboard", "mlflow", "wandb"]


class Config(Section):
    """Everything that defines a run."""

    run_dir: str = execution_only(
        "runs/demo", "run directory: a local path (shared between nodes on a cluster) or a remote URL"
    )
    rounds: int = execution_only(
        2, "generate -> train -> evaluate passes, at most 1000; may be raised later", gt=0, le=1000
    )
    seed: NonNegativeInt = Field(0, description="seed of every random choice")
    model: ModelConfig = Field(default_factory=ModelConfig, description="the initial policy")
    prompts: TrainingPromptsConfig = Field(default_factory=TrainingPromptsConfig, description="training prompts")
    pairs: PairsConfig = Field(default_factory=PairsConfig, description="pairs that exist, in place of sampled ones")
    conditioning: ConditioningConfig = Field(default_factory=ConditioningConfig, description="mismatched prompts")
    generation: GenerationConfig = Field(default_factory=GenerationConfig, description="sampling")
    preference: PreferenceConfig = Field(default_factory=PreferenceConfig, description="who chooses between responses")
    filters: FiltersConfig = Field(default_factory=FiltersConfig, description="pair filters")
    train: TrainConfig = Field(default_factory=TrainConfig, description="training")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="held-out measurement")
    guard: GuardConfig = Field(default_factory=GuardConfig, description="bounds that a round must keep")
    ray: RayConfig = Field(default_factory=RayConfig, description="the cluster")
    cost: CostConfig = Field(default_factory=CostConfig, description="what the plan reckons hours and dollars by")
    schedule: Literal["auto", "sequential", "streaming"] = execution_only(
        "auto",
        "sequential: a round trains when all its pairs are generated, in the order of pair_id; streaming: it trains on "
        "each block of pairs as soon as that is written, in the order of the prompts, while engines go on (an "
        "interrupted training goes on in the order that it was begun in); auto: streaming where engines and training "
        "workers have GPUs of their own at the same time, else sequential (the plan says which)",
    )
    trackers: tuple[Tracker, ...] = execution_only(
        (),
        "who gets the numbers of metrics.jsonl too: tensorboard, mlflow, wandb; their addresses and keys "
        "come from the environment (MLFLOW_TRACKING_URI, WANDB_API_KEY, WANDB_MODE=offline, ...)",
        strict=False,
    )

    @property
    def windows(self) -> dict[str, int]:
        """The context windows that engines with a policy of the run are started with: field -> tokens."""
        found = {"model.max_model_len": self.model.max_model_len}
        if self.evaluate.task_max_model_len is not None:
            found["evaluate.task_max_model_len"] = self.evaluate.task_max_model_len
        return found

    @property
    def starts_engines(self) -> bool:
        """Whether anything is sampled: a run on pairs that exist that measures nothing needs no engine."""
        return self.pairs.path is None or self.evaluate.enabled

    @property
    def is_mipo(self) -> bool:
        """Whether the run makes its pairs by mutual information: they do not exist, and no reward chooses them."""
        return self.pairs.path is None and self.preference.is_mipo

    @property
    def samples_of_prompt(self) -> int:
        """Responses that are sampled to each prompt itself."""
        return self.generation.samples_per_prompt if self.preference.is_mipo else self.preference.samples

    @property
    def embeds_prompts(self) -> bool:
        """Whether training prompts are embedded, to find those that are near one another."""
        return self.preference.mismatches and "similar_prompt" in self.conditioning.strategies

    @property
    def scores_pmi(self) -> bool:
        """Whether responses are scored under mismatched prompts too: the chosen ones, or all that PMI chooses from."""
        return self.generation.score_pmi and self.preference.mismatches

    @model_validator(mode="after")
    def _judge_has_answers(self) -> Config:
        if self.evaluate.judge.is_on and not self.evaluate.enabled and self.preference.chooser != "judge":
            raise ValueError(
                "evaluate.judge judges the held-out answers, which evaluate.enabled=false leaves out; set "
                "evaluate.enabled=true"
            )
        return self

    @model_validator(mode="after")
    def _guard_has_figures(self) -> Config:
        if self.guard.when_bad is not None and not self.evaluate.enabled:
            raise ValueError(
                f"guard.when_bad {self.guard.when_bad} compares what is measured after each round, which "
                "evaluate.enabled=false leaves out; set evaluate.enabled=true"
            )
        return self

    @model_validator(mode="after")
    def _guard_decides_first(self) -> Config:
        if self.guard.when_bad is not None and self.evaluate.schedule == "overlapping":
            raise ValueError(
                "evaluate.schedule overlapping samples the next round's pairs while a policy is measured, and "
                "guard.when_bad waits for what is measured: expected evaluate.schedule auto or sequential, or no guard"
            )
        return self

    @model_validator(mode="after")
    def _has_what_chooses(self) -> Config:
        chooser = self.preference.chooser
        if chooser == "mipo":
            return self
        if self.pairs.path is not None:
            raise ValueError(f"pairs.path holds pairs that were chosen: take it out, or preference.chooser {chooser}")
        if chooser == "judge" and self.evaluate.judge.endpoint is None:
            raise ValueError(
                "preference.chooser judge asks the judge of evaluate.judge while engines sample: set "
                "evaluate.judge.model and evaluate.judge.endpoint, a server that runs it"
            )
        if self.train.objective == "sami":
            raise ValueError(
                f"train.objective sami compares two prompts, and preference.chooser {chooser} has one: choose another"
            )
        if self.generation.sampling.temperature == 0:
            raise ValueError(
                f"preference.chooser {chooser} chooses among samples, and at generation.sampling.temperature 0 all are "
                "the same: expected more than 0"
            )
        if chooser == "pmi" and not self.generation.score_pmi:
            raise ValueError(
                "preference.chooser pmi chooses by what generation.score_pmi=false leaves out: set it to true"
            )
        names = dict(OF_MISMATCHED_RESPONSES)
        if chooser != "pmi":
            names["generation"] += OF_MISMATCHED_PROMPTS
        if chooser != "pmi" and not self.evaluate.enabled:  # held-out answers are compared by the strategies
            names["conditioning"] = tuple(name for name in ConditioningConfig.model_fields if name != "block_size")
        if unread := self._set_among(names):
            raise ValueError(
                f"{', '.join(unread)}: expected only what preference.chooser {chooser} reads; these are about "
                "mismatched responses, of which it has none: take them out, or choose by mipo"
            )
        return self

    def _set_among(self, names: Mapping[str, Sequence[str]]) -> list[str]:
        """Those of some sections' fields that hold another value than their default, with the section before them."""
        return [
            f"{section}.{name}"
            for section, candidates in names.items()
            for name in other_than_default(getattr(self, section), candidates)
        ]

    @model_validator(mode="after")
    def _pairs_exist_or_are_sampled(self) -> Config:
        if self.pairs.path is None:
            if alone := other_than_default(self.pairs, ("format", "limit")):
                raise ValueError(f"pairs.{alone[0]} says how pairs.path is read: set pairs.path")
            return self
        if self.rounds != 1:
            raise ValueError(
                f"pairs.path holds the pairs of one round: expected rounds=1, found {self.rounds}; train.epochs passes "
                "over them more than once"
            )
        if self.train.objective == "sami":
            raise ValueError("train.objective sami compares two prompts, and pairs.path has one: choose another one")
        if self.schedule == "streaming":
            raise ValueError("schedule streaming trains while pairs are sampled, and pairs.path holds them all")
        if self.evaluate.schedule == "overlapping":
            raise ValueError(
                "evaluate.schedule overlapping evaluates while pairs are sampled, and pairs.path holds them all"
            )
        default = EvaluateConfig().prompts.path
        if self.evaluate.enabled and self.evaluate.prompts.path == default:
            raise ValueError(
                "with pairs.path a run measures on held-out prompts of your own: set evaluate.prompts.path, and "
                f"conditioning.strategy to what it measures (found {default}), or evaluate.enabled=false"
            )
        if unread := self._unread_with_pairs():
            raise ValueError(
                f"{', '.join(unread)}: expected only what training on pairs.path reads; these are about prompts and "
                "samples, of which it has none: take them out, or take pairs.path out"
            )
        return self

    def _unread_with_pairs(self) -> list[str]:
        """What is set and would do nothing where pairs exist; what they have in common with sampled ones is read."""
        names = {"prompts": [name for name in type(self.prompts).model_fields if name not in READ_OF_PROMPTS]}
        if not self.evaluate.enabled:  # held-out answers are compared by the strategies
            names["conditioning"] = list(ConditioningConfig.model_fields)
        return self._set_among({**names, **OF_SAMPLING})

    @model_validator(mode="after")
    def _fits_the_window(self) -> Config:
        check_room(
            ("generation.sampling.max_tokens", self.generation.sampling.max_tokens),
            ("model.max_model_len", self.model.max_model_len),
        )
        if self.filters.min_pmi is not None and not self.generation.score_pmi:
            raise ValueError("filters.min_pmi needs the PMI of each pair: set generation.score_pmi=true")
        if self.train.shuffle_labels and self.generation.rejected_per_pair > 1:
            raise ValueError(
                "train.shuffle_labels swaps chosen and rejected: expected one rejected response in each pair, found "
                f"{self.generation.rejected_per_pair}"
            )
        if self.schedule == "streaming" and self.train.reference_mode == "cached":
            raise ValueError(
                "schedule streaming trains before all pairs are there: expected train.reference_mode colocated or "
                "adapter, found cached"
            )
        if self.generation.sampling.min_tokens > self.generation.sampling.max_tokens:
            raise ValueError("generation.sampling.min_tokens is larger than generation.sampling.max_tokens")
        return self
