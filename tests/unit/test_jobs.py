"""The recipes under jobs/: every one passes the dry run, over local stand-ins for what a hub serves.

The stand-ins have the published file names and columns; rows and weights are made up. The recipes are not changed for
it: `hf://` is a filesystem of this test, and the models lie in a hub cache that is used offline.

python -m pytest tests/unit/test_jobs.py
"""

from __future__ import annotations

import io
import itertools
import json
import operator
import re
import shlex
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from safetensors.numpy import save_file

from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.config.recipe import load_config, result_fields
from mipo_ray.models.source import local_model_directory
from mipo_ray.prompts.files import find_files
from mipo_ray.prompts.public_sets import row_reader
from mipo_ray.prompts.rows import PromptRow, normalize_row
from mipo_ray.run import main
from mipo_ray.text.final_answers import same_final_answer
from tests.helpers.fake_hub import serve_hub
from tests.helpers.tiny_model import CHAT_TEMPLATE

JOBS = Path(__file__).parents[2] / "jobs"

MODELS = {
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
}
# Of each task: strategy, temperature, top-p, and the stand-ins' rows for training and held out.
TASKS = {
    "prism-missing-context": ("missing_context", 0.1, 0.9, 33, 60),
    "prism-random-context": ("random_context", 0.1, 0.9, 33, 60),
    "gsm8k": ("random_prompt", 0.1, 0.9, 17, 16),
    "svamp": ("random_prompt", 0.1, 0.9, 19, 18),
    "arc-easy": ("random_prompt", 1.0, 0.9, 21, 20),
    "arc-challenge": ("random_prompt", 1.0, 0.9, 23, 22),
    "mmlu": ("random_prompt", 1.0, 0.9, 25, 24),
    "instructions": ("random_prompt", 0.7, 0.9, 27, 64),
}
ACCURACY_TASKS = {
    "gsm8k": ["gsm8k"],
    "svamp": ["svamp"],
    "arc-easy": ["arc_easy", "arc_easy_likelihood"],
    "arc-challenge": ["arc_challenge", "arc_challenge_likelihood"],
    "mmlu": ["mmlu", "mmlu_likelihood"],
}
# The commits that recipes and tasks name; at another one these stand-ins are not found.
COMMITS = {
    "openai/gsm8k": "e53f048856ff4f594e959d75785d2c2d37b678ee",
    "allenai/ai2_arc": "210d026faf9955653af8916fad021475a3f00453",
    "cais/mmlu": "c30699e8356da336a370243923dbaf21066bb9fe",
    "ChilleD/SVAMP": "5e0bf1e5e7c0e9c4bc39180d224f41f3f801b7ef",
    "tatsu-lab/alpaca": "dce01c9b08f87459cf36a430d809084718273017",
    "HannahRoseKirk/prism-alignment": "18ab5cfb37456f4ec8cbc00212ce54cf7b1239f6",
}
PAPER = [f"{task}-{model}" for task, model in itertools.product(TASKS, MODELS)]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def gsm8k(first: int, count: int) -> bytes:
    rows = range(first, first + count)
    return parquet([{"question": f"{i} apples and 2?", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}"} for i in rows])


def svamp(first: int, count: int) -> bytes:
    return parquet(
        [
            {
                "ID": f"chal-{i}",
                "Body": f"Dan has {i} pens.",
                "Question": "How many pens?",
                "Equation": f"( {i}.0 + 0.0 )",
                "Answer": str(i),
                "Type": "Addition",
                "question_concat": f"Dan has {i} pens. How many pens?",
            }
            for i in range(first, first + count)
        ]
    )


def arc(first: int, count: int) -> bytes:
    def labels(i: int) -> list[str]:
        return ["1", "2", "3"] if i % 5 == 0 else ["A", "B", "C"]

    return parquet(
        [
            {
                "id": f"Mercury_{i}",
                "question": f"Which one is {i}?",
                "choices": {"text": [f"{i}", "none", "all"], "label": labels(i)},
                "answerKey": labels(i)[0],
            }
            for i in range(first, first + count)
        ]
    )


def mmlu(first: int, count: int) -> bytes:
    return parquet(
        [
            {"question": f"Which one is {i}?", "subject": "anatomy", "choices": [f"{i}", "none", "all"], "answer": 0}
            for i in range(first, first + count)
        ]
    )


def alpaca(count: int) -> bytes:
    return parquet(
        [
            {
                "instruction": f"Say it {i} times.",
                "input": "" if i % 2 else f"word {i}",
                "output": "It.",
                "text": "Below is an instruction.",
            }
            for i in range(count)
        ]
    )


def prism_survey(users: int) -> bytes:
    sliders = ["values", "creativity", "fluency", "factuality", "diversity", "safety", "personalisation", "helpfulness"]
    return jsonl(
        [
            {
                "user_id": f"user{i}",
                "self_description": f"I am number {i}.",
                "system_string": "You are brief and honest.",
                "stated_prefs": {**dict.fromkeys(sliders, i * 7 % 101), "other": None, "other_text": None},
                "age": "25-34 years old",
                "gender": "Female",
                "education": "University",
                "employment_status": "Working full-time",
                "marital_status": "Single",
                "religion": {"self_described": "no", "categorised": "Non-religious", "simplified": "Non-religious"},
                "ethnicity": {"self_described": "white", "categorised": "White", "simplified": "White"},
                "location": {"birth_country": "Chile", "reside_country": "Chile"},
            }
            for i in range(users)
        ]
    )


def prism_conversations(count: int, users: int) -> bytes:
    return jsonl(
        [
            {
                "conversation_id": f"c{i}",
                "user_id": f"user{i * users // count}",
                "conversation_type": "unguided",
                "opening_prompt": f"What about topic {i % 11}?",
                "conversation_turns": 1,
                "conversation_history": [{"turn": 0, "role": "user", "content": f"What about topic {i % 11}?"}],
            }
            for i in range(count)
        ]
    )


def hub_files() -> dict[str, bytes]:
    published = {
        "openai/gsm8k/main/train-00000-of-00001.parquet": gsm8k(100, 17),
        "openai/gsm8k/main/test-00000-of-00001.parquet": gsm8k(0, 16),
        "ChilleD/SVAMP/data/train-00000-of-00001.parquet": svamp(100, 19),
        "ChilleD/SVAMP/data/test-00000-of-00001.parquet": svamp(0, 18),
        "allenai/ai2_arc/ARC-Easy/train-00000-of-00001.parquet": arc(200, 21),
        "allenai/ai2_arc/ARC-Easy/validation-00000-of-00001.parquet": arc(100, 20),
        "allenai/ai2_arc/ARC-Easy/test-00000-of-00001.parquet": arc(0, 40),
        "allenai/ai2_arc/ARC-Challenge/train-00000-of-00001.parquet": arc(200, 23),
        "allenai/ai2_arc/ARC-Challenge/validation-00000-of-00001.parquet": arc(100, 22),
        "allenai/ai2_arc/ARC-Challenge/test-00000-of-00001.parquet": arc(0, 41),
        "cais/mmlu/all/auxiliary_train-00000-of-00001.parquet": mmlu(300, 40),
        "cais/mmlu/all/validation-00000-of-00001.parquet": mmlu(200, 25),
        "cais/mmlu/all/dev-00000-of-00001.parquet": mmlu(100, 24),
        "cais/mmlu/all/test-00000-of-00001.parquet": mmlu(0, 40),
        "tatsu-lab/alpaca/data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": alpaca(27),
        "HannahRoseKirk/prism-alignment/survey.jsonl": prism_survey(8),
        "HannahRoseKirk/prism-alignment/conversations.jsonl": prism_conversations(33, 8),
    }
    found = {}
    for name, content in published.items():
        repository = "/".join(name.split("/")[:2])
        found[f"datasets/{repository}@{COMMITS[repository]}{name.removeprefix(repository)}"] = content
    return found


def write_cached_model(cache: Path, model_id: str) -> None:
    """A model that passes every check, where the hub's client keeps what it has downloaded."""
    folder = cache / f"models--{model_id.replace('/', '--')}"
    commit = "0" * 40
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "qwen2" if "Qwen" in model_id else "llama"}))
    save_file({"weight": numpy.arange(12, dtype=numpy.float32)}, snapshot / "model.safetensors")
    (snapshot / "tokenizer.json").write_text("{}")
    (snapshot / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))


@pytest.fixture(autouse=True, scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The stand-ins, a machine with four GPUs, and an empty working directory; returns the hub cache."""
    directory = tmp_path_factory.mktemp("jobs")
    for model_id in MODELS.values():
        write_cached_model(directory / "hub", model_id)
    with pytest.MonkeyPatch.context() as patch, serve_hub(hub_files()):
        patch.chdir(directory)
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")  # what a local cluster counts; a dry run uses none of them
        patch.setenv("MIPO_RAY_CACHE", str(directory / "cache"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(directory / "hub"))
        yield directory / "hub"


def dry_run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The lines of the plan by their first words."""
    code = main(["--dry-run", *arguments])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert printed.out.splitlines()[-1] == "dry run: nothing was started"
    return {line[:16].strip(): line[16:] for line in printed.out.splitlines()}


def prompt_rows(prompts: PromptsConfig) -> list[PromptRow]:
    read_rows = row_reader(prompts)
    return [normalize_row(row, prompts) for file in find_files(prompts.path) for row in read_rows(file)]


def first_question(task: str, index: int = 0, held_out: bool = False) -> str:
    """The last message of a prompt of a task: the question as the model sees it, without exemplars."""
    config = load_config(JOBS / "tasks" / f"{task}.yaml")
    return prompt_rows(config.evaluate.prompts if held_out else config.prompts)[index]["messages"][-1]["content"]


# Every recipe.


def test_there_is_a_recipe_for_every_task_and_model_and_no_other() -> None:
    assert sorted(path.stem for path in (JOBS / "paper").iterdir()) == sorted(PAPER)
    assert sorted(path.stem for path in (JOBS / "tasks").iterdir()) == sorted(TASKS)
    for task, model in itertools.product(TASKS, MODELS):
        values = yaml.safe_load((JOBS / "paper" / f"{task}-{model}.yaml").read_text())
        assert values == {
            "base": [f"../tasks/{task}.yaml", f"../models/{model}.yaml"],
            "run_dir": f"runs/{task}-{model}",
        }


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_of_the_paper_passes_the_dry_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    task, model = next((task, name.removeprefix(f"{task}-")) for task in TASKS if name.startswith(f"{task}-"))
    strategy, temperature, top_p, rows, held_out_rows = TASKS[task]
    plan = dry_run([str(JOBS / "paper" / f"{name}.yaml")], capsys)
    assert plan["model"].startswith(f"{MODELS[model]}, bfloat16, window ")
    assert plan["prompts"].startswith(f"{rows} rows of hf://datasets/")
    assert plan["prompts"].endswith(f"({rows if task.startswith('prism') else 0} with a context)")
    assert plan["conditioning"].startswith(strategy)
    assert f"temperature {temperature:g}" in plan["generate"]
    assert plan["evaluate"].startswith(f"{held_out_rows} held-out prompts")
    tasks = load_config(JOBS / "paper" / f"{name}.yaml").evaluate.tasks
    assert list(tasks) == ACCURACY_TASKS.get(task, [])
    assert ("task work" in plan) == bool(tasks)
    gpus = {"1b": 1, ".5b": 1, "3b": 2, "7b": 4, "8b": 4}[re.search(r"\.?\db$", name).group()]
    assert plan["training"].startswith(f"{gpus} workers; reserves {gpus + 1} CPUs and {gpus} GPUs")
    assert load_config(JOBS / "paper" / f"{name}.yaml").generation.sampling.top_p == top_p


def test_the_recipes_that_run_as_they_are_pass_the_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    others = sorted(path.name for path in JOBS.glob("*.yaml") if path.name != "base.yaml")
    assert others == ["instructions.yaml", "personalization.yaml"]
    for name in others:
        assert dry_run([str(JOBS / name)], capsys)["model"].startswith("embedded")


@pytest.mark.parametrize("model_id", MODELS.values())
def test_a_stand_in_is_what_a_run_would_load(model_id: str, hub: Path) -> None:
    assert Path(local_model_directory(model_id)).is_relative_to(hub)


def test_a_recipe_runs_over_local_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train-0.parquet").write_bytes(gsm8k(100, 30))
    (tmp_path / "test-0.parquet").write_bytes(gsm8k(0, 29))
    overrides = [
        "model.path=embedded",
        f"prompts.path={tmp_path}/train-*.parquet",
        f"evaluate.prompts.path={tmp_path}/test-*.parquet",
        f"evaluate.tasks.gsm8k.path={tmp_path}/test-*.parquet",
    ]
    plan = dry_run([str(JOBS / "paper" / "gsm8k-llama-3.2-1b.yaml"), *overrides], capsys)
    assert plan["prompts"].startswith(f"30 rows of {tmp_path}/train-*.parquet")
    assert plan["evaluate"].startswith("29 held-out prompts")
    assert plan["task"].startswith(f"gsm8k: 29 items of {tmp_path}/test-*.parquet")


@pytest.mark.parametrize("file", [*(f"tasks/{task}.yaml" for task in TASKS), "README.md"])
def test_the_commands_that_are_written_down_name_recipes_that_exist(file: str) -> None:
    text = (JOBS / file).read_text().replace("\\\n#", "").replace("\\\n", "")
    commands = [shlex.split(line.strip("# ")) for line in text.splitlines() if "mipo_ray.run" in line]
    recipes = [argument for command in commands for argument in command if argument.endswith(".yaml")]
    assert len(recipes) == len(commands) >= 2
    for command, recipe in zip(commands, recipes, strict=True):
        directory = JOBS if "--working-dir" in command else JOBS.parent
        assert (directory / recipe).is_file(), recipe
        overrides = [argument for argument in command if "=" in argument and not argument.startswith("-")]
        load_config(directory / recipe, overrides)


# What recipes share and where they differ.

TASK_FIELDS = ("prompts.", "evaluate.prompts.", "conditioning.", "generation.sampling.", "filters.")
MODEL_FIELDS = (
    "model.path",
    "generation.pool.",
    "train.num_workers",
    "train.micro_batch_tokens",
    "train.gradient_checkpointing",
    "train.zero_stage",
    "evaluate.scor",
)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def test_tasks_and_models_differ_where_they_should_and_nowhere_else() -> None:
    values = {name: flat(load_config(JOBS / "paper" / f"{name}.yaml").model_dump(mode="json")) for name in PAPER}
    for task, model in itertools.product(TASKS, MODELS):
        of_model, of_task = values[f"gsm8k-{model}"], values[f"{task}-llama-3.2-1b"]
        here = values[f"{task}-{model}"]
        differs_from_task = {key for key in here if here[key] != of_model.get(key)} - {"run_dir"}
        assert all(key.startswith((*TASK_FIELDS, "model.max_model_len")) for key in differs_from_task)
        differs_from_model = {key for key in here if here[key] != of_task.get(key)} - {"run_dir"}
        assert all(key.startswith(MODEL_FIELDS) for key in differs_from_model), differs_from_model


@pytest.mark.parametrize("name", PAPER)
def test_training_is_the_papers(name: str) -> None:
    config = load_config(JOBS / "paper" / f"{name}.yaml")
    train = config.train
    assert (train.beta, train.learning_rate, train.batch_size, train.epochs) == (0.1, 5e-7, 4, 1)
    assert (train.warmup_ratio, train.min_learning_rate_ratio, train.adam_betas) == (0.03, 0.1, (0.9, 0.95))
    assert (train.weight_decay, train.max_grad_norm, train.label_smoothing) == (0.0, 1.0, 0.0)
    assert (train.objective, train.length_normalized, train.nll_coefficient) == ("dpo", False, 0.0)
    assert (train.reference, train.lora.rank) == ("round_start", 0)
    assert config.model.dtype == "bfloat16"
    assert train.zero_stage == (3 if name.endswith(("8b", "7b")) else 2)
    # Nothing else that decides what training computes was touched.
    assert result_fields(config.model_dump())["train.deepspeed"] == {}


@pytest.mark.parametrize("task", [task for task in TASKS if not task.startswith("prism")])
def test_held_out_prompts_have_the_style_of_the_training_prompts(task: str) -> None:
    config = load_config(JOBS / "tasks" / f"{task}.yaml")
    places = {"path", "limit"}
    if task == "instructions":  # measured on bundled prompts, which are whole questions already
        places |= {"question_template"}
    places |= {"template_arguments", "control_tokens"}  # the training prompts' hold for all
    assert config.prompts.model_dump(exclude=places) == config.evaluate.prompts.model_dump(exclude=places)
    assert config.prompts.path != config.evaluate.prompts.path
    assert config.evaluate.prompts.limit in (200, None)


# Prompt styles.

# What the questions of the exemplars come to, worked out from their texts.
EXEMPLAR_RESULTS = [
    6 * 12 - 45,
    120 - (18 + 2 * 18),
    23 - 9 + 14 - 6,
    Fraction(2 * 9 * 4, 3),
    Fraction(3 * 85 + 45, 5),
    Fraction(80 * 3, 4) - 10,
    Fraction(86 + 14, 2),
    Fraction(400 - 130, 15),
]
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def test_the_arithmetic_of_the_exemplars_is_right() -> None:
    exemplars = load_config(JOBS / "styles" / "few_shot_math.yaml").prompts.exemplars
    assert len({exemplar.question for exemplar in exemplars}) == 8
    for exemplar, expected in zip(exemplars, EXEMPLAR_RESULTS, strict=True):
        steps, found = re.fullmatch(r"(.*) The answer is (\d+)\.", exemplar.answer).groups()
        equations = re.findall(r"(\d[\d.]*(?: [-+*/] \d[\d.]*)+) = (\d+)", steps)
        assert len(equations) == steps.count("=") >= 2
        for left, right in equations:
            first, *rest = left.split()
            result = Fraction(first)
            for symbol, number in zip(rest[::2], rest[1::2], strict=True):
                result = OPERATORS[symbol](result, Fraction(number))
            assert result == int(right), left
        assert int(found) == int(equations[-1][1]) == expected


def test_the_filter_reads_answers_that_end_as_the_recipes_ask() -> None:
    for exemplar in load_config(JOBS / "styles" / "few_shot_math.yaml").prompts.exemplars:
        number = re.search(r"(\d+)\.$", exemplar.answer).group(1)
        assert same_final_answer("number", exemplar.answer, f"It comes to ${number}.00")
        assert not same_final_answer("number", exemplar.answer, f"The answer is {int(number) + 1}.")
    letters = [f"Sound needs air, so A and C are wrong. The answer is {letter}." for letter in "AB"]
    assert same_final_answer("choice", letters[1], "B. Air moves. The answer is B.")
    assert not same_final_answer("choice", *letters)


@pytest.mark.parametrize("task", ["gsm8k", "svamp"])
def test_word_problems_come_after_eight_solved_ones(task: str) -> None:
    config = load_config(JOBS / "tasks" / f"{task}.yaml")
    for prompts in (config.prompts, config.evaluate.prompts):
        for row in prompt_rows(prompts):
            assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * 8 + ["user"]
            assert row["context"] == ""
    assert first_question("gsm8k") == "100 apples and 2?"
    assert first_question("svamp") == "Dan has 100 pens. How many pens?"


def test_options_get_letters() -> None:
    for index in (0, 1):  # of ARC's rows 0 and 1 only the second one has letters itself
        number = 200 + index
        expected = (
            f"Which one is {number}?\nA. {number}\nB. none\nC. all\n\n"
            'Explain in one or two sentences, then answer with the letter of the correct option: "The answer is X."'
        )
        for task in ("arc-easy", "arc-challenge", "mmlu"):
            assert first_question(task, index) == expected
    assert first_question("mmlu", held_out=True).startswith("Which one is 100?\nA. 100\n")


def test_instructions_bring_their_input_along() -> None:
    assert [first_question("instructions", index) for index in (0, 1)] == [
        "Say it 0 times.\n\nword 0",
        "Say it 1 times.",
    ]


def test_personal_answers_are_asked_to_be_two_to_three_sentences() -> None:
    for task in ("prism-missing-context", "prism-random-context"):
        config = load_config(JOBS / "tasks" / f"{task}.yaml")
        for prompts in (config.prompts, config.evaluate.prompts):
            rows = prompt_rows(prompts)
            for row in rows:
                system, question = row["messages"]
                assert system == {"role": "system", "content": "Answer in two to three sentences."}
                assert question["content"].startswith(row["context"])
                assert row["question_messages"][0] == system
            assert len({row["group"] for row in rows}) >= 8
