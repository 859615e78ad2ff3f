"""Statistics of a round's pairs: sums over blocks that add up to what the manifest and the report say. No Ray.

Sums are whole numbers (means of fractions in units of 2**-20), so the figures are the same however the pairs were split
into blocks. What the driver holds of a round: 8 bytes for every kept response (a 64-bit hash, to count duplicates: 16
bytes a pair with one rejected response) and counts by length and by PMI bin, whose number does not grow with the pairs.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mipo_ray.pairs.preferences import REWARD_COLUMNS
from mipo_ray.pairs.schema import PAIR_SCHEMA_2, TRIMMED_RESPONSES
from mipo_ray.pairs.sums import (
    UNIT,
    Counts,
    add_sums,
    count_values,
    histogram_of,
    moments_of,
    power_sums,
    power_sums_of_counts,
    quantiles_of,
    ratio,
)
from mipo_ray.storage.pair_statistics import (
    Histograms,
    PairStatistics,
    PmiHistogram,
    StrategyStatistics,
    TokenHistogram,
)
from mipo_ray.text.statistics import distinct_n, words
from mipo_ray.text.thoughts import answer_of

SIDES = ("chosen", "rejected")
_PMI_BINS_PER_NAT = 100
_LARGEST_PMI = 10_000  # nats: PMIs beyond it lie in the outermost bins


@dataclass(frozen=True)
class _Responses:
    """All responses of one side of a block, [responses] each; with version 2 several of a row."""

    rows: NDArray[np.int64]  # the row of each response
    texts: list[str]
    tokens: NDArray[np.int64]
    finish_reasons: NDArray[Any]


def pair_statistics(block: pa.Table) -> dict[str, Any]:
    """Sums over one block of pairs (version 2) that `merge_statistics` adds up; JSON-able."""
    kept = np.asarray(pc.equal(block["dropped"], ""), dtype=bool)
    responses = {"chosen": _chosen(block), "rejected": _rejected(block)}
    sums: dict[str, Any] = {
        "fingerprint": prompt_fingerprint(block.filter(pc.equal(block["sample"], 0))["prompt_id"].to_pylist()),
        "prompt_tokens": pc.sum(pc.list_value_length(block["prompt_token_ids"])).as_py() or 0,
        "generated_tokens": _sum(block, "generated_tokens"),
        "engine_prompt_tokens": _sum(block, "engine_prompt_tokens"),
        "cached_prompt_tokens": _sum(block, "cached_prompt_tokens"),
        "pairs_with_control_tokens": int(pc.sum(pc.greater(block["control_tokens"], 0)).as_py() or 0),
        "by_strategy": _by_strategy(block, kept),
        "difference": _difference(responses, kept),
        "trimmed": _trimmed(block, kept),
        **_rewards(block, kept),
    }
    return sums | {side: _side(responses[side], kept) for side in SIDES}


def merge_statistics(parts: Iterable[dict[str, Any]]) -> PairStatistics:
    """The statistics of a round from the sums of its blocks."""
    sums: dict[str, Any] = {}
    for part in itertools.chain([pair_statistics(PAIR_SCHEMA_2.empty_table())], parts):
        add_sums(sums, part)
    strategies = {name: sums["by_strategy"][name] for name in sorted(sums["by_strategy"])}
    everything: dict[str, Any] = {"rows": 0, "kept": 0, "dropped": {}, "pmi": _pmi(np.zeros(0))}
    for strategy in strategies.values():
        add_sums(everything, strategy)
    kept = everything["kept"]
    pmi_counts = {int(bin_): count for bin_, count in everything["pmi"]["bins"].items()}
    token_counts = {side: {int(tokens): count for tokens, count in sums[side]["tokens"].items()} for side in SIDES}
    token_edges, token_bars = histogram_of([token_counts["chosen"], token_counts["rejected"]])
    pmi_edges, pmi_bars = histogram_of([pmi_counts])
    difference = moments_of(sums["difference"])
    reward = moments_of(sums["reward"])
    return PairStatistics(
        rows=everything["rows"],
        kept=kept,
        dropped=dict(sorted(everything["dropped"].items())),
        fingerprint=f"{sums['fingerprint'] % 2**64:016x}",
        by_strategy={
            name: StrategyStatistics(rows=strategy["rows"], kept=strategy["kept"], **_pmi_figures(strategy["pmi"]))
            for name, strategy in strategies.items()
        },
        **_pmi_figures(everything["pmi"]),
        reward_mean=reward["mean"],
        reward_low=reward["low"],
        reward_high=reward["high"],
        reward_margin_mean=moments_of(sums["reward_margin"])["mean"],
        **{
            f"{side}_{name}": value
            for side in SIDES
            for name, value in _side_figures(sums[side], token_counts[side]).items()
        },
        tokens_difference_mean=difference["mean"],
        tokens_difference_low=difference["low"],
        tokens_difference_high=difference["high"],
        prompt_tokens=sums["prompt_tokens"],
        generated_tokens=sums["generated_tokens"],
        generated_tokens_per_pair=ratio(sums["generated_tokens"], kept),
        engine_prompt_tokens=sums["engine_prompt_tokens"],
        cached_prompt_tokens=sums["cached_prompt_tokens"],
        pairs_with_control_tokens=sums["pairs_with_control_tokens"],
        trimmed_responses=sums["trimmed"].get("responses"),
        prefix_cache_hit_rate=ratio(sums["cached_prompt_tokens"], sums["engine_prompt_tokens"]),
        histograms=Histograms(
            TokenHistogram(token_edges, *token_bars),
            PmiHistogram([edge / _PMI_BINS_PER_NAT for edge in pmi_edges], pmi_bars[0]),
        ),
    )


def prompt_fingerprint(prompt_ids: Iterable[str]) -> int:
    """Order-independent fingerprint of a set of prompt ids: equal sums mean the same ids, each as often."""
    return sum(_hash64(value) for value in prompt_ids) % 2**64


def drop_table(statistics: PairStatistics) -> str:
    """The filters' outcome as lines of text: rows, kept, each reason with its count and share of the rows.

    Several strategies have a line each: the pairs kept and their share of the strategy's rows.
    """
    rows = statistics.rows
    reasons = sorted(statistics.dropped.items(), key=lambda item: -item[1])
    lines = [("rows", rows, ""), ("kept", statistics.kept, "")]
    lines += [(f"dropped: {reason}", count, f"{count / rows:>8.1%}") for reason, count in reasons]
    strategies = statistics.by_strategy
    if len(strategies) > 1:
        lines += [
            (f"kept, {name}", entry.kept, f"{entry.kept / entry.rows:>8.1%} of {entry.rows:,} rows")
            for name, entry in strategies.items()
        ]
    width = max(24, *(len(label) + 2 for label, _, _ in lines))
    return "\n".join(f"{label:<{width}}{count:>10,}{share}" for label, count, share in lines)


def _chosen(block: pa.Table) -> _Responses:
    return _Responses(
        rows=np.arange(block.num_rows),
        texts=block["chosen"].to_pylist(),
        tokens=np.asarray(pc.list_value_length(block["chosen_token_ids"]), dtype=np.int64),
        finish_reasons=np.asarray(block["chosen_finish_reason"].to_pylist(), dtype=object),
    )


def _rejected(block: pa.Table) -> _Responses:
    texts = block["rejected"].combine_chunks()
    return _Responses(
        rows=np.repeat(np.arange(block.num_rows), np.asarray(pc.list_value_length(texts), dtype=np.int64)),
        texts=texts.flatten().to_pylist(),
        tokens=np.asarray(pc.list_value_length(block["rejected_token_ids"].combine_chunks().flatten()), dtype=np.int64),
        finish_reasons=np.asarray(block["rejected_finish_reason"].combine_chunks().flatten().to_pylist(), dtype=object),
    )


def _by_strategy(block: pa.Table, kept: NDArray[np.bool_]) -> dict[str, Any]:
    strategies = np.asarray(block["strategy"].to_pylist(), dtype=object)
    dropped = np.asarray(block["dropped"].to_pylist(), dtype=object)
    pmi = block["pmi"].to_numpy().astype(np.float64)  # null becomes NaN
    sums = {}
    for name in sorted(set(strategies)):
        of_strategy = strategies == name
        sums[name] = {
            "rows": int(of_strategy.sum()),
            "kept": int((of_strategy & kept).sum()),
            "dropped": dict(Counter(dropped[of_strategy & ~kept])),
            "pmi": _pmi(pmi[of_strategy & kept]),
        }
    return sums


def _pmi(values: NDArray[np.float64]) -> dict[str, Any]:
    """Sums over PMIs in nats; those that are not finite (not scored) are left out."""
    values = values[np.isfinite(values)]
    bins = np.floor(np.clip(values, -_LARGEST_PMI, _LARGEST_PMI) * _PMI_BINS_PER_NAT)
    return {
        "below_zero": int((values < 0).sum()),
        "bins": count_values(bins.astype(np.int64)),
        "moments": power_sums(values),
    }


def _pmi_figures(sums: dict[str, Any]) -> dict[str, Any]:
    moments = moments_of(sums["moments"])
    bins = {int(bin_): count for bin_, count in sums["bins"].items()}
    quantiles = {percent: (value + 0.5) / _PMI_BINS_PER_NAT for percent, value in quantiles_of(bins).items()}
    return {
        "pmi_count": sums["moments"]["count"],
        **{f"pmi_{name}": value for name, value in moments.items()},
        "pmi_quantiles": quantiles,
        "pmi_below_zero_share": ratio(sums["below_zero"], sums["moments"]["count"]),
    }


def _side(responses: _Responses, kept: NDArray[np.bool_]) -> dict[str, Any]:
    kept_response = kept[responses.rows]
    truncated = responses.finish_reasons == "length"
    texts = [responses.texts[index] for index in np.flatnonzero(kept_response)]
    tokenised = [words(answer_of(text)) for text in texts]
    sums: dict[str, Any] = {
        "tokens": count_values(responses.tokens[kept_response]),
        "truncated": int(truncated[kept_response].sum()),
        "truncated_all_rows": int(truncated.sum()),
        "sampled_all_rows": int((responses.finish_reasons != "").sum()),
        "hashes": base64.b64encode(b"".join(_digest64(text) for text in texts)).decode(),
    }
    for n in (2, 3):
        sums[f"distinct_{n}"] = sum(round(distinct_n(tokens, n) * UNIT) for tokens in tokenised)
    return sums


def _side_figures(sums: dict[str, Any], tokens: dict[int, int]) -> dict[str, Any]:
    powers = power_sums_of_counts(tokens)
    responses, moments = powers["count"], moments_of(powers)
    return {
        "tokens": powers["sum"] // UNIT,
        "tokens_mean": moments["mean"],
        "tokens_standard_deviation": moments["standard_deviation"],
        "tokens_quantiles": quantiles_of(tokens),
        "truncated_share": ratio(sums["truncated"], responses),
        "truncated_share_all_rows": ratio(sums["truncated_all_rows"], sums["sampled_all_rows"]),
        "distinct_2": ratio(sums["distinct_2"], responses * UNIT),
        "distinct_3": ratio(sums["distinct_3"], responses * UNIT),
        "duplicates": responses - len(np.unique(np.concatenate(sums["hashes"]))),
    }


def _difference(responses: dict[str, _Responses], kept: NDArray[np.bool_]) -> Counts:
    """Sums over kept pairs of chosen tokens less the mean of their rejected tokens."""
    rejected = responses["rejected"]
    sums = np.bincount(rejected.rows, weights=rejected.tokens, minlength=len(kept))
    counts = np.bincount(rejected.rows, minlength=len(kept))
    return power_sums(responses["chosen"].tokens[kept] - sums[kept] / counts[kept])


def _trimmed(block: pa.Table, kept: NDArray[np.bool_]) -> Counts:
    """Responses of kept pairs that were cut back to their last whole sentence; nothing where none are trimmed."""
    if TRIMMED_RESPONSES not in block.column_names:
        return {}
    return {"responses": int(block[TRIMMED_RESPONSES].to_numpy()[kept].sum())}


def _rewards(block: pa.Table, kept: NDArray[np.bool_]) -> dict[str, Counts]:
    """Sums over the prompts' mean rewards, and over the margins of kept pairs; of nothing where none chose them."""
    if REWARD_COLUMNS[0] not in block.column_names:
        return {name: power_sums(np.zeros(0)) for name in ("reward", "reward_margin")}
    chosen, rejected, sampled = (block[name].to_numpy().astype(np.float64) for name in REWARD_COLUMNS)
    return {"reward": power_sums(sampled[np.isfinite(sampled)]), "reward_margin": power_sums((chosen - rejected)[kept])}


def _sum(block: pa.Table, name: str) -> int:
    return int(pc.sum(block[name]).as_py() or 0)


def _digest64(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
