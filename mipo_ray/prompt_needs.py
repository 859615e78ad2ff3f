"""What the conditioning strategies of a run need of its prompts. Pure; nothing here imports ray, torch or vllm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mipo_ray.conditioning import STRATEGIES
from mipo_ray.conditioning_blocks import rows_per_block
from mipo_ray.config import Config
from mipo_ray.config_pairs import ConditioningConfig
from mipo_ray.errors import UserError


@dataclass(frozen=True)
class PromptNeeds:
    """What `prompt_check.check_prompts` asks of prompts beside being readable.

    context: how many rows must have one. mismatch: some row must be able to serve as another one's mismatch.
    other_context: two rows of different groups must have different contexts. strategies: those that need a context,
    for messages. reference: every row must have a reference answer.
    """

    context: Literal["none", "some", "every"] = "none"
    mismatch: bool = False
    other_context: bool = False
    strategies: tuple[str, ...] = ()
    reference: bool = False


def training_needs(conditioning: ConditioningConfig) -> PromptNeeds:
    """What all strategies that a row may get need together; rows without a needed context want a fallback."""
    names = conditioning.strategies
    needing = tuple(name for name in names if STRATEGIES[name].needs_context)
    context: Literal["none", "some", "every"] = "none"
    if needing:
        context = "every" if conditioning.fallback is None else "some"
    return PromptNeeds(
        context,
        mismatch=any(STRATEGIES[name].needs_mismatch for name in names),
        other_context="random_context" in names,
        strategies=needing,
    )


def held_out_needs(config: Config) -> PromptNeeds:
    """Held-out answers are compared across prompts, and across contexts where the strategies work on contexts.

    The pointwise judge compares each with a reference.
    """
    needing = tuple(name for name in config.conditioning.strategies if STRATEGIES[name].needs_context)
    judge = config.evaluate.judge
    reference = judge.is_on and "pointwise" in judge.protocols
    return PromptNeeds("some" if needing else "none", mismatch=True, strategies=needing, reference=reference)


def check_negatives(config: Config, rows: int, distinct_texts: int, distinct_contexts: int) -> None:
    """Raises UserError when generation.negatives_per_prompt (K) asks for more mismatched prompts than there can be.

    K different prompts beside a row's own need K + 1 in every block, and so in the smallest one.
    """
    negatives = config.generation.negatives_per_prompt
    size = rows_per_block(rows, config.conditioning.block_size)
    smallest = rows % size or size
    for name in config.conditioning.strategies:
        if name == "random_context":
            found, what = distinct_contexts, "contexts"
        elif STRATEGIES[name].needs_mismatch:
            found, what = distinct_texts, "prompts"
        else:
            continue
        most = min(found, smallest) - 1
        if negatives > most:
            raise UserError(
                f"generation.negatives_per_prompt: expected at most {most} for strategy {name}, which draws from "
                f"{found} different {what} ({config.prompts.path}) in blocks of {smallest} rows at least "
                f"(conditioning.block_size={config.conditioning.block_size}); found {negatives}"
            )
