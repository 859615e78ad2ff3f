"""Accuracy tasks: what a task file says, and how a row of its data becomes an item. No torch, no Ray.

A task file is YAML with the fields of `Task`; this project's own are mipo_ray/evaluation/tasks/NAME.yaml. The question
template is rendered as that of `prompts` is, over the row's columns; where the task has options, `options` is the list
of them, each with `label` and `text`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from itertools import islice
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
from mipo_ray.prompts.files import PromptFile
from mipo_ray.prompts.reading import SourceRow, missing_column, nearest, read_rows
from mipo_ray.prompts.rows import Message, encodable, normalize_row
from mipo_ray.prompts.templates import check_question_columns
from mipo_ray.text.final_answers import final_choice, final_number
from mipo_ray.text.final_answers.choice_patterns import LABELS

TASKS_DIRECTORY = Path(__file__).parent
LETTERS = "ABCDEFGHIJ"
MOST_DIGITS = 400  # of an answer that is a number


class Task(Section):
    """A task file."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="names the results and their directory")
    version: PositiveInt = Field(description="raised whenever the same model may get another result")
    kind: Literal["generative", "likelihood"] = Field(
        description="generative: the model answers, and its final answer is read; likelihood: the option whose text is "
        "the likeliest continuation is its answer"
    )
    path: str = Field(description="the data: a file or a glob on any filesystem; evaluate.tasks.NAME.path overrides it")
    id_column: str = Field("id", description="optional column with unique ids; without it rows are numbered")
    answer_column: str = Field(
        description="column with the answer. number: a number, or text that ends in `#### number`; choice and "
        "likelihood: an option's label, or its index from 0 where the options have no labels of their own"
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
        generative = {"sampling": self.sampling, "extraction": self.extraction}
        likelihood = {"continuation": self.continuation}
        needed, foreign = (generative, likelihood) if self.kind == "generative" else (likelihood, generative)
        if missing := [name for name, value in needed.items() if value is None]:
            raise ValueError(f"kind {self.kind} needs {' and '.join(missing)}")
        if given := [name for name, value in foreign.items() if value is not None]:
            raise ValueError(f"kind {self.kind} has no {' and no '.join(given)}")
        if self.kind == "likelihood" and (self.exemplars or self.system):
            raise ValueError("kind likelihood has no chat: no system message and no exemplars")
        if self.kind == "generative" and self.metric != "accuracy":
            raise ValueError("kind generative has the metric accuracy alone")
        if self.has_options != (self.options_column is not None):
            raise ValueError(f"options_column: expected {'a column' if self.has_options else 'none'} for this task")
        return self

    @property
    def has_options(self) -> bool:
        """Whether an item is a question with options."""
        return self.kind == "likelihood" or self.extraction == "choice"

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
        text = json.dumps(self.model_dump(mode="json", include=fields), sort_keys=True)
        return sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Item:
    """One question of a task.

    messages: chat messages that end with the user's; of a likelihood the one message is the context, no chat.
    answer: the right option's label, or a number as an exact fraction ("18", "3/4").
    option_labels, option_texts: empty where the task has no options.
    where: file and number of its row.
    """

    item_id: str
    messages: list[Message]
    answer: str
    option_labels: list[str]
    option_texts: list[str]
    where: str = ""


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


def read_items(task: Task, files: tuple[PromptFile, ...], limit: int | None) -> Iterator[Item]:
    """The items of a task's data in file order, the first `limit` of them; as a stream.

    Raises UserError naming file, row and field of the first row that is no item.
    """
    rows = (row for file in files for row in read_rows(file))
    for number, row in enumerate(islice(rows, limit)):
        if not number:
            check_question_columns(task.prompts, _with_options(row, []) if task.has_options else row)
        yield item_of(task, row)


def item_of(task: Task, row: SourceRow) -> Item:
    """One row of the task's data as an item; raises UserError naming file, row and field."""
    labels, texts = _options(task, row) if task.has_options else ([], [])
    answer = _choice_answer(task, row, labels) if task.has_options else _number_answer(task, row)
    options = [{"label": label, "text": text} for label, text in zip(labels, texts, strict=True)]
    prompt = normalize_row(_with_options(row, options) if task.has_options else row, task.prompts)
    return Item(prompt["prompt_id"], prompt["messages"], answer, labels, texts, row.where)


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


def _with_options(row: SourceRow, options: list[dict[str, str]]) -> SourceRow:
    return SourceRow(row.where, row.numbered_id, {**row.values, "options": options})


def _column(task: Task, row: SourceRow, column: str) -> Any:
    if column not in row.values:
        raise missing_column(row, column, f", which task {task.name} reads")
    return row.values[column]


def _options(task: Task, row: SourceRow) -> tuple[list[str], list[str]]:
    """Labels and texts of the options."""
    column = str(task.options_column)
    value = _column(task, row, column)
    where = f"{row.where}, field {column!r}"
    texts: Any = value.get("text") if isinstance(value, dict) else value
    labels: Any = value.get("label") if isinstance(value, dict) else row.values.get(task.labels_column)
    # A blank option can be shown beside its label, but not be scored.
    if not _are_texts(texts, blank=task.continuation != "text") or not 2 <= len(texts) <= len(LETTERS):
        raise UserError(
            f"{where}: expected 2 to {len(LETTERS)} options, a list of texts or a struct of the lists text and label; "
            f"found {brief(value, 100)}"
        )
    texts = [encodable(where, text) for text in texts]
    if labels is None:
        return list(LETTERS[: len(texts)]), texts
    if not isinstance(value, dict):
        where = f"{row.where}, field {task.labels_column!r}"
    labels = [encodable(where, str(label)) for label in labels] if isinstance(labels, list) else labels
    # Case does not matter where answers are compared.
    if not _are_texts(labels) or len(labels) != len(texts) or len({label.casefold() for label in labels}) < len(labels):
        raise UserError(
            f"{where}: expected {len(texts)} different labels, one for each option; found {brief(labels, 100)}"
        )
    if task.extraction == "choice" and not LABELS.issuperset(labels):
        raise UserError(
            f"{where}: expected labels that are read from answers, each one of A to J, a to j or 1 to 5; found "
            f"{brief(labels, 100)}"
        )
    return labels, texts


def _are_texts(values: Any, blank: bool = False) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) and (blank or value.strip()) for value in values)


def _choice_answer(task: Task, row: SourceRow, labels: list[str]) -> str:
    value = _column(task, row, task.answer_column)
    if isinstance(value, str) and value.strip() in labels:
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        own_labels = labels != list(LETTERS[: len(labels)])
        if own_labels and str(value) in labels:
            return str(value)
        if not own_labels and 0 <= value < len(labels):
            return labels[value]
    raise UserError(
        f"{row.where}, field {task.answer_column!r}: expected the label of one of the options ({', '.join(labels)}); "
        f"found {brief(value, 100)}"
    )


def _number_answer(task: Task, row: SourceRow) -> str:
    value = _column(task, row, task.answer_column)
    try:
        text = str(value).rpartition("####")[2].strip().replace(",", "").lstrip("$")
        # Of 1e999999999 a fraction would have a thousand million digits.
        if len(text) > MOST_DIGITS or not -MOST_DIGITS <= int(text.lower().partition("e")[2] or 0) <= MOST_DIGITS:
            raise ValueError
        return str(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"{row.where}, field {task.answer_column!r}: expected a number, or text that ends in `#### number`; "
            f"found {brief(value, 100)}"
        ) from None
