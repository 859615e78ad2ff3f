"""The rewards of sampled responses, as one step of the generate stage: by a function of the user's, by a judge, or by
the pointwise mutual information of each with its prompt."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from typing import Any

import pyarrow as pa
import ray.data
from pydantic import SecretStr

from mipo_ray.config.judge import JudgeConfig
from mipo_ray.config.schema import Config
from mipo_ray.judge.comparisons import comparison_prompts, net_wins
from mipo_ray.judge.endpoint import EndpointJudge, endpoint_key, map_endpoint
from mipo_ray.judge.prompts import JudgePrompt, judge_prompt
from mipo_ray.monitoring.events import Events
from mipo_ray.pairs.preferences import REWARDS, pmi_of_responses
from mipo_ray.pairs.reward_function import load_reward_function
from mipo_ray.ray_cluster.blocks import map_blocks
from mipo_ray.text.thoughts import answer_of

# What the judge sees of a block: its columns of a prompt row.
_OF_PROMPT = ("prompt_id", "question_messages", "context", "dropped", "responses")


def chosen_by(config: Config) -> str | None:
    """What decides which of a prompt's responses is chosen, in words that change where it may choose otherwise: the
    function and the text of its module, or the judge and its prompt. None: by what they were sampled under."""
    if config.preference.function is not None:
        function = load_reward_function(config.preference.function)
        return f"function {function.name}, whose module has the hash {function.source}"
    if config.preference.chooser == "judge":
        judge = config.evaluate.judge
        return f"judge {judge.model}, whose prompt has the hash {judge_prompt(judge, 'pairwise').hash}"
    if config.preference.chooser == "pmi":
        return "pointwise mutual information with the prompt"
    return None


def add_rewards(sampled: ray.data.Dataset, config: Config, events: Events) -> ray.data.Dataset:
    """Adds `rewards` (REWARDS) to blocks that hold `responses`; lazy. A block stays a block.

    The execution raises UserError for what a reward function raises or returns beside numbers, and where the judge's
    server refuses a request.
    """
    if config.preference.function is not None:
        return map_blocks(sampled, function_rewards, name=config.preference.function)
    if config.preference.chooser == "pmi":
        return map_blocks(sampled, pmi_rewards)
    judge = config.evaluate.judge
    compared = config.preference.samples * (config.preference.samples - 1)
    arguments = (judge, endpoint_key(judge), events, judge_prompt(judge, "pairwise"))
    return map_endpoint(sampled, JudgedRewards, arguments, judge, config.conditioning.block_size * compared)


def function_rewards(block: pa.Table, *, name: str) -> pa.Table:
    """A block with `rewards`, by the reward function MODULE:NAME, which a process makes once."""
    return _with_rewards(block, _loaded(name).rewards(block.to_pylist()))


def pmi_rewards(block: pa.Table) -> pa.Table:
    """A block of scored responses with `rewards`: the PMI of each response with its prompt, nats."""
    return _with_rewards(block, pmi_of_responses(block))


class JudgedRewards:
    """A Ray Data actor: adds `rewards` to blocks of responses, each one's net wins against the others to its prompt."""

    def __init__(self, judge: JudgeConfig, key: SecretStr, events: Events, prompt: JudgePrompt):
        self._judge = EndpointJudge(judge, key, events)
        self._prompt = prompt

    async def __call__(self, block: pa.Table) -> AsyncIterator[pa.Table]:
        """Yields the block once. Raises UserError when the server refuses a request."""
        rows = block.select(_OF_PROMPT).to_pylist()
        asked = [self._comparisons(row) for row in rows]
        said = iter(
            await self._judge.texts(
                [
                    {"prompt_id": row["prompt_id"], "prompt": prompt}
                    for row, prompts in zip(rows, asked, strict=True)
                    for prompt in prompts
                ]
            )
        )
        rewards = [
            net_wins([next(said) for _ in prompts], len(row["responses"]))
            for row, prompts in zip(rows, asked, strict=True)
        ]
        yield _with_rewards(block, rewards)

    def _comparisons(self, row: Any) -> list[str]:
        return comparison_prompts(self._prompt, row, [answer_of(response["text"]) for response in row["responses"]])


def _with_rewards(block: pa.Table, rewards: list[list[float | None]]) -> pa.Table:
    return block.append_column("rewards", pa.array(rewards, REWARDS))


_loaded = functools.cache(load_reward_function)
