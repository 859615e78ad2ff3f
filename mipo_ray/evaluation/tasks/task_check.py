"""Checks the accuracy tasks of a run before anything starts: task files, every row of their data, what is finished.

Nothing here imports ray, torch or vllm.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace

from mipo_ray.config.generation import SamplingConfig
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.evaluation.tasks.items import Item, read_items
from mipo_ray.evaluation.tasks.task import Task, load_task
from mipo_ray.models.hub import hub_file
from mipo_ray.prompts.files import PromptFile, find_files
from mipo_ray.storage.manifests import TaskDefinition, TaskFacts
from mipo_ray.storage.rounds import base_and_rounds
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.text.final_answers import RULES

TASK_WINDOW = "evaluate.task_max_model_len"
SAMPLED = "tasks_sampled"  # where the rows of unfinished tasks are kept, beside the stage's `tasks`


@dataclass(frozen=True)
class CheckedTask:
    """A task whose data was read once.

    key: what `evaluate.tasks` names it by: its name, or the path of its file. path: the data that the run measures on.
    items: how many; items_hash: 12 hex digits of what they ask and what is right, in order. characters: those that an
    engine reads: every message and, of a likelihood, each option after it; of a choice each after both prompts.
    """

    key: str
    task: Task
    path: str
    limit: int | None
    sampling: SamplingConfig | None
    files: tuple[PromptFile, ...]
    items: int
    items_hash: str
    characters: int

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def definition(self) -> TaskDefinition:
        """What a result was measured by; results of different definitions are not compared."""
        extraction, on_hub = self.task.extraction, hub_file(self.path)
        return TaskDefinition(
            kind=self.task.kind,
            version=self.task.version,
            prompt_hash=self.task.prompt_hash,
            data=self.path if on_hub is None else replace(on_hub, revision=None).url,
            limit=self.limit,
            items=self.items,
            items_hash=self.items_hash,
            sampling=None if self.sampling is None else self.sampling.model_dump(mode="json"),
            extraction=None if extraction is None else f"{extraction}, rules {RULES}",
            metric=self.task.metric,
        )

    def read(self) -> Iterator[Item]:
        """The items, as a stream; raises UserError when there are other ones than when they were checked."""
        digest, count = hashlib.sha256(), 0
        for item in read_items(self.task, self.files, self.limit):
            count += 1
            digest.update(_line(item))
            yield item
        if (found := digest.hexdigest()[:12]) != self.items_hash:
            raise UserError(
                f"evaluate.tasks.{self.key}: {self.path} changed since it was checked: had {self.items} items (hash "
                f"{self.items_hash}), found {count} ({found})"
            )


Watch = Callable[[Task, SamplingConfig | None, Item], None]


def check_tasks(config: Config, watch: Watch | None = None) -> tuple[CheckedTask, ...]:
    """Every task of `evaluate.tasks`, its data read once. Raises UserError for what a user must mend.

    watch: called with each item, its task and how its responses are sampled.
    """
    checked: dict[str, CheckedTask] = {}
    for key in config.evaluate.tasks:
        task = load_task(key)
        if task.name in checked:
            raise UserError(f"evaluate.tasks: {key}: another task is named {task.name!r}, too; give one another name")
        checked[task.name] = _check(config, key, task, watch)
    return tuple(checked.values())


def check_finished_tasks(tasks: Sequence[CheckedTask], run: RunDirectory, rounds: Sequence[int]) -> None:
    """Raises UserError, with the difference, where finished results were measured by another definition."""
    for task in tasks:
        for round in base_and_rounds(rounds):
            stage = run.stage(round, f"tasks/{task.name}")
            manifest = run.read_manifest(stage, TaskFacts)
            if manifest is None:
                continue
            # Earlier results have their metric beside the definition alone.
            before = manifest.facts.definition
            before = replace(before, metric=before.metric or manifest.facts.evaluation.metric)
            if changes := differences(before, task.definition):
                raise UserError(
                    f"evaluate.tasks.{task.key}: {run.path(stage)} holds results of another definition. Set these "
                    "back, or remove that directory and those of the other policies to measure again:\n"
                    + "\n".join(changes)
                )


def task_window(config: Config) -> int:
    """The window of the engines that measure tasks, in tokens.

    No part of a definition: nothing is measured unless every item fits (task_requests), and then it changes no result.
    """
    return config.evaluate.task_max_model_len or config.model.max_model_len


def differences(before: TaskDefinition, after: TaskDefinition) -> list[str]:
    """One line for each part that is not the same in `before`."""
    lines = []
    for part in fields(after):
        there, now = getattr(before, part.name), getattr(after, part.name)
        # Without a limit all items are measured; any other part is None where an earlier version did not record it.
        recorded = repr(there) if there is not None or part.name == "limit" else "not recorded"
        lines += [] if there == now else [f"  {part.name}: {recorded} there, {now!r} now"]
    return lines


def _check(config: Config, key: str, task: Task, watch: Watch | None) -> CheckedTask:
    settings = config.evaluate.tasks[key]
    path = settings.path or task.path
    sampling = task.sampling
    if settings.max_tokens is not None:
        if sampling is None:
            raise UserError(f"evaluate.tasks.{key}.max_tokens: a task of kind {task.kind} samples nothing")
        sampling = sampling.model_copy(update={"max_tokens": settings.max_tokens})
    window = task_window(config)
    if sampling is not None and sampling.max_tokens >= window:
        raise UserError(
            f"evaluate.tasks.{key}: responses of up to {sampling.max_tokens} tokens leave no room for a prompt "
            f"in the window of {window} tokens: raise {TASK_WINDOW}, or set "
            + _with_max_tokens(config, key, window // 2)
        )
    files = find_files(path, f"evaluate.tasks.{key}.path")
    digest, count, characters = hashlib.sha256(), 0, 0
    seen: set[str] = set()
    for item in read_items(task, files, settings.limit):
        if item.item_id in seen:
            raise UserError(f"{path}: expected unique ids in column {task.id_column!r}, found {item.item_id!r} twice")
        seen.add(item.item_id)
        count += 1
        options = [""] if task.kind == "generative" else item.option_texts
        for messages in (item.messages, item.question_messages) if task.kind == "choice" else (item.messages,):
            prompt = sum(len(message["content"]) for message in messages)
            characters += sum(prompt + (1 if task.continuation == "label" else len(option)) for option in options)
        digest.update(_line(item))
        if watch is not None:
            watch(task, sampling, item)
    if not count:
        raise UserError(f"evaluate.tasks.{key}: {path}: expected items, found no row")
    return CheckedTask(key, task, path, settings.limit, sampling, files, count, digest.hexdigest()[:12], characters)


def _with_max_tokens(config: Config, key: str, tokens: int) -> str:
    """The override, as a shell takes it, that lowers one task's max_tokens and leaves all else in `evaluate.tasks`.

    It gives every task: `evaluate.tasks.KEY.max_tokens` cannot be set where the tasks are a list, or the key a path.
    """
    tasks = {name: settings.model_dump(exclude_none=True) for name, settings in config.evaluate.tasks.items()}
    tasks[key]["max_tokens"] = tokens
    return shlex.quote(f"evaluate.tasks={json.dumps(tasks, ensure_ascii=False)}")


def _line(item: Item) -> bytes:
    # The last message is the item's own; exemplars and the system message are in the prompt hash.
    own = {**asdict(item), "messages": item.messages[-1:]}
    for name in ("where", "question_messages", "user", "question"):
        del own[name]  # the same items in another file are the same, and the rest follows from what is kept
    return json.dumps(own, sort_keys=True).encode() + b"\n"
