"""One run of two rounds, with tasks and a tracker, that the tests of the loop, tasks, judges and metrics read."""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from mipo_ray.monitoring.metrics import ascii_label, run_label
from tests.helpers.runs import TOPICS, arguments, events, start

HELD_OUT = 6
SAMPLES = 3
# What names did wrong, one by one: a column of the path, a pattern, what a URL or a shell would read, other scripts.
NAME = 'context=none/übung 中 100% #1 [ab] *it\'s* "so"'
PROMPTS = 40
SUMS = 24
CHOICES = 18


@dataclass(frozen=True)
class GoldenRun:
    """A finished run. Tests must not change its directory: `copy` makes one of their own."""

    directory: Path
    data: Path  # folder of the recipe, the prompts and the rows of tasks
    options: tuple[str, ...]  # the arguments of the run but for run_dir, the recipe first
    output: str
    metrics: str  # what Ray's endpoint showed when the run had ended

    def copy(self, place: Path) -> Path:
        return Path(shutil.copytree(self.directory, place))


def make_golden_run(directory: Path, model: Path, address: str, metrics_url: str) -> GoldenRun:
    """Makes the run with the tiny model; fails with the stage that failed."""
    data = directory / "data"
    data.mkdir()
    (data / "recipe.yaml").write_text("{}")  # the defaults, not the demo
    write_prompts_with_references(data / "train.jsonl", "train", PROMPTS)
    write_prompts_with_references(data / "held_out.jsonl", "held-out", HELD_OUT)
    write_task_rows(data)
    run_dir = directory / NAME
    recipe, _, *options = arguments(
        run_dir,
        model,
        data,
        f"evaluate.samples_per_prompt={SAMPLES}",
        "trackers=[tensorboard]",
        task_option(data),
    )
    process = start(address, recipe, f"run_dir={run_dir}", *options)
    output, _ = process.communicate(timeout=800)
    if process.returncode != 0:
        pytest.fail(f"the golden run failed in {stage_of_the_end(run_dir)}:\n{output}")
    return GoldenRun(run_dir, data, (recipe, *options), output, metrics_of(metrics_url, run_dir))


def stage_of_the_end(run_dir: Path) -> str:
    """The stage that began last and did not end."""
    open_stages: list[str] = []
    for event in events(run_dir):
        name = f"stage {event.get('stage')} of round {event.get('round')}"
        if event["event"] == "stage_start":
            open_stages.append(name)
        elif event["event"] == "stage" and name in open_stages:
            open_stages.remove(name)
    return open_stages[-1] if open_stages else "no stage: before the first or between two"


def prometheus_label(run_dir: Path) -> str:
    """The label `run` as Prometheus's text format writes it."""
    return ascii_label(run_label(str(run_dir))).replace("\\", "\\\\").replace('"', '\\"')


def metrics_of(url: str, run_dir: Path) -> str:
    """What Ray's endpoint shows once the last numbers of the run have reached it: at most a minute after."""
    deadline = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(url, timeout=60) as answer:
            text: str = answer.read().decode()
        lines = [line for line in text.splitlines() if line.startswith("ray_mipo_held_out_reward_margin_nats{")]
        own = f'run="{prometheus_label(run_dir)}"'
        if any(own in line and 'round="1"' in line for line in lines) or time.monotonic() > deadline:
            return text
        time.sleep(1)


def write_prompts_with_references(path: Path, prefix: str, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            row = {
                "prompt_id": f"{prefix}-{index}",
                "prompt": f"Question {index}: what should I know about {TOPICS[index % len(TOPICS)]}?",
                "context": f"I am user {index} of {prefix} and I like {TOPICS[(index + 3) % len(TOPICS)]}.",
                "group": f"{prefix}-user-{index}",
                "reference": f"All about {TOPICS[index % len(TOPICS)]}.",
            }
            file.write(json.dumps(row) + "\n")


def write_task_rows(directory: Path) -> None:
    """Rows of two tasks: SVAMP's columns with a task file of its own, and ARC's (three labels, some numeric)."""
    sums = [
        {"ID": f"s{i}", "Body": f"Dan has {i} pens.", "Question": "How many?", "Answer": float(i)} for i in range(SUMS)
    ]
    (directory / "sums.json").write_text(json.dumps(sums))
    choices = [
        {
            "id": f"c{i}",
            "question": f"What is number {i}?",
            "choices": ["bread", "a long river", "tea"],
            "labels": ["1", "2", "3"] if i % 3 else ["A", "B", "C"],
            "answerKey": "2" if i % 3 else "B",
        }
        for i in range(CHOICES)
    ]
    (directory / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    (directory / "short_svamp.yaml").write_text(
        """
name: short_svamp
version: 3
kind: generative
path: nowhere
id_column: ID
answer_column: Answer
question_template: "{{ Body }} {{ Question }}"
sampling: {temperature: 0, max_tokens: 12}
extraction: number
"""
    )


def task_option(data: Path) -> str:
    return (
        f"evaluate.tasks={{{data}/short_svamp.yaml: {{path: {data}/sums.json}}, "
        f"arc_easy_likelihood: {{path: {data}/choices.jsonl}}}}"
    )
