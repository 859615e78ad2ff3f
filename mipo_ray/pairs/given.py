"""Preference data that exists: checked before anything starts, and read again as it was checked. No Ray, no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa

from mipo_ray.config.pairs import PairFormat, PairsConfig
from mipo_ray.errors import UserError
from mipo_ray.pairs.given_rows import GivenPair, format_of, read_pair
from mipo_ray.pairs.statistics import prompt_fingerprint
from mipo_ray.prompts.files import PromptFile, commit_of, find_files
from mipo_ray.prompts.reading import SourceRow, read_rows
from mipo_ray.prompts.rows import MESSAGES, ROWS_PER_TABLE, CheckedFile, ContentHash

KEY = "pairs.path"

# A pair as it was read: where it stands, by which id, its texts, and the row's own template arguments (JSON).
GIVEN_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("where", pa.string()),
        ("messages", MESSAGES),
        ("chosen", pa.string()),
        ("rejected", pa.list_(pa.string())),
        ("template_arguments", pa.string()),
    ]
)

Watch = Callable[[str, GivenPair], None]  # looks at a pair, with the file and number of its row


@dataclass(frozen=True)
class PairSummary:
    """What a check of the rows found, and what is needed to read exactly them.

    sources: the files in reading order. file_rows, file_hashes: the rows used of each, and their content. format: whose
    columns they have. rejected: rejected responses of each row. fingerprint: of the rows' ids
    (`statistics.prompt_fingerprint`). prompt_characters, response_characters: those of all rows.
    """

    sources: tuple[PromptFile, ...]
    file_rows: tuple[int, ...]
    file_hashes: tuple[str, ...]
    rows: int
    format: PairFormat
    rejected: int
    fingerprint: str
    prompt_characters: int
    response_characters: int

    @property
    def commit(self) -> str | None:
        """The commit of the Hub that the files are of; None for other files."""
        return commit_of(self.sources)

    @property
    def files(self) -> list[CheckedFile]:
        """The files that hold the rows that are used."""
        return [file for file in map(CheckedFile, self.sources, self.file_rows, self.file_hashes) if file.rows]


def check_pairs(pairs: PairsConfig, watch: Watch = lambda where, pair: None) -> PairSummary:
    """Reads every row that the run would use, as a stream, and returns what there is; `watch` looks at each.

    Raises UserError naming file, row and field of the first fault: of a row that is no pair, and of one with another
    number of rejected responses than the first.
    """
    assert pairs.path is not None
    files = find_files(pairs.path, KEY)
    counts, hashes = [0] * len(files), [ContentHash() for _ in files]
    form: PairFormat | None = None if pairs.format == "auto" else pairs.format
    rejected = fingerprint = prompt_characters = response_characters = 0
    first = ""
    for index, row in _rows_of(files, pairs.limit):
        form = form or format_of(row)
        pair = read_pair(row, form)
        if not first:
            first, rejected = row.where, len(pair.rejected)
        if len(pair.rejected) != rejected:
            raise UserError(
                f"{row.where}: expected {rejected} rejected responses, as in every row from {first} on, found "
                f"{len(pair.rejected)}; the loss of a pair is the mean over them"
            )
        watch(row.where, pair)
        counts[index] += 1
        hashes[index].add(_content(row, pair))
        fingerprint += prompt_fingerprint([row.numbered_id])
        prompt_characters += sum(len(message["content"]) for message in pair.messages)
        response_characters += sum(map(len, (pair.chosen, *pair.rejected)))
    if form is None or not sum(counts):
        raise UserError(f"{KEY}: {', '.join(file.path for file in files[:3])}: expected pairs, found no row")
    return PairSummary(
        sources=files,
        file_rows=tuple(counts),
        file_hashes=tuple(map(str, hashes)),
        rows=sum(counts),
        format=form,
        rejected=rejected,
        fingerprint=f"{fingerprint % 2**64:016x}",
        prompt_characters=prompt_characters,
        response_characters=response_characters,
    )


def given_tables(pairs: PairsConfig, form: PairFormat, files: Sequence[CheckedFile]) -> Iterator[pa.Table]:
    """The pairs of checked files with GIVEN_SCHEMA, ROWS_PER_TABLE at a time.

    Raises UserError behind the last one of a file, naming it, where its rows are not those that were checked.
    """
    for file in files:
        rows = _checked(file, pairs, form)
        while batch := list(islice(rows, ROWS_PER_TABLE)):
            yield pa.Table.from_pylist(batch, schema=GIVEN_SCHEMA)


def _checked(file: CheckedFile, pairs: PairsConfig, form: PairFormat) -> Iterator[dict[str, object]]:
    found, content = 0, ContentHash()
    # One row more than expected, where no limit cut the file, shows that it grew.
    for row in islice(read_rows(file.source), file.rows + (pairs.limit is None)):
        pair = read_pair(row, form)
        content.add(_content(row, pair))
        found += 1
        yield {
            **vars(pair),
            "prompt_id": row.numbered_id,
            "where": row.where,
            "template_arguments": json.dumps(pair.template_arguments),
        }
    if found != file.rows or str(content) != file.content_hash:
        raise UserError(
            f"{file.source.path}: expected the {file.rows} rows that were checked, with content hash "
            f"{file.content_hash}, found {found} with {content}: the file was edited while the run was under way; "
            "start the run again"
        )


def _rows_of(files: tuple[PromptFile, ...], limit: int | None) -> Iterator[tuple[int, SourceRow]]:
    """The rows that a run uses, each with the number of its file: all, or the first `limit`."""
    rows = ((index, row) for index, file in enumerate(files) for row in read_rows(file))
    return islice(rows, limit)


def _content(row: SourceRow, pair: GivenPair) -> dict[str, object]:
    return {"id": row.numbered_id, **vars(pair)}
