"""Several answers to one prompt, compared by the judge two by two: what it is asked, and what that makes of each. Pure.

Every two answers are shown in both orders, as those of two policies are (`evaluation.judge.scores`): an answer wins
against another only where the judge prefers it both times, so that a judge that always prefers what stands first says
nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from mipo_ray.judge.prompts import JudgePrompt, pairwise_prompt
from mipo_ray.judge.verdicts import pairwise_verdict
from mipo_ray.prompts.rows import PromptRow


def comparison_prompts(prompt: JudgePrompt, row: PromptRow, answers: Sequence[str]) -> list[str]:
    """What the judge is asked about the answers to a prompt row: n (n - 1) prompts, each two answers one after the
    other in both orders."""
    return [pairwise_prompt(prompt, row, shown) for shown in itertools.permutations(answers, 2)]


def net_wins(judgements: Sequence[str], answers: int) -> list[float | None]:
    """For each of so many answers how many others it wins against, less how many it loses against.

    judgements: what the judge said to `comparison_prompts`, in their order. None for all where it said nothing that can
    be read. Raises ValueError for another number of judgements.
    """
    verdicts = dict(
        zip(itertools.permutations(range(answers), 2), map(pairwise_verdict, judgements), strict=True),
    )
    if not any(verdicts.values()):
        return [None] * answers
    wins = [0.0] * answers
    for one, other in itertools.combinations(range(answers), 2):
        both = verdicts[one, other], verdicts[other, one]
        if both in (("first", "second"), ("second", "first")):
            winner, loser = (one, other) if both[0] == "first" else (other, one)
            wins[winner] += 1
            wins[loser] -= 1
    return list(wins)
