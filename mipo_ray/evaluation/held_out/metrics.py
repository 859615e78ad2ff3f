"""From the scored responses of one policy to its entries in results.json.

What is paired is paired by prompt; what is resampled are the users and questions of the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mipo_ray.evaluation.held_out import mutual_information as mi
from mipo_ray.evaluation.held_out.effects import ScoredAnswers, TokenScores, effect_columns
from mipo_ray.evaluation.intervals import (
    Estimate,
    bootstrap_change,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_ratio_change,
    with_change,
)
from mipo_ray.evaluation.resampling import Clusters
from mipo_ray.measures import ECHO_SHARES, HELD_OUT, Measure
from mipo_ray.storage.entries import Entries, Entry
from mipo_ray.text.refusals import is_refusal
from mipo_ray.text.statistics import copy_rate, corpus_distinct_n, distinct_n, only_copies, self_bleu, words

Array = NDArray[np.float64]


@dataclass(frozen=True)
class MeasuredRows:
    """Scored held-out responses of one policy ([R]) and its log-probs of the fixed held-out pairs ([P]).

    Log-probs are sums over a response's tokens, nats, float64. "initial" is the frozen initial model, "policy" the
    model the responses were sampled from; for the base the two are the same arrays.
    """

    prompt_ids: Sequence[str]  # [R]
    responses: Sequence[str]  # [R], without thoughts: the answers
    sources: Sequence[str]  # [R], context and question: what the copy rate compares with
    token_counts: NDArray[Any]  # [R], of the whole response
    truncated: NDArray[Any]  # [R], bool: cut at the length limit
    initial_own: Array  # [R]
    initial_others: Array  # [R, K]
    initial_none: Array | None  # [R], under the question alone; NaN in rows without a context; None: no row has one
    policy_own: Array  # [R]
    policy_others: Array  # [R, K]
    policy_none: Array | None  # [R], as initial_none
    pair_prompt_ids: Sequence[str]  # [P]
    pair_policy_chosen: Array  # [P]
    pair_policy_rejected: Array  # [P]
    pair_initial_chosen: Array  # [P]
    pair_initial_rejected: Array  # [P]
    answer_token_counts: NDArray[Any] | None = None  # [R], of the answer; None: there are no thoughts
    questions: Sequence[str] | None = None  # [R], equal where the same is asked; None: nobody knows
    users: Sequence[str] | None = None  # [R], whose row it is, "" where it names nobody; None: no row names anybody
    tokens: Sequence[TokenScores] | None = None  # [R], by the initial model; None: an earlier version kept sums alone

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field, where lengths differ or there are no responses."""
        if not len(self.prompt_ids):
            raise ValueError("prompt_ids: expected at least one response, found none")
        for field in fields(self):
            column = getattr(self, field.name)
            expected = len(self.pair_prompt_ids if field.name.startswith("pair_") else self.prompt_ids)
            if column is not None and len(column) != expected:
                raise ValueError(f"{field.name}: expected {expected} rows, found {len(column)}")

    @property
    def clusters(self) -> Clusters | None:
        """What is resampled, by prompt; None where the questions are not known."""
        if self.questions is None:
            return None
        users = None if self.users is None else dict(zip(self.prompt_ids, self.users, strict=True))
        return Clusters(users, dict(zip(self.prompt_ids, self.questions, strict=True)))


def measure(rows: MeasuredRows, base: MeasuredRows | None, *, beta: float, samples: int, seed: int) -> Entries:
    """What results.json has of one policy, by measure; with `base` also the paired change.

    `beta` is DPO's, for the rewards; `samples` and `seed` are the bootstrap's, which resamples the rows' users and
    questions. Context metrics are left out when no row has a context, reward metrics when there are no held-out pairs,
    self-BLEU for a single response, the echo share of a PMI unless the interval of the PMI's change lies above zero: of
    a rise that may be none there is no share. Raises ValueError on values that are not finite.
    """
    columns = item_values(rows, beta, base)
    base_columns = item_values(base, beta, None) if base is not None else {}
    draw: dict[str, Any] = {"samples": samples, "seed": seed, "clusters": rows.clusters}
    results: Entries = {}
    for name, known in HELD_OUT.items():
        if name == "kl_per_token":
            results[name] = _kl_entry(rows, base, draw)
        elif name == "corpus_distinct_2":
            results[name] = _corpus_entry(rows, base)
        elif name in ECHO_SHARES and not _rose(results.get(ECHO_SHARES[name])):
            continue
        elif name in columns:
            groups, values = columns[name]
            estimate = bootstrap_mean(values, groups, **draw)
            change = None
            if name in base_columns:
                base_groups, base_values = base_columns[name]
                change = bootstrap_change(base_values, base_groups, values, groups, **draw)
            results[name] = _entry(known, estimate, change)
        if name.startswith("infonce"):
            results[name] = replace(results[name], ceiling=mi.infonce_ceiling(rows.initial_others.shape[1]))
    return results


def item_values(rows: MeasuredRows, beta: float, base: MeasuredRows | None) -> dict[str, tuple[Sequence[str], Array]]:
    """Metric -> (prompt of each item, value of each item), for every metric that is a mean over items.

    base: what some of the measures of a round's policy are beside (`effects`); None: the rows are the base's own.
    """
    tokenised = [words(response) for response in rows.responses]
    texts = list(zip(rows.responses, rows.sources, strict=True))
    answer_tokens = rows.token_counts if rows.answer_token_counts is None else rows.answer_token_counts
    per_response = {
        "response_tokens": np.asarray(answer_tokens, dtype=np.float64),
        "truncated": np.asarray(rows.truncated, dtype=np.float64),
        "copy_rate": np.array([copy_rate(response, source) for response, source in texts]),
        "only_copies": np.array([float(only_copies(response, source)) for response, source in texts]),
        "refusals": np.array([float(is_refusal(response)) for response in rows.responses]),
        "distinct_1": np.array([distinct_n(tokens, 1) for tokens in tokenised]),
        "distinct_2": np.array([distinct_n(tokens, 2) for tokens in tokenised]),
    }
    if len(tokenised) > 1:
        # Prompts are resampled as those whose answers are rated; the references stay all the others.
        per_response["self_bleu"] = np.array(self_bleu(tokenised))
    columns: dict[str, tuple[Sequence[str], Array]] = {}
    for judge, own, others, none in (
        ("initial", rows.initial_own, rows.initial_others, rows.initial_none),
        ("policy", rows.policy_own, rows.policy_others, rows.policy_none),
    ):
        per_response[f"pmi_{judge}"] = mi.leave_one_out_pmi(own, others)
        per_response[f"pmi_{judge}_per_token"] = mi.leave_one_out_pmi_per_token(own, others, rows.token_counts)
        per_response[f"infonce_{judge}"] = mi.infonce_per_token(own, others, rows.token_counts)
        per_response[f"retrieval_{judge}"] = mi.retrieval_correct(own, others)
        with_context = np.flatnonzero(~np.isnan([] if none is None else none))
        if none is not None and len(with_context):
            groups = [rows.prompt_ids[row] for row in with_context]
            own_and_none = np.asarray(own)[with_context], np.asarray(none)[with_context]
            columns[f"context_pmi_{judge}"] = (groups, mi.pmi_without_context(*own_and_none))
            if judge == "initial":
                per_token = mi.pmi_without_context_per_token(*own_and_none, np.asarray(rows.token_counts)[with_context])
                columns["context_pmi_per_token"] = (groups, per_token)
    columns |= {name: (rows.prompt_ids, values) for name, values in per_response.items()}
    before = {} if base is None else scored_answers(base)
    for kind, answers in scored_answers(rows).items():
        if base is None or kind in before:
            columns |= effect_columns(answers, before.get(kind))
    if len(rows.pair_prompt_ids):
        chosen = mi.rewards(rows.pair_policy_chosen, rows.pair_initial_chosen, beta)
        rejected = mi.rewards(rows.pair_policy_rejected, rows.pair_initial_rejected, beta)
        columns["reward_accuracy"] = (rows.pair_prompt_ids, mi.reward_accuracy(chosen, rejected))
        columns["reward_margin"] = (rows.pair_prompt_ids, mi.reward_margin(chosen, rejected))
    return columns


def scored_answers(rows: MeasuredRows) -> dict[str, ScoredAnswers]:
    """Kind of PMI -> the answers that have one, with it."""
    whole = {"pmi": mi.leave_one_out_pmi(rows.initial_own, rows.initial_others)}
    if rows.initial_none is not None:
        whole["context_pmi"] = np.asarray(rows.initial_own) - rows.initial_none
    found = {}
    for kind, values in whole.items():
        if len(kept := np.flatnonzero(~np.isnan(values))):
            prompts = [rows.prompt_ids[row] for row in kept]
            tokens = None if rows.tokens is None else [rows.tokens[row] for row in kept]
            lengths = np.asarray(rows.token_counts, dtype=np.float64)[kept]
            found[kind] = ScoredAnswers(kind, prompts, values[kept], lengths, tokens)
    return found


def _rose(entry: Entry | None) -> bool:
    """Whether the interval of a change from the base lies above zero."""
    return entry is not None and entry.change_low is not None and entry.change_low > 0


def _kl_entry(rows: MeasuredRows, base: MeasuredRows | None, draw: dict[str, Any]) -> Entry:
    new = _kl_terms(rows)
    change = None
    if base is not None:
        change = bootstrap_ratio_change(*_kl_terms(base), *new, **draw)
    return _entry(HELD_OUT["kl_per_token"], bootstrap_ratio(*new, **draw), change)


def _kl_terms(rows: MeasuredRows) -> tuple[Array, Array, list[str]]:
    """Log ratios, token counts and prompts of the responses that have tokens; the others add 0 to both sums."""
    counts = np.asarray(rows.token_counts, dtype=np.float64)
    kept = np.flatnonzero(counts)
    if not len(kept):
        raise ValueError("token_counts: expected a response with at least one token, found none")
    return mi.log_ratio(rows.policy_own, rows.initial_own)[kept], counts[kept], [rows.prompt_ids[row] for row in kept]


def _corpus_entry(rows: MeasuredRows, base: MeasuredRows | None) -> Entry:
    """Resampled prompts repeat answers, which this figure would count as alike: it has no bootstrap interval."""
    value = corpus_distinct_n([words(response) for response in rows.responses], 2)
    change = None
    if base is not None:
        change = value - corpus_distinct_n([words(response) for response in base.responses], 2)
    unit = HELD_OUT["corpus_distinct_2"].unit
    return Entry(value, low=None, high=None, n=len(set(rows.prompt_ids)), unit=unit, change=change)


def _entry(measure: Measure, estimate: Estimate, change: Estimate | None) -> Entry:
    entry = estimate.within(measure.bounds).as_entry(measure.unit)
    return entry if change is None else with_change(entry, change.within(measure.change_bounds))
