"""One run of two rounds that the tests of the loop, tasks, judges and metrics read.

It has tasks, a tracker, a judge behind the fake endpoint and LoRA; SIGTERM stops it in generation, SIGKILL ends it in
training and Ctrl-C at the end of training, and the same command takes it to its end. Round 0 trains when its pairs are
all there, round 1 streams.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mipo_ray.monitoring.metrics import ascii_label, run_label
from tests.helpers.engine_processes import wait_until_nothing_is_left
from tests.helpers.fake_judge_endpoint import MODEL, FakeJudgeEndpoint
from tests.helpers.runs import TOPICS, arguments, events, kill_when, snapshot, start, stop_when

HELD_OUT = 6
SAMPLES = 3
# What names did wrong, one by one: a column of the path, a pattern, what a URL or a shell would read, other scripts.
NAME = 'context=none/übung 中 100% #1 [ab] *it\'s* "so"'
PROMPTS = 64
RESPONSES = 2  # matched ones of each prompt, and mismatched ones
SUMS = 24
CHOICES = 18
ANSWERS = 4  # of the choice task: one question, four users
JUDGE_KEY = "sk-of-this-test-1234567890"

Snapshot = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Interruptions:
    """What lay in the run directory when the run was stopped or killed."""

    files_after_sigterm: frozenset[str]  # in generation, names in the run directory
    committed_pairs: Snapshot  # files of pairs that were committed by then
    files_after_sigkill: frozenset[str]  # in training
    generated: Snapshot  # the generate stage when training was killed
    trained: Snapshot  # the train stage when Ctrl-C came


@dataclass(frozen=True)
class GoldenRun:
    """A finished run. Tests must not change its directory: `copy` makes one of their own."""

    directory: Path
    data: Path  # folder of the recipe, the prompts and the rows of tasks
    options: tuple[str, ...]  # the arguments of the run but for run_dir and the judge's, the recipe first
    judge_options: tuple[str, ...]
    output: str  # of its last process
    metrics: str  # what Ray's endpoint showed when the run had ended
    judge: FakeJudgeEndpoint  # still answers
    interruptions: Interruptions

    def copy(self, place: Path) -> Path:
        """A copy that no judge has judged, or was to."""
        shutil.copytree(self.directory, place, ignore=shutil.ignore_patterns("judge"))
        config = yaml.safe_load((place / "config.yaml").read_text())
        del config["evaluate"]["judge"]
        (place / "config.yaml").write_text(yaml.safe_dump(config))
        return place


@dataclass(frozen=True)
class Place:
    """Where the golden run is made: the cluster, its metrics, the model and the judge."""

    address: str
    metrics_url: str
    model: Path
    judge: FakeJudgeEndpoint


def make_golden_run(directory: Path, place: Place) -> GoldenRun:
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
        place.model,
        data,
        f"evaluate.samples_per_prompt={SAMPLES}",
        f"generation.samples_per_prompt={RESPONSES}",
        f"generation.negatives_per_prompt={RESPONSES}",
        "generation.sampling.max_tokens=48",
        "generation.sampling.min_tokens=32",
        "generation.pool.batches_in_flight=1",  # slow enough to be stopped halfway
        "train.batch_size=16",
        "train.lora.rank=4",  # merged, or round 1 could not sample from round 0's policy
        "trackers=[tensorboard]",
        task_option(data),
    )

    judge_options = (
        f"evaluate.judge.model={MODEL}",
        f"evaluate.judge.endpoint={place.judge.url}",
        "evaluate.judge.protocols=[pairwise, pointwise]",
        "evaluate.judge.api_key_variable=JUDGE_KEY",
    )

    def begin(*schedule: str) -> subprocess.Popen[str]:
        words = (recipe, f"run_dir={run_dir}", *options, *judge_options, *schedule)
        return start(place.address, *words, environment={"JUDGE_KEY": JUDGE_KEY})

    try:
        interruptions = interrupt(begin, run_dir)
        process = begin("schedule=streaming")  # round 0 is trained by then, round 1 not begun
        output, _ = process.communicate(timeout=800)
        assert process.returncode == 0, output
        wait_until_nothing_is_left()
    except AssertionError as error:
        pytest.fail(f"the golden run failed in {stage_of_the_end(run_dir)}:\n{error}")
    return GoldenRun(
        run_dir,
        data,
        (recipe, *options),
        judge_options,
        output,
        metrics_of(place.metrics_url, run_dir),
        place.judge,
        interruptions,
    )


def interrupt(begin: Callable[[], subprocess.Popen[str]], run_dir: Path) -> Interruptions:
    """Three processes of the run, of which none comes to its end; of each its engines are gone in time."""
    generate, train = run_dir / "rounds/000/generate", run_dir / "rounds/000/train"

    stop_when(begin(), signal.SIGTERM, lambda: len(list(generate.glob("*.parquet"))) > 2)
    wait_until_nothing_is_left()
    committed = {path.stem for path in (generate / "checkpoint").glob("*.parquet") if "pending" not in path.name}
    files_after_sigterm = frozenset(snapshot(run_dir))
    committed_pairs = {
        name: state for name, state in snapshot(generate).items() if any(name.startswith(stem) for stem in committed)
    }

    kill_when(begin(), lambda: (train / "ray_train").exists())
    wait_until_nothing_is_left()
    files_after_sigkill, generated = frozenset(snapshot(run_dir)), snapshot(generate)

    stop_when(begin(), signal.SIGINT, lambda: (train / "manifest.json").exists())
    wait_until_nothing_is_left()
    return Interruptions(files_after_sigterm, committed_pairs, files_after_sigkill, generated, snapshot(train))


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
    """Rows of two tasks: SVAMP's columns with a task file of its own, and ARC's (three labels, some numeric). A third
    one, a choice, has bundled rows."""
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
        f"arc_easy_likelihood: {{path: {data}/choices.jsonl}}, preference_choice: {{limit: {ANSWERS}}}}}"
    )
