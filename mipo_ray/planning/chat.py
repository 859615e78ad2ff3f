"""Checks what tasks and a judge ask by the chat templates that will render it, before anything starts.

The prompts of a run are checked where their rows are read (`conditioning.needs`). Nothing here imports ray, torch,
transformers or vllm.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.config.schema import Config
from mipo_ray.evaluation.tasks.items import read_items
from mipo_ray.evaluation.tasks.task_check import CheckedTask
from mipo_ray.judge.prompts import judge_chat
from mipo_ray.models.chat_template import read_chat_template
from mipo_ray.prompts.chat_check import (
    ROWS_RENDERED,
    ChatCheck,
    check_arguments,
    made_up_messages,
    refuse_control_tokens,
)


def check_chats(config: Config, tasks: Sequence[CheckedTask]) -> None:
    """Raises UserError for a template argument that no template reads, and for a task or a judge whose conversations
    the model's chat template refuses or does not show whole. Templates whose files are not here yet are left out."""
    chat, policy = config.prompts.chat, read_chat_template(config.model.source)
    judge = config.evaluate.judge
    of_judge = read_chat_template(str(judge.model)) if judge.has_own_engines else None
    if policy is not None and (of_judge is not None or not judge.has_own_engines):
        check_arguments([policy] if of_judge is None else [policy, of_judge], chat)
    for task in tasks:
        look = ChatCheck(policy, chat, task.task.prompts, f"evaluate.tasks.{task.key}").look
        items = read_items(task.task, task.files, task.limit)
        for item in items if chat.control_tokens == "refuse" else islice(items, ROWS_RENDERED):
            where = f"{task.path}, item {item.item_id}"
            if task.task.kind != "likelihood":
                look(where, item.messages)
            elif policy is not None and chat.control_tokens == "refuse":  # no chat, but text that is tokenised
                options = [{"role": "option", "content": text} for text in item.option_texts]
                for message in (*item.messages, *options):
                    refuse_control_tokens(where, message, policy.control_tokens)
    if of_judge is not None:
        check = ChatCheck(of_judge, judge_chat(config), PromptsConfig(), "evaluate.judge")
        check.look("evaluate.judge.model", made_up_messages(["user"]))
