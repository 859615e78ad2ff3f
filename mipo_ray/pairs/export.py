"""The pairs of a run in the form of another trainer: files in a directory, with a data card.

One file for each round, since each round's pairs were sampled from another policy. Pairs are read and written some at a
time, in the order of the run's files; those that a filter dropped are left out. A pair with K rejected responses
becomes K rows, but for the run's own form, Parquet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

from mipo_ray.config.recipe import load_run_config
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError, few
from mipo_ray.pairs.formats import FORMATS, Row, TextPair, dataset_info
from mipo_ray.pairs.schema import as_version_2
from mipo_ray.storage.manifests import GenerateFacts
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.tables.parquet import PAGE_CHECKSUMS, open_table

CARD = "README.md"
_ROWS = 256  # read and written together
_TEXTS = ["pair_id", "messages", "chosen", "rejected", "chosen_finish_reason", "rejected_finish_reason"]


@dataclass(frozen=True)
class ExportedRound:
    """What was written of one round. truncated: pairs with a response that was cut at the length limit."""

    round: Round
    facts: GenerateFacts
    file: str
    pairs: int = 0
    rows: int = 0
    truncated: int = 0


@dataclass(frozen=True)
class Export:
    """Pairs of a run in one form: which, of what run, and what of each round."""

    format: str
    config: Config
    rounds: tuple[ExportedRound, ...] = ()


def run_config(run: RunDirectory) -> Config:
    """The configuration that a run was begun with. Raises UserError where the directory is none of a run."""
    text = run.read_text("config.yaml")
    if text is None:
        raise UserError(f"{run.url}: expected a run directory with a config.yaml, found none")
    # Nothing here runs what a recipe asks trust for: no model, no engine.
    return load_run_config(text, run.path("config.yaml"), trusts_recipe=True)


def generated_rounds(run: RunDirectory, config: Config, numbers: Sequence[int] = ()) -> dict[Round, GenerateFacts]:
    """The rounds whose pairs are all there, or those of them with these numbers.

    Raises UserError where there are none, or one of the numbers is not among them.
    """
    found = {}
    for round in map(Round, range(config.rounds)):
        manifest = run.read_manifest(run.stage(round, "generate"), GenerateFacts)
        if manifest is not None:
            found[round] = manifest.facts
    if missing := [number for number in numbers if Round(number) not in found]:
        there = ", ".join(round.key for round in found) or "none"
        raise UserError(f"{run.url}: round {missing[0]} has no finished pairs; rounds that have: {there}")
    if not found:
        raise UserError(f"{run.url}: expected a round whose pairs are all generated, found none")
    return {round: facts for round, facts in found.items() if not numbers or round.number in numbers}


def write_pairs(run: RunDirectory, format_name: str, output: Path, numbers: Sequence[int] = ()) -> Export:
    """Writes the pairs of a run to `output`, a file for each round; the card is `card.write_card`'s.

    Raises UserError for a run without pairs, and for an output directory with files in it.
    """
    config = run_config(run)
    rounds = generated_rounds(run, config, numbers)
    make_empty(output)
    export = Export(format_name, config)
    for round, facts in rounds.items():
        empty = ExportedRound(round, facts, f"{round.name}.{FORMATS[format_name].suffix}")
        export = replace(export, rounds=(*export.rounds, _write_round(run, empty, output, export)))
    if format_name == "llama-factory":
        info = dataset_info({each.round.name: each.file for each in export.rounds})
        (output / "dataset_info.json").write_text(json.dumps(info, indent=2), encoding="utf-8")
    return export


def make_empty(output: Path) -> None:
    """Makes a directory to write to; raises UserError where it cannot be made, or has files in it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in output.iterdir())
    except OSError as error:
        raise UserError(f"{output}: expected a directory to write to: {error.strerror}") from None
    if found:
        raise UserError(
            f"{output}: expected an empty directory, or one that is not there yet; found " + few(found, str)
        )


def _write_round(run: RunDirectory, to: ExportedRound, output: Path, export: Export) -> ExportedRound:
    stage = run.stage(to.round, "generate")
    files = [run.path(stage, name) for name in to.facts.pairs]
    stored = open_table(files, run.arrow_filesystem(), [*_TEXTS, "dropped"])
    form = FORMATS[export.format]
    if form.row is None:
        columns = [name for name in stored.schema.names if name != "dropped"]
        schema = pa.schema([stored.schema.field(name) for name in columns], stored.schema.metadata)
        sink: Any = pyarrow.parquet.ParquetWriter(output / to.file, schema, **PAGE_CHECKSUMS)
    else:
        columns = _TEXTS
        sink = (output / to.file).open("w", encoding="utf-8")
    kept = pyarrow.dataset.field("dropped") == ""
    batches = (
        batch
        for file in stored.each_file()
        for batch in file.to_batches(columns=columns, filter=kept, batch_size=_ROWS, batch_readahead=1)
    )
    with sink:
        for batch in batches:
            table = pa.Table.from_batches([batch])
            pairs = as_version_2(table.select(_TEXTS)).to_pylist()
            if form.row is None:
                sink.write_table(table)
                rows = len(pairs)
            else:
                rows = _write_lines(sink, pairs, form.row, export.config.prompts.template_arguments)
            cut = sum("length" in (pair["chosen_finish_reason"], *pair["rejected_finish_reason"]) for pair in pairs)
            to = replace(to, pairs=to.pairs + len(pairs), rows=to.rows + rows, truncated=to.truncated + cut)
    return to


def _write_lines(
    file: IO[str], pairs: list[dict[str, Any]], row_of: Callable[[TextPair], Row], arguments: Mapping[str, Any]
) -> int:
    """Writes the rows of these pairs; returns how many they are."""
    rows = 0
    for pair in pairs:
        for rejected in pair["rejected"]:
            row = row_of(TextPair(pair["pair_id"], pair["messages"], pair["chosen"], rejected, arguments))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            rows += 1
    return rows
