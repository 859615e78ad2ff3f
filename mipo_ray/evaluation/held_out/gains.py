"""Where a PMI's gain sits: which users, which questions, and answers of which length gained or lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mipo_ray.errors import cut
from mipo_ray.evaluation.held_out.metrics import MeasuredRows, scored_answers
from mipo_ray.evaluation.intervals import bootstrap_mean, group_means
from mipo_ray.evaluation.resampling import Clusters
from mipo_ray.evaluation.significance import item_changes
from mipo_ray.measures import PRIMARY
from mipo_ray.storage.gains import GainGroup, Gains, GainsBy

SHOWN_EACH_WAY = 10
_LABEL = 200  # characters
_QUARTERS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Labels:
    """What people call a held-out prompt's user ("" where it names nobody) and question, by prompt."""

    users: Mapping[str, str]
    questions: Mapping[str, str]


@dataclass(frozen=True)
class _Changes:
    """By prompt: the change of the PMI and of the length from the base to the policy."""

    pmi: Mapping[str, float]
    longer: Mapping[str, float]
    clusters: Clusters
    samples: int
    seed: int

    def group(self, label: str, prompts: Sequence[str]) -> GainGroup:
        values = [self.pmi[prompt] for prompt in prompts]
        found = bootstrap_mean(values, prompts, samples=self.samples, seed=self.seed, clusters=self.clusters)
        several = len(prompts) > 1
        return GainGroup(
            label=cut(label, _LABEL),
            n=len(prompts),
            change=found.value,
            low=found.low if several else None,
            high=found.high if several else None,
            longer=float(np.mean([self.longer[prompt] for prompt in prompts])),
        )


def where_gained(rows: MeasuredRows, base: MeasuredRows, labels: Labels, *, samples: int, seed: int) -> Gains | None:
    """The changes of context PMI, or of leave-one-out PMI where no row has a context, by the initial model.

    A change is that of a prompt, the mean over its answers. `samples` and `seed` are the bootstrap's; of a single user
    the questions are resampled, and the other way round. None where nobody knows the prompts' questions.
    """
    clusters = rows.clusters
    after, before = scored_answers(rows), scored_answers(base)
    kind = "context_pmi" if "context_pmi" in after else "pmi"
    if clusters is None or kind not in before:
        return None
    new, old = after[kind], before[kind]
    changes = _Changes(
        item_changes((old.pmi, old.prompts), (new.pmi, new.prompts)),
        item_changes((old.lengths, old.prompts), (new.lengths, new.prompts)),
        clusters,
        samples,
        seed,
    )
    by = {}
    if clusters.users is not None:
        by["users"] = _by_cluster(changes, clusters.users, labels.users)
    by["questions"] = _by_cluster(changes, clusters.questions, labels.questions)
    names, lengths = group_means(old.lengths, old.prompts)
    of_base = dict(zip(names.tolist(), lengths.tolist(), strict=True))
    # Of both: by the base's alone, whose short answers are short in part by chance, they would grow by that chance.
    of_both = {prompt: of_base[prompt] + longer / 2 for prompt, longer in changes.longer.items()}
    by["lengths"] = _by_length(changes, of_both)
    return Gains(measure=PRIMARY[0] if kind == "context_pmi" else PRIMARY[1], by=by)


def _by_cluster(changes: _Changes, clusters: Mapping[str, str], labels: Mapping[str, str]) -> GainsBy:
    """The groups of prompts of one cluster; prompts that name none are left out."""
    members: dict[str, list[str]] = {}
    for prompt in changes.pmi:
        if clusters[prompt]:
            members.setdefault(clusters[prompt], []).append(prompt)
    gain = {name: float(np.mean([changes.pmi[prompt] for prompt in prompts])) for name, prompts in members.items()}
    ranked = sorted(gain, key=lambda name: -gain[name])
    if len(ranked) > 2 * SHOWN_EACH_WAY:
        ranked = ranked[:SHOWN_EACH_WAY] + ranked[-SHOWN_EACH_WAY:]
    return GainsBy(
        count=len(gain),
        gained=sum(value > 0 for value in gain.values()),
        groups=[changes.group(labels[members[name][0]], members[name]) for name in ranked],
    )


def _by_length(changes: _Changes, lengths: Mapping[str, float]) -> GainsBy:
    """Four groups of about as many prompts each, by the mean length of the base's and the policy's answers; fewer where
    many agree."""
    edges = np.unique(np.quantile(list(lengths.values()), _QUARTERS))
    members: dict[int, list[str]] = {}
    for prompt, length in lengths.items():
        members.setdefault(int(np.searchsorted(edges, length)), []).append(prompt)
    groups = []
    for _, prompts in sorted(members.items()):
        ends = [f"{end:.6g}" for end in (min(lengths[one] for one in prompts), max(lengths[one] for one in prompts))]
        groups.append(changes.group(" to ".join(dict.fromkeys(ends)), prompts))
    return GainsBy(count=len(groups), gained=sum(group.change > 0 for group in groups), groups=groups)
