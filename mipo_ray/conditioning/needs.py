"""What the conditioning strategies of a run need of its prompts. Pure; nothing here imports ray, torch or vllm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from mipo_ray.conditioning.blocks import rows_per_block
from mipo_ray.conditioning.strategies import STRATEGIES
from mipo_ray.config.conditioning import ConditioningConfig
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.prompts.chat_check import chat_check
from mipo_ray.prompts.check import PromptNeeds, PromptSummary, Watch, check_prompts
from mipo_ray.prompts.clusters import ClusterCounts


def check_training_prompts(config: Config, watches: Sequence[Watch] = ()) -> PromptSummary:
    """`check_prompts` of the training prompts with the needs of every strategy that a row may get, and with the model's
    chat template.

    Raises UserError also when generation.negatives_per_prompt asks for more mismatched prompts than there can be.
    """
    chat = chat_check(config.model.source, config.prompts.chat, config.prompts)
    mismatches = config.preference.mismatches  # else one prompt is enough
    needs = training_needs(config.conditioning) if mismatches else PromptNeeds("none", mismatch=False)
    summary = check_prompts(config.prompts, needs, watches=[chat.watch, *watches])
    if mismatches:
        check_negatives(config, summary.rows, summary.distinct_texts, summary.distinct_contexts)
    return summary


def check_held_out(config: Config, watches: Sequence[Watch] = ()) -> PromptSummary:
    """`check_prompts` of the held-out prompts: answers are compared across them, so there must be several."""
    prompts, section = config.evaluate.prompts, "evaluate.prompts"
    chat = chat_check(config.model.source, config.prompts.chat, prompts, section)
    counts = ClusterCounts()
    found = check_prompts(prompts, held_out_needs(config), section, [chat.watch, counts.watch, *watches])
    summary = replace(found, users=counts.users, questions=counts.questions)
    if summary.rows_with_context and config.evaluate.other_prompts >= summary.distinct_contexts:
        raise UserError(
            f"evaluate.other_prompts: expected at most {summary.distinct_contexts - 1}, one less than the different "
            f"contexts of {config.evaluate.prompts.path}; found {config.evaluate.other_prompts}"
        )
    if config.evaluate.other_prompts >= summary.distinct_texts:
        raise UserError(
            f"evaluate.other_prompts: expected at most {summary.distinct_texts - 1}, one less than the different "
            f"prompts of {config.evaluate.prompts.path}; found {config.evaluate.other_prompts}"
        )
    primary = config.evaluate.primary or ""
    if primary.startswith("context_pmi") and not summary.rows_with_context:
        raise UserError(
            f"evaluate.primary: {primary} expects held-out rows with a context, found none in {summary.rows} rows of "
            f"{prompts.path}"
        )
    return summary


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
