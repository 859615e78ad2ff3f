"""Prompt files -> a Ray Dataset of prompt rows, cut into the blocks that conditioning works in."""

from __future__ import annotations

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


def read_prompts(
    prompts: PromptsConfig, summary: PromptSummary, override_num_blocks: int | None = None
) -> ray.data.Dataset:
    """The prompt rows that `check_prompts` counted, in file order, with PROMPT_SCHEMA; lazy.

    override_num_blocks: into how many blocks the rows are read, with at most one read task a file; None: one task a
    file, 128 at most. Reading fails with UserError, which names the file, when what is read of it is not what was
    checked: another number of rows, or other rows.
    """
    # Left alone, Ray Data cuts whatever it reads into 200 blocks, here of a row or two.
    blocks = override_num_blocks or min(len(summary.sources), MOST_READ_TASKS)
    dataset = ray.data.read_datasource(PromptSource(prompts, summary), override_num_blocks=blocks)
    dataset.context.execution_options.preserve_order = True
    return dataset


class PromptSource(Datasource):
    """Prompt files as a source of Ray Data.

    Ray Data's own readers are not used, for three reasons: its JSON reader infers one Arrow type per column and file
    and so breaks on rows that differ (a string here, chat messages there), its CSV reader guesses that an id "007" is
    the number 7, and none of them numbers rows, which ids and error messages need. This source runs the very reader
    and normalisation that the check before the run used. A file is read by one task, as a stream; prompts are read
    far faster than any engine answers them.
    """

    def __init__(self, prompts: PromptsConfig, summary: PromptSummary) -> None:
        super().__init__()
        self._prompts = prompts
        self._files = summary.files_to_read(prompts)

    def get_name(self) -> str:
        return "Prompts"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """At most `parallelism` tasks, each with a run of neighbouring files."""
        shares = np.array_split(np.arange(len(self._files)), max(1, min(parallelism, len(self._files))))
        return [self._read_task([self._files[i] for i in share], per_task_row_limit) for share in shares]

    def _read_task(self, files: list[CheckedFile], row_limit: int | None) -> ReadTask:
        metadata = BlockMetadata(
            num_rows=sum(file.rows for file in files),
            size_bytes=None,
            input_files=tuple(file.source.path for file in files),
            exec_stats=None,
        )
        return ReadTask(_reader(files, self._prompts), metadata, PROMPT_SCHEMA, row_limit)


def blocks_of(dataset: ray.data.Dataset, rows_per_block: int) -> ray.data.Dataset:
    """The dataset with each conditioning block as one Ray Data block: `rows_per_block` neighbouring rows, in order.

    `map_batches(..., batch_size=None)` then sees whole blocks. Ray Data's strict streaming repartition cuts exactly,
    but takes its input as it arrives: only with `preserve_order`, which this sets for the dataset's whole execution,
    do the blocks hold the same rows whatever the number of read tasks and workers.
    """
    dataset.context.execution_options.preserve_order = True
    return dataset.repartition(target_num_rows_per_block=rows_per_block, strict=True)


def _reader(files: list[CheckedFile], prompts: PromptsConfig) -> Callable[[], Iterator[pa.Table]]:
    """A function of its own, so that a read task carries its own files only."""

    def read() -> Iterator[pa.Table]:
        read_rows = row_reader(prompts)
        for file in files:
            yield from prompt_tables(file, read_rows(file.source), prompts)

    return read
