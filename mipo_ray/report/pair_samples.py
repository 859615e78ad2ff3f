"""The report's tables about pairs: what the filters left of each round, and what the kept pairs look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mipo_ray.pairs.sums import PERCENTS
from mipo_ray.storage.pair_statistics import PairStatistics, StrategyStatistics

Figures = PairStatistics | StrategyStatistics

_QUANTILES = " / ".join(f"{percent}" for percent in PERCENTS) + " %"


@dataclass(frozen=True)
class Row:
    """One line of a table: its label and its cells as they are shown."""

    label: str
    note: str  # what the cells hold, where the label does not say it
    cells: list[str]


@dataclass(frozen=True)
class Table:
    """`header` names the column of labels and those of the cells."""

    title: str
    header: list[str]
    rows: list[Row]


def pair_tables(statistics: Mapping[int, PairStatistics]) -> list[Table]:
    """Rows by reason, figures of the kept pairs, and PMI by strategy, round by round.

    `statistics`: by the number of the round. A figure that a round does not have is an empty cell.
    """
    if not statistics:
        return []
    rounds = [f"round {number}" for number in statistics]
    figures = [_figures(of_round) for of_round in statistics.values()]
    rows = [Row(*key, [of_round[key] for of_round in figures]) for key in figures[0]]
    tables = [
        Table("Rows by what became of them", ["count and share", *rounds], _by_reason(list(statistics.values()))),
        Table("Kept pairs", ["figure", *rounds], [row for row in rows if any(row.cells)]),
    ]
    strategies = _by_strategy(statistics)
    if strategies:
        header = [
            "strategy",
            "round",
            "rows",
            "kept",
            "PMI, nats [95 %]",
            "standard deviation",
            _QUANTILES,
            "below zero",
        ]
        tables.append(Table("Strategies", header, strategies))
    return tables


def _by_reason(statistics: Sequence[PairStatistics]) -> list[Row]:
    total: dict[str, int] = {}
    for of_round in statistics:
        for reason, count in of_round.dropped.items():
            total[reason] = total.get(reason, 0) + count
    rows = [
        Row("rows", "", [f"{of_round.rows:,}" for of_round in statistics]),
        Row("kept", "", [_of(of_round.kept, of_round.rows) for of_round in statistics]),
    ]
    for reason in sorted(total, key=lambda name: (-total[name], name)):
        cells = [_of(of_round.dropped.get(reason, 0), of_round.rows) for of_round in statistics]
        rows.append(Row(f"dropped: {reason}", "", cells))
    return rows


def _figures(of_round: PairStatistics) -> dict[tuple[str, str], str]:
    """(label, note) -> figure, the same keys for every round."""
    figures: dict[tuple[str, str], str] = {}
    for side in ("chosen", "rejected"):
        figures[f"{side} tokens", "mean ± standard deviation"] = _joined(
            of_round, "{:.1f} ± {:.1f}", f"{side}_tokens_mean", f"{side}_tokens_standard_deviation"
        )
        figures[f"{side} tokens", _QUANTILES] = _quantiles(of_round, f"{side}_tokens_quantiles", "{:g}")
    figures["chosen - rejected tokens", "mean [95 %]"] = _interval(of_round, "tokens_difference", "{:+.2f}")
    for side in ("chosen", "rejected"):
        figures[f"{side} cut at the length limit", "of kept pairs (of all that were sampled)"] = _joined(
            of_round, "{:.1%} ({:.1%})", f"{side}_truncated_share", f"{side}_truncated_share_all_rows"
        )
    if of_round.trimmed_responses is not None:
        figures["responses cut back to a whole sentence", "of kept pairs"] = _joined(
            of_round, "{:,}", "trimmed_responses"
        )
    figures["PMI, nats", "mean [95 %]"] = _interval(of_round, "pmi", "{:.2f}")
    figures["PMI, nats", "standard deviation"] = _joined(of_round, "{:.2f}", "pmi_standard_deviation")
    figures["PMI, nats", _QUANTILES] = _quantiles(of_round, "pmi_quantiles", "{:.2f}")
    figures["PMI below zero", "of scored pairs"] = _joined(
        of_round, "{:.1%} of {:,}", "pmi_below_zero_share", "pmi_count"
    )
    if of_round.reward_mean is not None:
        figures["reward of what was sampled", "mean of each prompt [95 %]"] = _interval(of_round, "reward", "{:.3g}")
        figures["reward, chosen less rejected", "mean of kept pairs"] = _joined(
            of_round, "{:+.3g}", "reward_margin_mean"
        )
    for side in ("chosen", "rejected"):
        figures[f"{side} texts that repeat another", ""] = _joined(of_round, "{:,}", f"{side}_duplicates")
        figures[f"{side} distinct-2, distinct-3", "mean of each response"] = _joined(
            of_round, "{:.3f}, {:.3f}", f"{side}_distinct_2", f"{side}_distinct_3"
        )
    figures["generated tokens", "of all rows"] = _joined(of_round, "{:,}", "generated_tokens")
    figures["generated tokens per kept pair", ""] = _joined(of_round, "{:.1f}", "generated_tokens_per_pair")
    figures["prefix-cache hit rate", "of the tokens of prompts that were answered"] = _joined(
        of_round, "{:.1%} of {:,}", "prefix_cache_hit_rate", "engine_prompt_tokens"
    )
    return figures


def _by_strategy(statistics: Mapping[int, PairStatistics]) -> list[Row]:
    return [
        Row(
            name,
            "",
            [
                str(number),
                f"{entry.rows:,}",
                _of(entry.kept, entry.rows),
                _interval(entry, "pmi", "{:.2f}"),
                _joined(entry, "{:.2f}", "pmi_standard_deviation"),
                _quantiles(entry, "pmi_quantiles", "{:.2f}"),
                _joined(entry, "{:.1%}", "pmi_below_zero_share"),
            ],
        )
        for number, of_round in statistics.items()
        for name, entry in of_round.by_strategy.items()
    ]


def _joined(figures: Figures, text: str, *names: str) -> str:
    values = [getattr(figures, name) for name in names]
    return "" if None in values else text.format(*values)


def _interval(figures: Figures, name: str, text: str) -> str:
    return _joined(figures, f"{text} [{text}, {text}]", f"{name}_mean", f"{name}_low", f"{name}_high") or _joined(
        figures, text, f"{name}_mean"
    )


def _quantiles(figures: Figures, name: str, text: str) -> str:
    return " / ".join(text.format(value) for value in getattr(figures, name).values())


def _of(count: int, rows: int) -> str:
    return f"{count:,} ({count / rows:.1%})" if rows else f"{count:,}"
