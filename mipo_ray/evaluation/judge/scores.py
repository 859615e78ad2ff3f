"""From judgements to figures: win, tie, loss and ratings with intervals, and how far the judge can be trusted. Pure.

All figures are means over prompts of each prompt's mean. Their intervals resample the prompts' users and questions; a
prompt's answers, and both orders of a pair, are drawn together. Where the judge is in doubt, or cannot be read, no win
is counted:

- A pair is a win of the round's policy only where the judge prefers its answer in both orders, a loss where it prefers
  the base's in both. Everything else is a tie: a tie said twice, a tie said once, two orders that contradict each
  other, and an order that cannot be read. A judge that always prefers what stands first says nothing, and gives ties.
- A rating that cannot be read is left out of the mean, and counted as unreadable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mipo_ray.errors import UserError
from mipo_ray.evaluation.intervals import Estimate, describe_change, with_change
from mipo_ray.evaluation.resampling import Clusters
from mipo_ray.evaluation.significance import mean_entry
from mipo_ray.measures import JUDGED
from mipo_ray.storage.entries import Entries, Entry

# Share of a protocol's judgements: figures of what is left would be those of the answers that the judge could follow.
MOST_UNREADABLE = 0.5
EXAMPLES = 3
EXAMPLE_CHARACTERS = 300


@dataclass(frozen=True)
class Judgement:
    """One judgement. order: "base_first" or "policy_first"; "" where one answer alone is rated.

    parsed: what the judge said of what it saw ("first", "second" or "tie"; a rating "1" to "5"); None: unreadable.
    """

    prompt_id: str
    sample: int
    order: str
    parsed: str | None


def outcome(judgement: Judgement) -> str | None:
    """ "win", "loss" or "tie" from the side of the round's policy; None where the judgement cannot be read."""
    if judgement.parsed is None or judgement.parsed == "tie":
        return judgement.parsed
    is_policy = (judgement.parsed == "first") == (judgement.order == "policy_first")
    return "win" if is_policy else "loss"


def pair_outcome(outcomes: Sequence[str | None]) -> str:
    """The outcome of a pair from those of its two orders: what both say, and a tie where they do not agree."""
    first, second = outcomes
    return first if first is not None and first == second else "tie"


def pairwise_metrics(
    judgements: Sequence[Judgement], *, samples: int, seed: int, clusters: Clusters | None = None
) -> Entries:
    """Metric -> entry, from judgements that hold every pair in both orders.

    win, tie, loss: shares of the pairs, which add up to 1. net_win: win - loss, with the verdict on the round's policy;
        0.5 + net_win / 2 is the win rate that counts a tie as half.
    position_bias: share of the decided judgements (no ties) that prefer what stands first, less 0.5; absent where
        nothing was decided.
    self_consistency: share of the pairs, read in both orders, of which the judge says the same in both; absent where
        there is no such pair.
    unreadable: share of the judgements.

    `samples`, `seed` and `clusters` are the bootstrap's. Raises ValueError where a pair has not exactly one judgement
    per order.
    """
    pairs = _pairs(judgements)
    prompts = [prompt_id for prompt_id, _ in pairs]
    read = [tuple(map(outcome, pair)) for pair in pairs.values()]
    outcomes = [pair_outcome(pair) for pair in read]

    def entry(name: str, values: Sequence[float], of: Sequence[str]) -> Entry:
        return mean_entry(JUDGED[name], (values, of), samples=samples, seed=seed, clusters=clusters)

    metrics = {
        name: entry(name, [float(result == name) for result in outcomes], prompts) for name in ("win", "tie", "loss")
    }
    net = entry("net_win", [float(result == "win") - float(result == "loss") for result in outcomes], prompts)
    # The base against itself would have 0: the figure is its own change from the base.
    change = Estimate.of_value(net)
    word = describe_change(change, JUDGED["net_win"].better)
    metrics["net_win"] = with_change(net, change, word)
    decided = [judgement for judgement in judgements if judgement.parsed in ("first", "second")]
    if decided:
        first = [float(judgement.parsed == "first") - 0.5 for judgement in decided]
        metrics["position_bias"] = entry("position_bias", first, [judgement.prompt_id for judgement in decided])
    both = [(prompt, pair) for prompt, pair in zip(prompts, read, strict=True) if None not in pair]
    if both:
        alike = [float(one == other) for _, (one, other) in both]
        metrics["self_consistency"] = entry("self_consistency", alike, [prompt for prompt, _ in both])
    metrics["unreadable"] = entry("unreadable", *_unreadable(judgements))
    return metrics


def pointwise_metrics(
    judgements: Sequence[Judgement],
    base: Sequence[Judgement] | None,
    *,
    samples: int,
    seed: int,
    clusters: Clusters | None = None,
) -> Entries:
    """Metric -> entry: rating (points, 1 to 5; with `base` the paired change over prompts rated on both sides, and the
    verdict; without them where no prompt was) and unreadable (share of the judgements).

    Raises ValueError where no rating can be read.
    """
    ratings, prompts = _ratings(judgements)
    before = None if base is None else _ratings(base)
    if before is not None and not set(before[1]) & set(prompts):
        before = None
    draw: Any = {"samples": samples, "seed": seed, "clusters": clusters}
    rating = mean_entry(JUDGED["rating"], (ratings, prompts), before, **draw)
    unreadable = mean_entry(JUDGED["unreadable"], _unreadable(judgements), **draw)
    return {"rating": rating, "unreadable": unreadable}


def check_readable(judgements: Sequence[Judgement], texts: Sequence[str], what: str, directory: str) -> None:
    """Raises UserError, with examples of what the judge said, when more than MOST_UNREADABLE of it cannot be read.

    `texts` are the judge's, `what` says who judged, and `directory` where the judgements are kept.
    """
    unread = [index for index, judgement in enumerate(judgements) if judgement.parsed is None]
    if len(unread) <= MOST_UNREADABLE * len(judgements):
        return
    examples = "\n".join(
        f"  prompt {judgements[index].prompt_id!r}: {_shortened(texts[index])}" for index in unread[:EXAMPLES]
    )
    raise UserError(
        f"{what}: {len(unread)} of {len(judgements)} judgements name no verdict that can be read, more than "
        f"{MOST_UNREADABLE:.0%}. The judge must end with a line such as 'Verdict: A' or 'Rating: 4'; a larger judge or "
        f"more evaluate.judge.max_tokens may help. To ask it again, remove {directory}. It said:\n{examples}"
    )


def describe_judgement(metrics: Entries) -> str:
    """One line for people: the shares, or the mean rating, and what they say of the policy."""
    if "rating" in metrics:
        rating = metrics["rating"]
        text = f"mean rating {rating.value:.2f} [{rating.low:.2f}, {rating.high:.2f}] of 5"
        if rating.verdict is not None:
            change = f"{rating.change:+.2f} [{rating.change_low:+.2f}, {rating.change_high:+.2f}]"
            text += f", change from the base {change}: {rating.verdict}"
    else:
        net = metrics["net_win"]
        shares = ", ".join(f"{name} {metrics[name].value:.3f}" for name in ("win", "tie", "loss"))
        interval = f"[{net.low:+.3f}, {net.high:+.3f}]"
        text = f"{shares}; win - loss {net.value:+.3f} {interval}: {net.verdict}"
    return f"{text}; unreadable {metrics['unreadable'].value:.3f}"


def _pairs(judgements: Sequence[Judgement]) -> dict[tuple[str, int], list[Judgement]]:
    pairs: dict[tuple[str, int], list[Judgement]] = {}
    for judgement in judgements:
        pairs.setdefault((judgement.prompt_id, judgement.sample), []).append(judgement)
    for (prompt_id, sample), pair in pairs.items():
        if sorted(judgement.order for judgement in pair) != ["base_first", "policy_first"]:
            found = ", ".join(judgement.order for judgement in pair)
            raise ValueError(f"prompt {prompt_id!r}, sample {sample}: expected each order once, found {found}")
    return pairs


def _ratings(judgements: Sequence[Judgement]) -> tuple[list[float], list[str]]:
    read = [judgement for judgement in judgements if judgement.parsed is not None]
    return [float(str(judgement.parsed)) for judgement in read], [judgement.prompt_id for judgement in read]


def _unreadable(judgements: Sequence[Judgement]) -> tuple[list[float], list[str]]:
    return [float(judgement.parsed is None) for judgement in judgements], [item.prompt_id for item in judgements]


def _shortened(text: str) -> str:
    text = repr(text)
    return text if len(text) <= EXAMPLE_CHARACTERS else f"{text[: EXAMPLE_CHARACTERS - 3]}..."
