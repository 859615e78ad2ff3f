"""From the items of the tasks to what the engines get: token ids, written once for all policies of a run.

Every policy is asked the same requests with the same seeds, so that what differs between two results is the policies.
Prompts that do not fit the window are told here, before any engine starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.evaluation.tasks.task_check import TASK_WINDOW, CheckedTask, task_window
from mipo_ray.generation.engine import REQUESTS
from mipo_ray.generation.rendering import (
    check_length,
    load_tokenizer,
    render_answer,
    render_prompts,
    render_text,
    text_token_ids,
)
from mipo_ray.pairs.schema import TOKEN_IDS
from mipo_ray.prompts.rows import MESSAGES
from mipo_ray.ray_cluster.blocks import map_blocks, named, ordered_context
from mipo_ray.ray_cluster.tables import read_rows, write_rows
from mipo_ray.seeds import stable_seed
from mipo_ray.storage.manifests import TaskDefinition
from mipo_ray.storage.records import read_record, to_text
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.tables.parquet import PAGE_CHECKSUMS, open_table

ITEMS = "base/task_items"
ROWS_PER_TABLE = 256

ITEM_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("item_id", pa.string()),
        ("position", pa.int32()),
        ("messages", MESSAGES),
        ("answer", pa.string()),
        ("option_labels", pa.list_(pa.string())),
        ("option_texts", pa.list_(pa.string())),
        ("question_messages", MESSAGES),
        ("user", pa.string()),
        ("question", pa.string()),
    ]
)
_NOT_ASKED = ("messages", "question_messages")  # of an item, once they are token ids
# What an engine scores: token ids of each option of a likelihood item, after those of its context; of a choice those of
# each option after the conversation, and then of each after the conversation without what is known of the user.
SCORED = pa.list_(pa.struct([("prompt_token_ids", TOKEN_IDS), ("response_token_ids", TOKEN_IDS)]))


def prepare_tasks(config: Config, run: RunDirectory, tasks: Sequence[CheckedTask]) -> None:
    """Writes the requests of every task that has none yet, or those of another definition, below ITEMS.

    The tokenizer and the chat template are those of the initial model. Raises UserError for a prompt that does not fit
    the window, also of requests that an earlier call wrote: the window may have been larger then.
    """
    for task in tasks:
        directory = f"{ITEMS}/{task.name}"
        name = f"{directory}/definition.json"
        written = run.read_text(name)
        if written is not None and read_record(TaskDefinition, written, run.path(name)) == task.definition:
            _check_lengths(task, config, run)
            continue
        run.remove(directory)
        filesystem = run.arrow_filesystem()
        _write_items(task, run, f"{directory}/items.parquet")
        with ordered_context():
            items = read_rows(run.path(directory, "items.parquet"), filesystem)
            requests = map_blocks(items, requests_of, task=task, config=config)
            write_rows(named(requests, f"{task.name}_requests"), run.path(directory, "requests"), filesystem)
        run.write_text(name, to_text(task.definition))
        _check_lengths(task, config, run)


def request_files(run: RunDirectory, name: str) -> list[str]:
    """The files with the requests of a prepared task."""
    return [run.path(ITEMS, name, "requests", file) for file in run.list_files(f"{ITEMS}/{name}/requests")]


def option_token_ids(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of its continuation: their own, without an end token that a tokenizer would add.

    Both are tokenised together and cut where the context alone would end, and spaces at the context's end belong to the
    continuation, as in lm-evaluation-harness: a tokenizer that merges the space into a word finds the word as it was
    trained on.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    context_ids = text_token_ids(tokenizer, kept)
    return context_ids, text_token_ids(tokenizer, kept + continuation)[len(context_ids) :]


def check_options(where: str, texts: Sequence[str], token_ids: Sequence[Sequence[int]]) -> None:
    """Raises UserError where different options of an item, `where` it stands, are the same tokens, or one has none."""
    seen: dict[tuple[int, ...], str] = {}
    for text, ids in zip(texts, token_ids, strict=True):
        if not ids:
            raise UserError(f"{where}: the option {text!r} has no tokens of its own behind its question")
        if (other := seen.setdefault(tuple(ids), text)) != text:
            raise UserError(
                f"{where}: the options {other!r} and {text!r} are the same tokens {list(ids)}: expected different "
                "ones, or both always score the same. The model's tokenizer does not know what tells them apart"
            )


def item_rows(task: CheckedTask) -> Iterator[dict[str, Any]]:
    """The items of a task as rows of ITEM_SCHEMA, as a stream."""
    for position, item in enumerate(task.read()):
        yield {
            "task": task.name,
            "item_id": item.item_id,
            "position": position,
            "messages": item.messages,
            "answer": item.answer,
            "option_labels": item.option_labels,
            "option_texts": item.option_texts,
            "question_messages": item.question_messages,
            "user": item.user,
            "question": item.question,
        }


def _write_items(task: CheckedTask, run: RunDirectory, name: str) -> None:
    """The items as one Parquet file, written as a stream."""
    rows = item_rows(task)
    filesystem = run.arrow_filesystem()
    filesystem.create_dir(run.path(name.rpartition("/")[0]), recursive=True)
    with pyarrow.parquet.ParquetWriter(run.path(name), ITEM_SCHEMA, filesystem=filesystem, **PAGE_CHECKSUMS) as writer:
        while batch := list(islice(rows, ROWS_PER_TABLE)):
            writer.write_table(pa.Table.from_pylist(batch, schema=ITEM_SCHEMA))


def requests_of(block: pa.Table, *, task: CheckedTask, config: Config) -> pa.Table:
    """Adds `key` (unique over all tasks), `prompt` (text as the model sees it), `requests`, `scored` and its lengths.

    A generative item has one request, an item of another kind none, but something to score for each of its options.
    `context_tokens` and `answer_tokens` are those of its longest request or option, the answer at its limit.
    """
    tokenizer = load_tokenizer(config.model.source, config.model.trust_remote_code)
    rows = block.to_pylist()
    render = {"generative": _sampled, "likelihood": _scored, "choice": _answered}[task.task.kind]
    prompts, requests, scored, longest = [], [], [], []
    for row in rows:
        prompt, asked, options = render(row, task, config, tokenizer)
        # The engine scores while it generates: one token more.
        needs = [(len(option["prompt_token_ids"]), len(option["response_token_ids"]) + 1) for option in options]
        if task.sampling is not None:
            needs += [(len(request["prompt_token_ids"]), task.sampling.max_tokens) for request in asked]
        longest.append(max(needs, key=sum))
        prompts.append(prompt)
        requests.append(asked)
        scored.append(options)
    columns = {
        "key": pa.array([f"{row['task']}/{row['item_id']}" for row in rows], pa.string()),
        "prompt": pa.array(prompts, pa.string()),
        "requests": pa.array(requests, REQUESTS),
        "scored": pa.array(scored, SCORED),
        "context_tokens": pa.array([context for context, _ in longest], pa.int32()),
        "answer_tokens": pa.array([answer for _, answer in longest], pa.int32()),
    }
    kept = {name: block[name] for name in block.column_names if name not in _NOT_ASKED}
    return pa.table({**kept, **columns})


def _sampled(row: dict[str, Any], task: CheckedTask, config: Config, tokenizer: Any) -> tuple[str, list, list]:
    assert task.sampling is not None
    messages = [dict(message) for message in row["messages"]]
    (token_ids,) = render_prompts(tokenizer, [messages], config.prompts.chat)
    seed = stable_seed(config.seed, "task", task.name, row["item_id"]) % 2**31
    request = {"prompt_token_ids": token_ids, "seed": seed, "sampling": task.name}
    return render_text(tokenizer, messages, config.prompts.chat), [request], []


def _scored(row: dict[str, Any], task: CheckedTask, config: Config, tokenizer: Any) -> tuple[str, list, list]:
    context = row["messages"][-1]["content"]
    texts = row["option_labels"] if task.task.continuation == "label" else row["option_texts"]
    options = []
    for text in texts:
        context_ids, option_ids = option_token_ids(tokenizer, context, f" {text}")
        options.append({"prompt_token_ids": context_ids, "response_token_ids": option_ids})
    where = f"{task.path}, item {row['item_id']!r} of task {task.name}"
    check_options(where, texts, [option["response_token_ids"] for option in options])
    return context, [], options


def _answered(row: dict[str, Any], task: CheckedTask, config: Config, tokenizer: Any) -> tuple[str, list, list]:
    asked = [[dict(message) for message in row[name]] for name in _NOT_ASKED]
    texts, chat = row["option_texts"], config.prompts.chat
    pairs = [render_answer(tokenizer, messages, text, chat) for messages in asked for text in texts]
    options = [{"prompt_token_ids": prompt, "response_token_ids": answer} for prompt, answer in pairs]
    where = f"{task.path}, item {row['item_id']!r} of task {task.name}"
    check_options(where, texts, [option["response_token_ids"] for option in options[: len(texts)]])
    return render_text(tokenizer, asked[0], chat), [], options


def _check_lengths(task: CheckedTask, config: Config, run: RunDirectory) -> None:
    """Raises UserError when the longest item of a prepared task does not fit the window."""
    path = run.path(ITEMS, task.name, "requests")
    columns = ["item_id", "context_tokens", "answer_tokens"]
    lengths = open_table(path, run.arrow_filesystem(), columns).to_table(columns=columns).to_pylist()
    longest = max(lengths, key=lambda row: row["context_tokens"] + row["answer_tokens"])
    hint = ", or lower the task's max_tokens; items of a task are never dropped" if task.sampling is not None else ""
    check_length(
        f"{task.name}/{longest['item_id']}",
        range(longest["context_tokens"]),
        max_tokens=longest["answer_tokens"],
        max_model_len=task_window(config),
        field=TASK_WINDOW,
        hint=hint,
    )
