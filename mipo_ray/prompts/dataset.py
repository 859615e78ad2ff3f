"""Checked files -> a Ray Dataset of their rows; prompts are cut into the blocks that conditioning works in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.prompts.check import PromptSummary
from mipo_ray.prompts.public_sets import row_reader
from mipo_ray.prompts.rows import PROMPT_SCHEMA, CheckedFile, prompt_tables

MOST_READ_TASKS = 128

TablesOf = Callable[[list[CheckedFile]], Iterator[pa.Table]]


def read_prompts(
    prompts: PromptsConfig, summary: PromptSummary, override_num_blocks: int | None = None
) -> ray.data.Dataset:
    """The prompt rows that `check_prompts` counted, in file order, with PROMPT_SCHEMA; lazy.

    override_num_blocks: into how many blocks the rows are read, with at most one read task a file; None: one task a
    file, 128 at most. Reading fails with UserError, which names the file, when what is read of it is not what was
    checked: another number of rows, or other rows.
    """
    return read_source(
        PromptSource(prompts, summary), override_num_blocks or min(len(summary.sources), MOST_READ_TASKS)
    )


def read_source(source: CheckedFiles, blocks: int = MOST_READ_TASKS) -> ray.data.Dataset:
    """The rows of a source in the order of its files, read into as many blocks at most, with one task each; lazy."""
    # Left alone, Ray Data cuts whatever it reads into 200 blocks, here of a row or two.
    dataset = ray.data.read_datasource(source, override_num_blocks=min(blocks, len(source.files)))
    dataset.context.execution_options.preserve_order = True
    return dataset


class CheckedFiles(Datasource):
    """Files that were checked row by row as a source of Ray Data, by the very reader that checked them.

    Ray Data's own readers are not used, for three reasons: its JSON reader infers one Arrow type per column and file
    and so breaks on rows that differ (a string here, chat messages there), its CSV reader guesses that an id "007" is
    the number 7, and none of them numbers rows, which ids and error messages need. A file is read by one task, as a
    stream; rows are read far faster than they are answered or trained on.
    """

    def __init__(self, name: str, files: list[CheckedFile], read: TablesOf, schema: pa.Schema) -> None:
        """read: the tables, with `schema`, of some of the files; it travels to the tasks."""
        super().__init__()
        self.files = files
        self._name = name
        self._read = read
        self._schema = schema

    def get_name(self) -> str:
        return self._name

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """At most `parallelism` tasks, each with a run of neighbouring files."""
        shares = np.array_split(np.arange(len(self.files)), max(1, min(parallelism, len(self.files))))
        return [self._read_task([self.files[i] for i in share], per_task_row_limit) for share in shares]

    def _read_task(self, files: list[CheckedFile], row_limit: int | None) -> ReadTask:
        metadata = BlockMetadata(
            num_rows=sum(file.rows for file in files),
            size_bytes=None,
            input_files=tuple(file.source.path for file in files),
            exec_stats=None,
        )
        return ReadTask(_reader(self._read, files), metadata, self._schema, row_limit)


class PromptSource(CheckedFiles):
    """Prompt files."""

    def __init__(self, prompts: PromptsConfig, summary: PromptSummary) -> None:
        files = summary.files_to_read(prompts)
        super().__init__("Prompts", files, functools.partial(_prompt_tables, prompts), PROMPT_SCHEMA)


def blocks_of(dataset: ray.data.Dataset, rows_per_block: int) -> ray.data.Dataset:
    """The dataset with each conditioning block as one Ray Data block: `rows_per_block` neighbouring rows, in order.

    `map_batches(..., batch_size=None)` then sees whole blocks. Ray Data's strict streaming repartition cuts exactly,
    but takes its input as it arrives: only with `preserve_order`, which this sets for the dataset's whole execution,
    do the blocks hold the same rows whatever the number of read tasks and workers.
    """
    dataset.context.execution_options.preserve_order = True
    return dataset.repartition(target_num_rows_per_block=rows_per_block, strict=True)


def _reader(read: TablesOf, files: list[CheckedFile]) -> Callable[[], Iterator[pa.Table]]:
    """A function of its own, so that a read task carries its own files only; Ray Data asks for its name."""

    def read_files() -> Iterator[pa.Table]:
        return read(files)

    return read_files


def _prompt_tables(prompts: PromptsConfig, files: list[CheckedFile]) -> Iterator[pa.Table]:
    read_rows = row_reader(prompts)
    for file in files:
        yield from prompt_tables(file, read_rows(file.source), prompts)
