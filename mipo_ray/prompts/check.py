"""Checks prompt files before anything starts: every row is read once, in bounded memory, without ray, torch or vllm."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.errors import UserError
from mipo_ray.prompts.files import PromptFile, commit_of, find_files
from mipo_ray.prompts.public_sets import RowReader, row_reader
from mipo_ray.prompts.reading import SourceRow, nearest
from mipo_ray.prompts.rows import CheckedFile, ContentHash, PromptRow, normalize_row
from mipo_ray.prompts.templates import check_question_columns, check_templates

Watch = Callable[[str, PromptRow], None]  # looks at a row, with its file and number, while the rows are read

ROWS_NAMED = 3  # rows that a message names before it only counts


@dataclass(frozen=True)
class PromptSummary:
    """What a check found, and what `dataset.read_prompts` needs in order to read exactly that.

    sources: the files in reading order (`files`: their paths).
    file_rows: rows used of each file (0 for a file after prompts.limit was reached). rows: their sum.
    file_hashes: the `ContentHash` of these rows of each file, which the reader compares with what it reads.
    rows_with_context: rows with a context. distinct_texts, distinct_contexts: different prompts and different
        contexts, equal ones (but for white space) counted once.
    characters: those of all messages of all rows, the context included.
    format: "JSONL", "Parquet", "CSV", or several, joined by commas.
    users, questions: of held-out prompts, how many different ones there are; None where nobody counted, and no users
        where no row names one.
    """

    sources: tuple[PromptFile, ...]
    file_rows: tuple[int, ...]
    file_hashes: tuple[str, ...]
    rows: int
    rows_with_context: int
    distinct_texts: int
    distinct_contexts: int
    characters: int
    format: str
    users: int | None = None
    questions: int | None = None

    @property
    def commit(self) -> str | None:
        """The commit of the Hub that the files are of; None for other files."""
        return commit_of(self.sources)

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(source.path for source in self.sources)

    def files_to_read(self, prompts: PromptsConfig) -> list[CheckedFile]:
        """The files that hold the rows; without a limit those that were empty too: they may have grown."""
        checked = map(CheckedFile, self.sources, self.file_rows, self.file_hashes)
        return [file for file in checked if file.rows or prompts.limit is None]


def check_prompts(
    prompts: PromptsConfig,
    needs: PromptNeeds,
    section: str = "prompts",
    watches: Sequence[Watch] = (),
) -> PromptSummary:
    """Reads every row that the run would use and returns what there is.

    section: where `prompts` stands in the configuration, for messages. watches: each is called with file and number of
    every row, and the row.

    Memory: 24 bytes a row, and two to four times that for a moment at the end, while they are sorted. Ids, texts and
    contexts are kept as 8-byte hashes; a suspected duplicate id is confirmed by a second reading, so a hash collision
    raises no false alarm, and can at most make distinct_texts or distinct_contexts too small by one.

    Raises UserError naming file, row and field of the first fault.
    """
    _check_columns(prompts, section)
    check_templates(prompts, section, needs_context=needs.context != "none")
    files = find_files(prompts.source, f"{section}.path")
    read_rows = row_reader(prompts, section)
    tally = _Tally(prompts)
    file_rows = [0] * len(files)
    hashes = [ContentHash() for _ in files]
    for index, source in _sources(files, prompts, read_rows):
        if not tally.first_rows:
            check_question_columns(prompts, source)
        file_rows[index] += 1
        row = normalize_row(source, prompts)
        hashes[index].add(row)
        tally.add(source, row)
        for watch in watches:
            watch(source.where, row)
    summary = PromptSummary(
        sources=files,
        file_rows=tuple(file_rows),
        file_hashes=tuple(map(str, hashes)),
        rows=sum(file_rows),
        rows_with_context=len(tally.context_hashes),
        distinct_texts=_distinct(tally.text_hashes),
        distinct_contexts=_distinct(tally.context_hashes),
        characters=tally.characters,
        format=", ".join(sorted({file.format for file in files})),
    )
    if summary.rows == 0:
        raise UserError(f"{_name_some(summary.files, len(files))}: expected prompts, found no row")
    duplicates = _duplicates(tally.id_hashes)
    if duplicates:
        _refuse_duplicate_id(files, prompts, read_rows, duplicates)
    _check_optional_columns(prompts, tally, section)
    _check_contexts(prompts, tally, summary, needs)
    if needs.reference and tally.without_reference:
        _refuse_without_reference(prompts, tally, summary, section)
    if needs.mismatch:
        _check_mismatch(prompts, tally, summary)
    return summary


class _Tally:
    """What is kept of the rows that went by."""

    def __init__(self, prompts: PromptsConfig) -> None:
        self.id_hashes = array("Q")
        self.text_hashes = array("Q")
        self.context_hashes = array("Q")
        self.characters = 0
        self.first_rows: list[str] = []
        self.first_without_context: list[str] = []
        self.first_without_reference: list[str] = []
        self.without_reference = 0
        self.columns: dict[str, None] = {}
        self.groups = _Groups()
        self.groups_with_context = _Groups()
        self.wanted_columns = {
            prompts.context_column,
            prompts.group_column,
            prompts.id_column,
            prompts.reference_column,
        }

    def add(self, source: SourceRow, row: PromptRow) -> None:
        self.id_hashes.append(_hash(row["prompt_id"]))
        self.text_hashes.append(_hash(row["text"]))
        self.characters += sum(len(message["content"]) for message in row["messages"])
        self.groups.add(row["group"])
        if row["context"]:
            self.context_hashes.append(_hash(" ".join(row["context"].split())))
            self.groups_with_context.add(row["group"])
        elif len(self.first_without_context) < ROWS_NAMED:
            self.first_without_context.append(source.where)
        if not row["reference"]:
            self.without_reference += 1
            if len(self.first_without_reference) < ROWS_NAMED:
                self.first_without_reference.append(source.where)
        if len(self.first_rows) < ROWS_NAMED:
            self.first_rows.append(source.where)
            self.columns.update(dict.fromkeys(source.values))
        for column in self.wanted_columns & source.values.keys():
            self.columns[column] = None


class _Groups:
    """Whether rows of different groups went by; a row without a group is in a group of its own."""

    def __init__(self) -> None:
        self.first: str | None = None
        self.several = False

    def add(self, group: str) -> None:
        if self.first is None:
            self.first = group
        self.several |= group == "" or group != self.first


def _sources(
    files: tuple[PromptFile, ...], prompts: PromptsConfig, read_rows: RowReader
) -> Iterator[tuple[int, SourceRow]]:
    """The rows the run would use, each with the index of its file: all, or the first `prompts.limit`."""
    used = 0
    for index, file in enumerate(files):
        if used == prompts.limit:
            return
        for source in read_rows(file):
            yield index, source
            used += 1
            if used == prompts.limit:
                return


def _check_columns(prompts: PromptsConfig, section: str) -> None:
    used: dict[str, str] = {}
    keys = ("column", "context_column", "group_column", "id_column")
    for key in keys[prompts.question_template is not None :]:
        name = getattr(prompts, key)
        if name in used:
            raise UserError(f"{section}.{key}: column {name!r} is already used by {section}.{used[name]}")
        used[name] = key


def _check_optional_columns(prompts: PromptsConfig, tally: _Tally, section: str) -> None:
    """A column that the user named in the configuration must be there; the default names are optional."""
    for key in ("context_column", "group_column", "id_column", "reference_column"):
        name = getattr(prompts, key)
        if name != PromptsConfig.model_fields[key].default and name not in tally.columns:
            columns = ", ".join(tally.columns)
            hint = nearest(name, tally.columns)
            raise UserError(f"{section}.{key}: no row has the column {name!r}; columns: {columns}{hint}")


def _check_contexts(prompts: PromptsConfig, tally: _Tally, summary: PromptSummary, needs: PromptNeeds) -> None:
    column = prompts.context_column
    missing = summary.rows - summary.rows_with_context
    columns = f"columns: {', '.join(tally.columns)}{nearest(column, tally.columns.keys() - {column})}"
    wanting = f"strategy {' and '.join(needs.strategies)}"
    without = f"{_name_some(tally.first_without_context, missing)}, field {column!r}"
    if needs.context != "none" and summary.rows_with_context == 0:
        raise UserError(f"{without}: expected a context in at least one row ({wanting}), found none; {columns}")
    if needs.context == "every" and missing:
        raise UserError(
            f"{without}: expected a context in every row ({wanting}), found none in {missing} of {summary.rows} rows; "
            f"set conditioning.fallback to drop, or to a strategy for these rows; {columns}"
        )
    # Contexts that differ, and groups that differ, make a pair of rows that differ in both.
    if needs.other_context and not (summary.distinct_contexts > 1 and tally.groups_with_context.several):
        found = (
            f"group {tally.groups_with_context.first!r} in all {summary.rows_with_context} rows with a context"
            if summary.distinct_contexts > 1
            else f"the same context in all {summary.rows_with_context} rows with one"
        )
        raise UserError(
            f"{tally.first_rows[0]}, field {column!r}: strategy random_context expects at least two different "
            f"contexts of different groups (prompts.group_column={prompts.group_column}), found {found}"
        )


def _refuse_without_reference(prompts: PromptsConfig, tally: _Tally, summary: PromptSummary, section: str) -> None:
    column = prompts.reference_column
    names = _name_some(tally.first_without_reference, tally.without_reference)
    columns = f"columns: {', '.join(tally.columns)}{nearest(column, tally.columns.keys() - {column})}"
    raise UserError(
        f"{names}, field {column!r}: evaluate.judge.protocols pointwise expects a reference answer in every row, found "
        f"none in {tally.without_reference} of {summary.rows} rows; name its column as {section}.reference_column, or "
        f"judge pairwise; {columns}"
    )


def _check_mismatch(prompts: PromptsConfig, tally: _Tally, summary: PromptSummary) -> None:
    source = f"field {prompts.column!r}" if prompts.question_template is None else "question_template"
    where = f"{tally.first_rows[0]}, {source}"
    if summary.rows == 1:
        raise UserError(f"{where}: found one single prompt; a mismatched prompt needs at least two different ones")
    if summary.distinct_texts == 1:
        raise UserError(
            f"{where}: expected at least two different prompts, found the same text in all {summary.rows} rows"
        )
    if not tally.groups.several:
        raise UserError(
            f"{tally.first_rows[0]}, field {prompts.group_column!r}: expected at least two groups (rows of one group "
            f"are never mismatched), found {tally.groups.first!r} in all {summary.rows} rows"
        )


def _distinct(hashes: array[int]) -> int:
    return len(np.unique(np.frombuffer(hashes, dtype=np.uint64)))


def _duplicates(hashes: array[int]) -> set[int]:
    values, counts = np.unique(np.frombuffer(hashes, dtype=np.uint64), return_counts=True)
    return {int(value) for value in values[counts > 1]}


def _refuse_duplicate_id(
    files: tuple[PromptFile, ...], prompts: PromptsConfig, read_rows: RowReader, suspects: set[int]
) -> None:
    """Names the first id that two rows share; returns when equal hashes were a coincidence."""
    seen: dict[str, str] = {}
    for _, source in _sources(files, prompts, read_rows):
        prompt_id = normalize_row(source, prompts)["prompt_id"]
        if _hash(prompt_id) not in suspects:
            continue
        if prompt_id in seen:
            raise UserError(
                f"{source.where}, field {prompts.id_column!r}: expected a unique id, found {prompt_id!r}, which is "
                f"also the id of {seen[prompt_id]}"
            )
        seen[prompt_id] = source.where


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _name_some(names: Sequence[str], total: int) -> str:
    shown = names[:ROWS_NAMED]
    more = total - len(shown)
    return "; ".join(shown) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class PromptNeeds:
    """What `check.check_prompts` asks of prompts beside being readable.

    context: how many rows must have one. mismatch: some row must be able to serve as another one's mismatch.
    other_context: two rows of different groups must have different contexts. strategies: those that need a context,
    for messages. reference: every row must have a reference answer.
    """

    context: Literal["none", "some", "every"] = "none"
    mismatch: bool = False
    other_context: bool = False
    strategies: tuple[str, ...] = ()
    reference: bool = False
