"""The section of the configuration that says what is measured of each policy.

Nothing here imports torch, ray or vllm.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from mipo_ray.config.base import Section, execution_only
from mipo_ray.config.field_types import PositiveInt
from mipo_ray.config.judge import JudgeConfig
from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.errors import brief
from mipo_ray.measures import ECHO_SHARES, HELD_OUT, WITHOUT_INTERVAL


class TaskConfig(Section):
    """What a run sets of an accuracy task; the rest stands in the task's own file (evaluation/tasks)."""

    path: str | None = Field(None, description="the task's data, in place of the path that its file names")
    limit: PositiveInt | None = Field(None, description="measure the first rows only; null: all")
    max_tokens: PositiveInt | None = Field(None, description="response length limit in tokens; null: the task's own")


class EvaluateConfig(Section):
    """Held-out measurement before round 0 and after every round."""

    enabled: bool = Field(True, description="measure the base and every round's policy")
    schedule: Literal["auto", "sequential", "overlapping"] = execution_only(
        "auto",
        "sequential: a policy is evaluated before the next round's pairs are sampled from it; overlapping: at the same "
        "time, by the same engines, which must live as long as the run; the next training waits for it. auto: "
        "overlapping where such engines and a scorer have GPUs of their own at the same time, else sequential (the "
        "plan says which)",
    )
    prompts: PromptsConfig = Field(
        default_factory=lambda: PromptsConfig(path="bundled:personalization_heldout"),
        description="held-out prompts, never trained on",
    )
    primary: str | None = execution_only(
        None,
        "the one measure that the run is about, a name of results.json, fixed before anything is sampled; all others "
        "are exploratory; null: context_pmi_initial where held-out rows have a context, else pmi_initial",
    )
    samples_per_prompt: PositiveInt = Field(2, description="responses sampled for each held-out prompt")
    other_prompts: PositiveInt = Field(
        3, description="K: other held-out conditionings that each response is scored under"
    )
    matrix: Annotated[int, Field(ge=0)] = execution_only(
        8,
        "M: held-out answers that are scored under each other's prompts, and under each other's contexts, "
        "M x M sequences each (0: none); fixed when the base is measured",
    )
    scoring_batch_size: PositiveInt = execution_only(8, "responses per forward pass when scoring")
    scorers: PositiveInt = execution_only(1, "scoring actors at most")
    judge: JudgeConfig = Field(default_factory=JudgeConfig, description="a model that judges the held-out answers")
    tasks: dict[str, TaskConfig] = execution_only(
        {},
        "accuracy tasks, a list of names or a mapping of names to {path, limit, max_tokens}; a name is one "
        "of mipo_ray/evaluation/tasks (gsm8k, svamp, arc_easy, mmlu_likelihood, ...) or the path of a task file of "
        "your own",
    )
    task_max_model_len: PositiveInt | None = execution_only(
        None, "window in tokens of the engines that measure tasks; null: model.max_model_len"
    )

    @field_validator("primary")
    @classmethod
    def _primary_is_measured(cls, primary: str | None) -> str | None:
        names = [name for name in HELD_OUT if name not in (*WITHOUT_INTERVAL, *ECHO_SHARES)]
        if primary is not None and primary not in names:
            why = ", which has no interval" if primary in WITHOUT_INTERVAL else ""
            why = ", which only a rise has" if primary in ECHO_SHARES else why
            raise ValueError(f"expected one of {', '.join(names)}; found {brief(primary)}{why}")
        return primary

    @field_validator("tasks", mode="before")
    @classmethod
    def _names_are_enough(cls, tasks: Any) -> Any:
        if isinstance(tasks, str):
            tasks = [tasks]
        if isinstance(tasks, list | tuple):
            if others := [entry for entry in tasks if not isinstance(entry, str)]:
                raise ValueError(
                    "expected task names, or a mapping of names to {path, limit, max_tokens}; found "
                    + ", ".join(map(brief, others[:5]))
                )
            if repeated := sorted({name for name in tasks if tasks.count(name) > 1}):
                raise ValueError(f"expected each task once, found {', '.join(repeated)} several times")
            return {name: {} for name in tasks}
        if isinstance(tasks, dict):
            return {name: {} if settings is None else settings for name, settings in tasks.items()}
        return tasks
