"""Figures of a policy for tests of the guard."""

from __future__ import annotations

from mipo_ray.evaluation.significance import with_primary
from mipo_ray.measures import HELD_OUT
from mipo_ray.storage.entries import Entries, Entry
from mipo_ray.storage.manifests import BrokenBound

PRIMARY = "context_pmi_initial"
BASE_FIGURES = {
    PRIMARY: 16.0,
    "response_tokens": 40.0,
    "truncated": 0.1,
    "copy_rate": 0.05,
    "distinct_2": 0.9,
    "corpus_distinct_2": 0.6,
    "self_bleu": 0.1,
    "kl_per_token": 0.0,
}


def entries(width: float = 3.0, **values: float) -> Entries:
    """Those of the base but for `values`; each with an interval of `width` to both sides, where it has one."""
    found = {}
    for name, value in {**BASE_FIGURES, **values}.items():
        low, high = (None, None) if name == "corpus_distinct_2" else (value - width, value + width)
        found[name] = Entry(value, low, high, 20, HELD_OUT[name].unit)
    return with_primary(found, PRIMARY)


def broken_bound(measure: str = "self_bleu", value: float = 0.412) -> BrokenBound:
    """A bound beside the base that a round broke."""
    return BrokenBound(measure=measure, value=value, side="at most", bound=0.309, against="base", theirs=0.109)
