"""Accuracy tasks: what a task file says, and how a response is judged by it. No torch, no Ray.

A task file is YAML with the fields of `Task`; this project's own are mipo_ray/evaluation/tasks/NAME.yaml. The question
template is rendered as that of `prompts` is, over the row's columns; where the task has options, `options` is the list
of them, each with `label` and `text`. What a row becomes, stands in `items`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from mipo_ray.config.base import Section
from mipo_ray.config.field_types import PositiveInt
from mipo_ray.config.generation import SamplingConfig
from mipo_ray.config.prompts import Exemplars, PromptsConfig
from mipo_ray.config.yaml_text import load_yaml
from mipo_ray.errors import UserError, brief, cut, few
from mipo_ray.prompts.reading import nearest
from mipo_ray.text.final_answers import final_choice, final_number

TASKS_DIRECTORY = Path(__file__).parent


class Task(Section):
    """A task file."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="names the results and their directory")
    version: PositiveInt = Field(description="raised whenever the same model may get another result")
    kind: Literal["generative", "likelihood", "choice"] = Field(
        description="generative: the model answers, and its final answer is read; likelihood: the option whose text is "
        "the likeliest continuation is its answer; choice: of answers to a question its answer is the one with the "
        "highest pointwise mutual information with what is known of the user (log-prob with it minus without, nats)"
    )
    path: str = Field(description="the data: a file or a glob on any filesystem; evaluate.tasks.NAME.path overrides it")
    id_column: str = Field("id", description="optional column with unique ids; without it rows are numbered")
    answer_column: str | None = Field(
        None,
        description="column with the answer. number: a number, or text that ends in `#### number`; options: the "
        "label of one, or its index from 0 where they have no labels of their own",
    )
    answer_index: int | None = Field(
        None,
        description="choice, in place of answer_column: the place of the right option in every row, 0 the first, -1 "
        "the last",
    )
    options_column: str | None = Field(
        None, description="column with the options: a list of texts, or a struct of two lists, text and label"
    )
    labels_column: str = Field(
        "labels",
        description="optional column with the labels of options that are a list of texts; else A, B, C, ...; where "
        "answers are read, each label is one of A to J, a to j or 1 to 5",
    )
    question_template: str = Field(description="Jinja2 template of the question, and of the context of a likelihood")
    context_template: str | None = Field(
        None, description="choice: Jinja2 template of what is known of the user, which stands before the question"
    )
    cluster_column: str | None = Field(
        None,
        description="column whose rows of one value are alike (subject, passage): intervals draw it as a whole",
    )
    system: str | None = Field(None, description="system message before every question")
    exemplars: Exemplars = Field(
        (), strict=False, description="solved examples, each as a turn of user and assistant before the question"
    )
    sampling: SamplingConfig | None = Field(None, description="generative: how responses are sampled")
    extraction: Literal["number", "choice"] | None = Field(
        None, description="generative: what the final answer is and how it is read (mipo_ray/text/final_answers)"
    )
    continuation: Literal["text", "label"] | None = Field(
        None, description="likelihood: what of an option is scored, after a space, as the continuation of the question"
    )
    metric: Literal["accuracy", "accuracy_normalized"] = Field(
        "accuracy",
        description="the figure that tables show; accuracy_normalized: likelihood by log-prob per character",
    )

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Task:
        fields: dict[str, dict[str, Any]] = {
            "generative": {"sampling": self.sampling, "extraction": self.extraction},
            "likelihood": {"continuation": self.continuation},
            "choice": {"context_template": self.context_template},
        }
        needed = fields.pop(self.kind)
        foreign = {name: value for of_kind in fields.values() for name, value in of_kind.items()}
        if self.kind != "choice":
            foreign["answer_index"] = self.answer_index
        if missing := [name for name, value in needed.items() if value is None]:
            raise ValueError(f"kind {self.kind} needs {' and '.join(missing)}")
        if given := [name for name, value in foreign.items() if value is not None]:
            raise ValueError(f"kind {self.kind} has no {' and no '.join(given)}")
        if (self.answer_column is None) == (self.answer_index is None):
            names = "answer_column" + " or answer_index" * (self.kind == "choice")
            raise ValueError(f"expected {names}, found {'none' if self.answer_column is None else 'both'}")
        if self.kind == "likelihood" and (self.exemplars or self.system):
            raise ValueError("kind likelihood has no chat: no system message and no exemplars")
        if self.kind != "likelihood" and self.metric != "accuracy":
            raise ValueError(f"kind {self.kind} has the metric accuracy alone")
        if self.has_options != (self.options_column is not None):
            raise ValueError(f"options_column: expected {'a column' if self.has_options else 'none'} for this task")
        return self

    @property
    def has_options(self) -> bool:
        """Whether an item is a question with options."""
        return self.kind != "generative" or self.extraction == "choice"

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured of it, as evaluation.json has it."""
        if self.kind == "likelihood":
            return ("accuracy", "accuracy_normalized", "no_answer")
        return ("accuracy", "no_answer", "truncated", "response_tokens")

    @property
    def prompts(self) -> PromptsConfig:
        """The prompts of the task as the project's own reader of prompt files takes them."""
        return PromptsConfig(
            path=self.path,
            question_template=self.question_template,
            id_column=self.id_column,
            system=self.system,
            exemplars=self.exemplars,
            # Columns that other prompt files have; here they would be a part of the question unseen.
            context_column="",
            group_column="",
        )

    @property
    def prompt_hash(self) -> str:
        """12 hex digits of the SHA-256 hash of all that makes a prompt of a row: template, exemplars, options."""
        fields = {"question_template", "system", "exemplars", "options_column", "labels_column", "continuation"}
        fields |= {"context_template"} if self.kind == "choice" else set()
        text = json.dumps(self.model_dump(mode="json", include=fields), sort_keys=True)
        return sha256(text.encode()).hexdigest()[:12]


def task_names() -> list[str]:
    """The names of this project's own tasks."""
    return sorted(path.stem for path in TASKS_DIRECTORY.glob("*.yaml"))


def load_task(name: str) -> Task:
    """The task of this project with that name, or that of a file of one's own (a path that ends in .yaml or .yml).

    Raises UserError for an unknown name, and, naming the file and each wrong field, for a file that is no task.
    """
    if name.endswith((".yaml", ".yml")):
        return _read_task(Path(name), f"evaluate.tasks: {name}")
    if name not in task_names():
        raise UserError(
            f"evaluate.tasks: no task {name!r}{nearest(name, task_names())}; expected one of "
            f"{', '.join(task_names())}, or the path of a task file (.yaml)"
        )
    return _read_task(TASKS_DIRECTORY / f"{name}.yaml", name)


def extract(task: Task, response: str, option_labels: Sequence[str], option_texts: Sequence[str]) -> str | None:
    """The final answer of a response as `Item.answer` writes it; None where it states none, or none of the options.

    An option that is stated by its text counts as its label where the texts are known and not blank.
    """
    if task.extraction == "choice":
        return final_choice(response, labels=option_labels, texts=option_texts)
    number = final_number(response)
    return None if number is None else str(number)


def verdict(extracted: str | None, answer: str) -> Literal["correct", "wrong", "no_answer"]:
    """Whether an extracted answer is the right one."""
    if extracted is None:
        return "no_answer"
    return "correct" if extracted.casefold() == answer.casefold() else "wrong"


def _read_task(path: Path, shown: str) -> Task:
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{shown}: cannot read the task file: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise UserError(f"{shown}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{shown}: expected a mapping with the fields of a task, found {type(values).__name__}")
    try:
        return Task.model_validate(values)
    except ValidationError as error:
        raise UserError(few(error.errors(), lambda item: _explain(shown, item))) from None


def _explain(shown: str, item: Any) -> str:
    where = cut(".".join(map(str, item["loc"])))
    if item["type"] == "extra_forbidden":
        return f"{shown}: {where}: unknown field{nearest(where, Task.model_fields)}"
    message = item["msg"].removeprefix("Value error, ")
    found = "" if item["type"] in ("value_error", "missing") else f"; found {brief(item['input'])}"
    return f"{shown}: {f'{where}: ' if where else ''}{message}{found}"
