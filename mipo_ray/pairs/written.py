"""The pairs of a round while it is still being generated: which of its blocks are written, in the order of its prompts.

The generate stage writes the pairs of each conditioning block to a file of its own, and Ray Data notes the file in
`checkpoint` when it is complete. From then on it stays as it is, also when the run is killed and given again. Blocks
are finished in any order; read in the order of the conditioned rows, they give the same pairs in the same order each
time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.fs

from mipo_ray.storage.manifests import NOTES
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.tables.parquet import open_table

CONDITIONED_ROWS = "conditioned"  # below a generate stage

_PENDING = ".pending.parquet"  # how Ray Data calls a note whose file is not complete yet


@dataclass(frozen=True)
class ConditionedBlock:
    """A block of conditioned rows: its first prompt, by which it is known, and how many rows it has.

    `candidates` are those of them that conditioning did not drop, and that may give pairs.
    """

    first_prompt: str
    rows: int
    candidates: int


def conditioned_blocks(run: RunDirectory, stage: str) -> list[ConditionedBlock]:
    """The blocks of a generate stage whose rows are conditioned, in order; `stage` lies below the run directory."""
    columns = ["prompt_id", "block_id", "dropped"]
    rows = open_table(run.path(stage, CONDITIONED_ROWS), run.arrow_filesystem(), columns)
    blocks: list[ConditionedBlock] = []
    newest = None
    for batch in rows.to_batches(columns=columns):
        for prompt_id, block_id, dropped in zip(*(batch[name].to_pylist() for name in columns), strict=True):
            if block_id != newest:
                newest = block_id
                blocks.append(ConditionedBlock(prompt_id, 0, 0))
            last = blocks[-1]
            blocks[-1] = ConditionedBlock(last.first_prompt, last.rows + 1, last.candidates + (not dropped))
    return blocks


def conditioned_as(run: RunDirectory, stage: str) -> str | None:
    """A name for the conditioned rows of a generate stage, which they share with no others; None where there are none.

    Rows that are conditioned again, for whatever reason, have another one.
    """
    files = sorted(name for name in run.list_files(f"{stage}/{CONDITIONED_ROWS}") if name.endswith(".parquet"))
    return PurePosixPath(files[0]).stem if files else None


class WrittenBlocks:
    """Tells which blocks of a generate stage are written; one for each process that asks."""

    def __init__(self, run: RunDirectory, stage: str, blocks: list[ConditionedBlock]) -> None:
        self._run = run
        self._stage = stage
        self._numbers = {block.first_prompt: number for number, block in enumerate(blocks)}
        self._seen: set[str] = set()

    def look(self) -> dict[int, str]:
        """The blocks that were written since the last look: their number in order, and the path of their file.

        Raises RuntimeError for a note that does not begin where a block does.
        """
        notes = self._run.list_files(f"{self._stage}/{NOTES}")
        new = [name for name in notes if name.endswith(".parquet") and not name.endswith(_PENDING)]
        found = {}
        for name in new:
            if name in self._seen:
                continue
            path = self._run.path(self._stage, NOTES, name)
            ids: pa.Table = open_table([path], self._run.arrow_filesystem(), ["prompt_id"]).first(1)
            first = ids["prompt_id"][0].as_py()
            if first not in self._numbers:
                raise RuntimeError(f"{path}: expected the rows of a conditioning block, found prompt {first!r} first")
            # One file of pairs for each note: a block is far below the size at which Ray Data begins another.
            found[self._numbers[first]] = self._run.path(self._stage, f"{PurePosixPath(name).stem}-0.parquet")
            self._seen.add(name)
        return found
