"""How a row of a task's data becomes an item: a question with its right answer. No torch, no Ray."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import islice
from typing import Any

from mipo_ray.errors import UserError, brief
from mipo_ray.evaluation.tasks.task import Task
from mipo_ray.prompts.files import PromptFile
from mipo_ray.prompts.reading import SourceRow, missing_column, read_rows
from mipo_ray.prompts.rows import Message, encodable, normalize_row, with_context
from mipo_ray.prompts.templates import check_question_columns, check_row_columns, render_row
from mipo_ray.text.final_answers.choice_patterns import LABELS

LETTERS = "ABCDEFGHIJ"
CHOICE_LETTERS = string.ascii_uppercase  # of options that no answer is read from
MOST_DIGITS = 400  # of an answer that is a number


@dataclass(frozen=True)
class Item:
    """One question of a task.

    messages: chat messages that end with the user's; of a likelihood the one message is the context, no chat.
    answer: the right option's label, or a number as an exact fraction ("18", "3/4").
    option_labels, option_texts: empty where the task has no options.
    where: file and number of its row.
    question_messages: of a choice, the same without what is known of the user; else empty.
    user, question: of a choice, what is known of the user and the last message without it; else "" and what the row's
        `cluster_column` holds, "" without one. Items of one user, and of one question, are alike.
    """

    item_id: str
    messages: list[Message]
    answer: str
    option_labels: list[str]
    option_texts: list[str]
    where: str = ""
    question_messages: list[Message] = field(default_factory=list)
    user: str = ""
    question: str = ""


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
    item = Item(prompt["prompt_id"], prompt["messages"], answer, labels, texts, row.where, question=_cluster(task, row))
    if task.context_template is None:
        return item
    context = _context(task, row)
    return replace(
        item,
        messages=with_context(item.messages, context, task.prompts),
        question_messages=item.messages,
        user=context,
        question=item.question or item.messages[-1]["content"],
    )


def _context(task: Task, row: SourceRow) -> str:
    """What is known of the user."""
    template = str(task.context_template)
    try:
        return encodable(f"{row.where}, context_template", render_row("context_template", template, row.values))
    except UserError as error:
        check_row_columns("context_template", template, row)
        raise UserError(f"{row.where}: {error}") from None


def _cluster(task: Task, row: SourceRow) -> str:
    return "" if task.cluster_column is None else str(_column(task, row, task.cluster_column))


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
    shown_only = task.kind == "generative" or task.continuation == "label"
    letters = CHOICE_LETTERS if task.kind == "choice" else LETTERS
    if not _are_texts(texts, blank=shown_only) or not 2 <= len(texts) <= len(letters):
        raise UserError(
            f"{where}: expected 2 to {len(letters)} options, a list of texts or a struct of the lists text and label; "
            f"found {brief(value, 100)}"
        )
    texts = [encodable(where, text) for text in texts]
    if labels is None:
        return list(letters[: len(texts)]), texts
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
    if task.answer_index is not None:
        return _at(task.answer_index, row, labels)
    column = str(task.answer_column)
    value = _column(task, row, column)
    if isinstance(value, str) and value.strip() in labels:
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        own_labels = labels != list(CHOICE_LETTERS[: len(labels)])
        if own_labels and str(value) in labels:
            return str(value)
        if not own_labels and 0 <= value < len(labels):
            return labels[value]
    raise UserError(
        f"{row.where}, field {column!r}: expected the label of one of the options ({', '.join(labels)}); "
        f"found {brief(value, 100)}"
    )


def _at(index: int, row: SourceRow, labels: list[str]) -> str:
    if not -len(labels) <= index < len(labels):
        raise UserError(f"{row.where}: expected an option at answer_index {index}, found {len(labels)} options")
    return labels[index]


def _number_answer(task: Task, row: SourceRow) -> str:
    column = str(task.answer_column)
    value = _column(task, row, column)
    try:
        text = str(value).rpartition("####")[2].strip().replace(",", "").lstrip("$")
        # Of 1e999999999 a fraction would have a thousand million digits.
        if len(text) > MOST_DIGITS or not -MOST_DIGITS <= int(text.lower().partition("e")[2] or 0) <= MOST_DIGITS:
            raise ValueError
        return str(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"{row.where}, field {column!r}: expected a number, or text that ends in `#### number`; "
            f"found {brief(value, 100)}"
        ) from None
