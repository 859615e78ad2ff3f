"""The statistics of a round's pairs, as the manifest of its generate stage holds them; `pairs.statistics` counts them.

All are over kept pairs, unless their name says otherwise, and None where there is nothing to count, or where an
earlier version did not count it. Intervals (_low, _high) are normal 95 % ones that take pairs as independent: with
several pairs of a prompt they are too narrow. Standard deviations have n - 1. The q % quantile is the smallest value
that q % of all do not exceed; the keys of quantiles are percents ("5", "25", ...).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mipo_ray.storage.records import optional


@dataclass(frozen=True, kw_only=True)
class StrategyStatistics:
    """The pairs of one conditioning strategy. PMI is in nats, by the sampler."""

    rows: int
    """Rows that the strategy conditioned."""
    kept: int
    """Of these, the pairs that no filter dropped."""
    pmi_count: int | None = None
    """Scored pairs."""
    pmi_mean: float | None = None
    pmi_low: float | None = None
    pmi_high: float | None = None
    pmi_standard_deviation: float | None = None
    pmi_quantiles: dict[str, float] = field(default_factory=dict)
    """From bins of 0.01 nats: off by at most 0.005 up to 10,000 nats."""
    pmi_below_zero_share: float | None = None
    """Of the scored pairs."""


@dataclass(frozen=True)
class TokenHistogram:
    """Responses by length: at most 40 bins [edge, next edge), in tokens, with how many fall in each."""

    edges: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class PmiHistogram:
    """Pairs by PMI: at most 40 bins [edge, next edge), in nats, with how many fall in each."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Histograms:
    """The distributions of the kept pairs."""

    tokens: TokenHistogram
    pmi: PmiHistogram


@dataclass(frozen=True, kw_only=True)
class PairStatistics:
    """The statistics of a round. Of several rejected responses of a pair each counts on its own."""

    rows: int
    """Rows that the stage was to make pairs of."""
    kept: int
    """Pairs that no filter dropped."""
    dropped: dict[str, int]
    """Rows by the reason why they are not trained on."""
    fingerprint: str | None = None
    """Of the prompts (`pairs.statistics.prompt_fingerprint`), 16 hex digits."""
    by_strategy: dict[str, StrategyStatistics] = field(default_factory=dict)
    """By the name of the conditioning strategy."""

    pmi_count: int | None = None
    """Scored pairs."""
    pmi_mean: float | None = None
    """Nats, by the sampler, as are the next three."""
    pmi_low: float | None = None
    pmi_high: float | None = None
    pmi_standard_deviation: float | None = None
    pmi_quantiles: dict[str, float] = field(default_factory=dict)
    """Nats, from bins of 0.01: off by at most 0.005 up to 10,000 nats."""
    pmi_below_zero_share: float | None = None
    """Of the scored pairs."""

    reward_mean: float | None = optional()
    """Of all responses that a reward chose from: the mean over prompts of each one's mean reward, in its own unit."""
    reward_low: float | None = optional()
    reward_high: float | None = optional()
    reward_margin_mean: float | None = optional()
    """The reward of the chosen less that of the rejected response, over kept pairs."""

    chosen_tokens: int | None = None
    """The sum over all chosen responses."""
    chosen_tokens_mean: float | None = None
    """Of a response; so are the deviation and the quantiles, which are exact."""
    chosen_tokens_standard_deviation: float | None = None
    chosen_tokens_quantiles: dict[str, int] = field(default_factory=dict)
    chosen_truncated_share: float | None = None
    """Cut at the length limit."""
    chosen_truncated_share_all_rows: float | None = None
    """Cut at the length limit, of all chosen responses that were sampled."""
    chosen_distinct_2: float | None = None
    """Mean of `distinct_n` of each response: the share of its 2-grams that are different ones."""
    chosen_distinct_3: float | None = None
    """The same of 3-grams."""
    chosen_duplicates: int | None = None
    """Responses whose text another one before has, exact but for collisions of 64-bit hashes."""

    rejected_tokens: int | None = None
    """The sum over all rejected responses; the fields below are those of the chosen ones."""
    rejected_tokens_mean: float | None = None
    rejected_tokens_standard_deviation: float | None = None
    rejected_tokens_quantiles: dict[str, int] = field(default_factory=dict)
    rejected_truncated_share: float | None = None
    rejected_truncated_share_all_rows: float | None = None
    rejected_distinct_2: float | None = None
    rejected_distinct_3: float | None = None
    rejected_duplicates: int | None = None

    tokens_difference_mean: float | None = None
    """Chosen tokens less the mean of the pair's rejected ones, the length bias, with its interval."""
    tokens_difference_low: float | None = None
    tokens_difference_high: float | None = None

    trimmed_responses: int | None = optional()
    """Of kept pairs, responses that the length limit cut and that were cut back to their last whole sentence."""

    prompt_tokens: int | None = None
    """Of the prompts of all rows."""
    generated_tokens: int | None = None
    """Sampled for all rows."""
    generated_tokens_per_pair: float | None = None
    """Sampled for all rows, per kept pair."""
    engine_prompt_tokens: int | None = None
    """Of the prompts that the engines were sent, of all rows."""
    cached_prompt_tokens: int | None = None
    """Of these, found in the engines' prefix caches."""
    pairs_with_control_tokens: int | None = optional()
    """Of all rows, those with a control token inside a response."""
    prefix_cache_hit_rate: float | None = None
    """The share of them."""
    histograms: Histograms | None = None
