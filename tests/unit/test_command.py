"""The command as far as it goes without an engine: help, plans, refusals, and runs that are finished already.

python -m pytest tests/unit/test_command.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from mipo_ray.config.recipe import fields, load_config, to_yaml
from mipo_ray.config.schema import Config
from mipo_ray.planning.plan import check_inputs, make_plan
from mipo_ray.ray_cluster.resources import Node
from mipo_ray.run import DEMO_RECIPE, main
from mipo_ray.storage.configuration import record_config
from mipo_ray.storage.entries import Entry
from mipo_ray.storage.lock import hold_lock
from mipo_ray.storage.run_directory import RunDirectory, open_run
from mipo_ray.terminal import say
from tests.helpers.chat_templates import ALTERNATING, LOSING, NO_SYSTEM, ONE_TURN, THINKING
from tests.helpers.stages import commit
from tests.helpers.tiny_model import CHAT_TEMPLATE

CPU_ONLY = {"CPU": 6.0, "GPU": 0.0}
FINISHED_FILES = ("manifest.json", "results.json", "report.html", "config.yaml")


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("MIPO_RAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory that passes the check."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"weight": numpy.arange(12, dtype=numpy.float32)}, directory / "model.safetensors")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.fixture
def options(tmp_path: Path, model: Path) -> list[str]:
    """Arguments of a run that passes every check: 21 training prompts, 6 held-out ones, all with a context."""
    (tmp_path / "defaults.yaml").write_text("")  # without a recipe, the demo's would be taken
    write_rows(tmp_path / "train.jsonl", [prompt_row(index) for index in range(21)])
    write_rows(tmp_path / "held_out.jsonl", [prompt_row(index) for index in range(100, 106)])
    return [
        f"{tmp_path}/defaults.yaml",
        f"run_dir={tmp_path}/run",
        f"model.path={model}",
        f"prompts.path={tmp_path}/train.jsonl",
        f"evaluate.prompts.path={tmp_path}/held_out.jsonl",
    ]


def prompt_row(index: int) -> dict[str, Any]:
    return {"prompt_id": f"p{index}", "prompt": f"question {index}", "context": f"I am user {index}."}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def looks_finished(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.name in FINISHED_FILES]


# What is imported.


def test_a_dry_run_imports_no_engine(options: list[str]) -> None:
    code = (
        "import sys\n"
        "from mipo_ray.run import main\n"
        "assert main(['--dry-run', *sys.argv[1:]]) == 0\n"
        "print([name for name in ('torch', 'ray', 'vllm', 'transformers', 'deepspeed') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# Help.


def test_help_lists_every_field_with_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for path, info in fields():
        assert info.description, path
        (line,) = [line for line in lines if line.startswith(f"  {path} = ")]
        assert line.endswith(f": {info.description}"), path
    for line in [
        "  train.beta = 0.1: ",
        "  rounds = 2: ",
        "  prompts.limit = null: ",
        "  prompts.path = bundled:personalization: ",
        "  evaluate.prompts.path = bundled:personalization_heldout: ",
        "  prompts.context_template = null: ",
        "  conditioning.similar.max_similarity = 0.6: ",
    ]:
        assert any(found.startswith(line) for found in lines), line


def test_every_section_and_field_is_described() -> None:
    assert len(list(fields())) > 60
    assert all(info.description for info in Config.model_fields.values())


# Plans.


def dry_run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    code = main(["--dry-run", *arguments])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert printed.err == ""
    return printed.out


@pytest.fixture
def pairs(tmp_path: Path, model: Path) -> list[str]:
    """Arguments of a run on seven pairs that exist, with two rejected responses each."""
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    rows = [{"prompt": f"question {i}", "chosen": "yes", "rejected": ["no", "never"]} for i in range(7)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    return [f"run_dir={tmp_path}/run", f"model.path={model}", f"pairs.path={tmp_path}/pairs.jsonl"]


def test_the_plan_of_pairs_that_exist(pairs: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without a recipe the one for pairs holds, which measures nothing: no engine is in the plan."""
    plan = dry_run([*pairs, "train.epochs=3"], capsys)
    assert f"pairs           7 rows of {tmp_path}/pairs.jsonl, in the columns of trl, 2 rejected responses each" in plan
    assert "train           6 steps at most: 4 pairs per step, 3 epoch(s)" in plan
    assert "schedule        sequential (the pairs exist)" in plan
    stages = [line.split()[0] for line in plan.split("stages\n")[1].splitlines() if line.startswith("  ")]
    assert stages == ["rounds/000/generate", "rounds/000/train"]
    for absent in ("engine", "prompts ", "conditioning", "evaluate "):
        assert absent not in plan


def test_a_dry_run_of_pairs_that_exist_imports_no_engine(pairs: list[str]) -> None:
    test_a_dry_run_imports_no_engine(pairs)


def test_pairs_that_exist_are_measured_on_ones_own_prompts(
    pairs: list[str], options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (held_out,) = [option for option in options if option.startswith("evaluate.prompts.path=")]
    plan = dry_run([*pairs, "evaluate.enabled=true", held_out, "conditioning.strategy=random_prompt"], capsys)
    assert "evaluate        6 held-out prompts x 2 answers" in plan
    assert "engines live " in plan
    assert main(["--dry-run", *pairs, "evaluate.enabled=true"]) == 2
    assert "set evaluate.prompts.path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        (CHAT_TEMPLATE, {"prompt": "?", "chosen": "yes"}, "pairs.jsonl, line 8: expected a value in column rejected"),
        (NO_SYSTEM, {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}]},
         "pairs.jsonl, line 8: "),
        (LOSING["answers"], {}, "pairs.jsonl, line 1: "),
        (CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>"), {},
         "expected the turn of an answer to begin as a prompt for one ends"),
    ],
)  # fmt: skip
def test_pairs_that_cannot_be_used_are_refused_by_the_dry_run(
    template: str, row: dict[str, Any], expected: str, pairs: list[str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "chat_template.jinja").write_text(template)
    file = Path(pairs[-1].partition("=")[2])
    whole = {"prompt": "?", "chosen": "yes", "rejected": ["no", "never"]} if "chosen" not in row else {}
    with file.open("a") as end:
        end.write(json.dumps({**whole, **row}) + "\n")
    assert main(["--dry-run", *pairs]) == 2
    assert expected in capsys.readouterr().err


def test_a_control_on_pairs_that_exist_needs_one_rejected_response(
    pairs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--dry-run", *pairs, "train.shuffle_labels=true"]) == 2
    assert "expected one rejected response in each row of" in capsys.readouterr().err


def test_the_primary_measure_is_named_before_anything_is_sampled(options: list[str], tmp_path: Path) -> None:
    """By what the held-out rows have, unless the recipe names another; the plan's configuration is what is recorded."""
    run = open_run(f"{tmp_path}/run")
    assert check_inputs(load_config(options[0], options[1:]), run).config.evaluate.primary == "context_pmi_initial"
    named = load_config(options[0], [*options[1:], "evaluate.primary=retrieval_initial"])
    assert check_inputs(named, run).config.evaluate.primary == "retrieval_initial"
    write_rows(tmp_path / "held_out.jsonl", [{"prompt": f"question {index}"} for index in range(6)])
    plain = load_config(options[0], [*options[1:], "conditioning.strategy=random_prompt"])
    assert check_inputs(plain, run).config.evaluate.primary == "pmi_initial"
    unmeasured = load_config(options[0], [*options[1:], "evaluate.enabled=false"])
    assert check_inputs(unmeasured, run).config.evaluate.primary is None


def test_the_plan_says_its_numbers(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    plan = dry_run(
        [
            *options,
            "rounds=3",
            "seed=9",
            "train.batch_size=4",
            "train.num_workers=2",
            "train.epochs=2",
            "generation.pool.max_size=3",
            "ray.num_cpus=6",
            "evaluate.samples_per_prompt=5",
            "evaluate.other_prompts=4",
            "model.max_model_len=256",
            "generation.sampling.max_tokens=40",
        ],
        capsys,
    )
    lines = {line.split("  ")[0]: " ".join(line.split()) for line in plan.splitlines()}
    assert lines["rounds"] == "rounds 3, seed 9"
    assert "float32, window 256 tokens" in lines["model"]
    assert lines["prompts"].startswith("prompts 21 rows of ")
    assert lines["prompts"].endswith("(21 with a context)")
    assert lines["generate"].startswith("generate 42 responses of up to 40 tokens, temperature 0.7; ")
    assert lines["generate"].endswith("1 matched, 1 mismatched: 21 pairs before filters")
    # 21 pairs: five steps of 4 and one of 1, twice.
    assert lines["train"] == (
        "train 12 steps at most: 4 pairs per step, 2 epoch(s), learning rate 5e-07, checkpoints every 30 minutes"
    )
    assert lines["objective"] == "objective dpo, beta 0.1, reference round_start (colocated); trains all weights"
    assert lines["layout"] == "layout shared, attention sdpa, micro-batches of up to 4,096 tokens, ZeRO 2"
    assert lines["evaluate"].startswith(
        "evaluate 6 held-out prompts x 5 answers, each scored under its own and 4 other"
    )
    assert lines["primary"] == (
        "primary context_pmi_initial, over 6 users and 6 questions; fewer than 15 of a kind make every interval a "
        "rough guide; other measures are exploratory"
    )
    assert "1 to 3 engines" in lines["generation"]
    assert "reserves 2 CPUs and 0 GPUs" in lines["generation"]
    assert "2 workers; reserves 3 CPUs and 0 GPUs" in lines["training"]
    assert lines["engines"] == "engines 1 CPUs and 0 GPUs each; at most 3 CPUs and 0 GPUs; the nodes have room for 6"
    assert lines["workers"].startswith("workers 1 CPUs and 0 GPUs each, PACK; at most 2 CPUs and 0 GPUs; ")
    assert lines["scorers"].startswith("scorers 1 CPUs and 0 GPUs each; at most 1 CPUs")
    # "question 0" to "question 20" with "I am user 0." to "I am user 20.", and an empty line between.
    assert "estimate per round, without evaluation: 263 prompt tokens, up to 1,680 generated" in lines["work"]
    assert lines["memory"] == "memory no estimate: config.json does not say " + ", ".join(
        ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"]
    )
    stages = [line.split() for line in plan.splitlines() if line.startswith("  ")]
    assert [name for name, *_ in stages] == [
        "base/evaluate",
        *(f"rounds/{index:03d}/{stage}" for index in range(3) for stage in ("generate", "train", "evaluate")),
    ]
    assert all(state == ["to", "do"] for _, *state in stages)
    assert plan.splitlines()[-1] == "dry run: nothing was started"


def test_the_plan_reckons_by_the_rounds_of_another_run(
    options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """21 prompts by a round of 10 pair rows, which took 20 s of one engine and 30 s of one worker."""
    config = load_config(f"{tmp_path}/defaults.yaml", options[1:])
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "config.yaml").write_text(to_yaml(config))
    generated = {"event": "generated", "generated_tokens": 500, "engine": "a"}
    pairs = {"event": "pairs", "rows": 10, "kept": 5, "generated_tokens": 500}
    step = {"event": "train_step", "pairs": 5, "forward_tokens": 700}
    stages = {"generate": ([generated, pairs], 20.0), "train": ([step], 30.0)}
    rows = [
        {"round": 0, "stage": stage, **event}
        for stage, (inner, seconds) in stages.items()
        for event in ({"event": "stage_start"}, *inner, {"event": "stage", "stage_seconds": seconds})
    ]
    write_rows(tmp_path / "before" / "metrics.jsonl", rows)
    plan = dry_run([*options, f"cost.earlier_runs=[{tmp_path}/before]"], capsys)
    lines = {line.split("  ")[0]: " ".join(line.split()) for line in plan.splitlines()}
    assert lines["measured"] == (
        f"measured by 1 round of {tmp_path}/before: per round 1,050 tokens generated, 50% of the pairs kept, 1,470 "
        "tokens trained on"
    )
    assert lines["time"].startswith("time as measured, per round: 0.7 minutes to generate, 1.1 minutes to train")
    assert "cost" not in lines
    code = main(["--dry-run", *options, f"cost.earlier_runs=[{tmp_path}/nowhere]"])
    assert (code, "found no config.yaml there" in capsys.readouterr().err) == (2, True)


def test_the_plan_shows_the_judge(
    options: list[str], model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_rows(tmp_path / "held_out.jsonl", [{**prompt_row(index), "reference": "r"} for index in range(6)])
    overrides = ["rounds=1", f"evaluate.judge.model={model}", "evaluate.judge.protocols=[pairwise, pointwise]"]
    plan = dry_run([*options, *overrides, "evaluate.samples_per_prompt=3", "ray.num_cpus=6"], capsys)
    lines = {line.split("  ")[0]: " ".join(line.split()) for line in plan.splitlines()}
    assert lines["judge"] == (
        f"judge {model}: pairwise 36 of each round (each pair in both orders), pointwise 18 of the base and of each "
        "round; judgements of up to 512 tokens, temperature 0"
    )
    assert lines["judging"].startswith("judging 1 to 1 engines, tensor parallel 1; reserves 2 CPUs and 0 GPUs")
    assert lines["judges"] == "judges 1 CPUs and 0 GPUs each; at most 1 CPUs and 0 GPUs; the nodes have room for 6"
    stages = [line.split()[0] for line in plan.splitlines() if line.startswith("  ")]
    assert stages == [
        "base/evaluate",
        "base/judge/pointwise",
        *(f"rounds/000/{stage}" for stage in ("generate", "train", "evaluate", "judge/pairwise", "judge/pointwise")),
    ]
    # A server's engines are its own business.
    served = dry_run([*options, *overrides, "evaluate.judge.endpoint=http://localhost:1/v1"], capsys)
    assert f"{model} at http://localhost:1/v1: pairwise 24" in served
    assert "judging " not in served


def test_a_reused_response_is_sampled_once(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    plan = dry_run([*options, "conditioning.strategy=swapped_response"], capsys)
    assert "21 responses of up to 48 tokens" in plan


def test_the_plan_of_a_mixture_with_several_samples(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    changes = [
        "conditioning.strategy=mixture",
        "conditioning.mixture={swapped_response: 1, missing_context: 2}",
        "conditioning.fallback=random_prompt",
        "generation.samples_per_prompt=2",
        "generation.negatives_per_prompt=4",
    ]
    plan = " ".join(dry_run([*options, *changes], capsys).split())
    assert "mixture (swapped_response 1, missing_context 2), else random_prompt, blocks of 32" in plan
    # 21 x 2 matched ones, and two thirds of 21 x 4 mismatched ones.
    assert "98 responses of up to 48 tokens" in plan
    assert "2 matched, 4 mismatched: 42 pairs before filters, each with 2 rejected" in plan
    assert "train 11 steps at most: 4 pairs per step" in plan  # a pair counts once, whatever it is compared with


@pytest.mark.parametrize(
    ("overrides", "label", "expected"),
    [
        (
            ["train.objective=ipo", "train.beta=0.2", "train.reference=initial", "train.reference_mode=cached"],
            "objective",
            "ipo, beta 0.2, reference initial (cached); trains all weights",
        ),
        (
            ["train.reference_mode=adapter", "train.lora.rank=16"],
            "objective",
            "dpo, beta 0.1, reference round_start (adapter); trains LoRA of rank 16",
        ),
        # These two look at the policy alone.
        (["train.objective=sami"], "objective", "sami; trains all weights"),
        (["train.objective=sft", "train.lora.rank=8"], "objective", "sft; trains LoRA of rank 8"),
        (
            ["train.layout=padded", "train.micro_batch_tokens=16384", "train.zero_stage=3"],
            "layout",
            "padded, attention sdpa, micro-batches of up to 16,384 tokens, ZeRO 3",
        ),
        (
            ["train.min_workers=2", "train.num_workers=9"],
            "training",
            "2 to 9 workers; reserves 3 CPUs and 0 GPUs at least (CPU)",
        ),
    ],
)
def test_the_plan_says_how_it_trains(
    overrides: list[str], label: str, expected: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = dry_run([*options, "ray.num_cpus=6", *overrides], capsys)
    assert {line[:16].strip(): line[16:] for line in plan.splitlines()}[label] == expected


@pytest.mark.parametrize(
    ("steps", "expected"), [("null", "checkpoints every 30 minutes"), ("1000", "checkpoints every 1,000 steps")]
)
def test_the_plan_says_when_training_is_saved(
    steps: str, expected: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = dry_run([*options, f"train.checkpoint_steps={steps}"], capsys)
    (line,) = [line for line in plan.splitlines() if line.startswith("train  ")]
    assert line.endswith(f", {expected}")


def test_without_evaluation_there_are_no_evaluation_stages(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = dry_run([*options, "evaluate.enabled=false", "evaluate.prompts.path=nowhere.jsonl", "rounds=1"], capsys)
    stages = [line.split()[0] for line in plan.splitlines() if line.startswith("  ")]
    assert stages == ["rounds/000/generate", "rounds/000/train"]
    assert "held-out" not in plan


def test_a_recipe_file_and_overrides_in_any_order(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Path(options.pop(0))
    recipe.write_text("rounds: 4\ntrain:\n  learning_rate: 1e-5\n")
    code = main([*options, str(recipe), "--dry-run", "seed=5"])
    plan = capsys.readouterr().out
    assert code == 0
    assert "rounds          4, seed 5" in plan
    assert "learning rate 1e-05" in plan


def test_without_a_recipe_it_is_the_demo(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    demo = load_config(DEMO_RECIPE)
    plan = dry_run(["prompts.limit=12", *options[1:3]], capsys)
    assert f"prompts         12 rows of {demo.prompts.path} (12 with a context)" in plan
    assert f"learning rate {demo.train.learning_rate:g}" in plan
    assert demo.train.learning_rate != Config().train.learning_rate
    assert demo.model.path == "embedded"


@pytest.mark.parametrize("folder", ["context=none", "a b/rounds=7"])
def test_a_recipe_may_lie_below_a_folder_with_an_equals_sign(
    folder: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / folder / "recipe.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("rounds: 4\n")
    monkeypatch.chdir(tmp_path)
    for name in (str(recipe), f"{folder}/recipe.yaml"):
        assert "rounds          4, seed 0" in dry_run([name, *options[1:]], capsys)


def test_two_recipes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["one.yaml", "two.yaml"])
    assert caught.value.code == 2
    assert "expected one recipe, found one.yaml, two.yaml" in capsys.readouterr().err


def test_a_dry_run_leaves_nothing_that_looks_started(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(options, capsys)
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []


# Bad input: each mends something in a run that would pass, and gives the overrides it needs and what stderr says.


def empty_prompts(directory: Path) -> tuple[list[str], str]:
    write_rows(directory / "train.jsonl", [])
    return [], rf"{directory}/train\.jsonl: expected prompts, found no row"


def missing_prompts(directory: Path) -> tuple[list[str], str]:
    return [f"prompts.path={directory}/none-*.jsonl"], rf"prompts\.path: no file matches {directory}/none-\*\.jsonl"


def row_without_the_column(directory: Path) -> tuple[list[str], str]:
    write_rows(directory / "train.jsonl", [prompt_row(0), {"prompts": "q"}])
    return [], r"train\.jsonl, line 2: no column 'prompt'; .*did you mean 'prompts'\?"


def content_that_is_no_text(directory: Path) -> tuple[list[str], str]:
    write_rows(directory / "train.jsonl", [prompt_row(0), {**prompt_row(1), "prompt": 17}])
    return [], r"train\.jsonl, line 2, field 'prompt': expected a string or a list .*found int 17"


def broken_json(directory: Path) -> tuple[list[str], str]:
    with (directory / "train.jsonl").open("a") as file:
        file.write('{"prompt": \n')
    return [], r"train\.jsonl, line 22: broken JSON"


def duplicate_id(directory: Path) -> tuple[list[str], str]:
    write_rows(directory / "train.jsonl", [prompt_row(0), prompt_row(1), {**prompt_row(2), "prompt_id": "p0"}])
    return [], r"train\.jsonl, line 3, field 'prompt_id': expected a unique id, found 'p0', .*line 1"


def one_single_prompt(directory: Path) -> tuple[list[str], str]:
    write_rows(directory / "train.jsonl", [prompt_row(0)])
    return ["conditioning.strategy=random_prompt"], r"train\.jsonl, line 1, field 'prompt': found one single prompt"


def one_single_held_out_prompt(directory: Path) -> tuple[list[str], str]:
    write_rows(directory / "held_out.jsonl", [prompt_row(0)])
    return [], r"held_out\.jsonl, line 1, field 'prompt': found one single prompt"


def all_prompts_equal(directory: Path) -> tuple[list[str], str]:
    write_rows(directory / "train.jsonl", [{"prompt": "hello"}, {"prompt": " hello "}, {"prompt": "hello"}])
    return ["conditioning.strategy=swapped_response"], r"train\.jsonl, line 1, .*found the same text in all 3 rows"


def no_context(directory: Path) -> tuple[list[str], str]:
    write_rows(directory / "train.jsonl", [{"prompt": "a", "contxt": "b"}])
    return [], r"train\.jsonl, line 1, field 'context': expected a context .*did you mean 'contxt'\?"


def some_without_context(directory: Path) -> tuple[list[str], str]:
    rows = [{"prompt": f"question {row}", "context": "" if row > 1 else f"user {row}"} for row in range(9)]
    write_rows(directory / "train.jsonl", rows)
    return [
        "conditioning.strategy=random_context"
    ], r"train\.jsonl, line 3; .*line 4; .*line 5 and 4 more.*expected a context.*conditioning\.fallback"


def one_user(directory: Path) -> tuple[list[str], str]:
    rows = [{"prompt": f"question {row}", "context": f"user {row}", "group": "one"} for row in range(4)]
    write_rows(directory / "train.jsonl", rows)
    return ["conditioning.strategy=random_context"], r"train\.jsonl.*group"


def question_template_with_unknown_column(directory: Path) -> tuple[list[str], str]:
    return [
        "prompts.question_template='{{ promt }}'"
    ], r"train\.jsonl, line 1: no column 'promt', which question_template uses.*did you mean 'prompt'"


def more_negatives_than_a_block_has(directory: Path) -> tuple[list[str], str]:
    return [
        "conditioning.strategy=random_prompt",
        "generation.negatives_per_prompt=21",
    ], r"generation\.negatives_per_prompt: expected at most 20 .*found 21"


def zip_that_does_not_divide(directory: Path) -> tuple[list[str], str]:
    return ["generation.samples_per_prompt=2"], r"generation: pairing zip .*expected a multiple"


def mixture_without_weights(directory: Path) -> tuple[list[str], str]:
    return ["conditioning.strategy=mixture"], r"conditioning: strategy mixture needs weights"


def broken_pattern(directory: Path) -> tuple[list[str], str]:
    return [
        "filters.patterns=[{name: refusal, regex: '(sorry'}]"
    ], r"filters\.patterns\.0\.regex: not a regular expression"


def embedding_model_that_is_not_there(directory: Path) -> tuple[list[str], str]:
    return [
        "conditioning.strategy=similar_prompt",
        f"conditioning.similar.model={directory}/nowhere",
    ], r"conditioning\.similar\.model .*expected"


def missing_model(directory: Path) -> tuple[list[str], str]:
    return [
        f"model.path={directory}/nowhere"
    ], rf"model\.path '{directory}/nowhere': expected .*a directory that exists"


def incomplete_model(directory: Path) -> tuple[list[str], str]:
    weights = directory / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    return [], rf"{weights}: expected \d+ bytes as its header says, found \d+"


def no_chat_template(directory: Path) -> tuple[list[str], str]:
    (directory / "model" / "chat_template.jinja").unlink()
    return [], rf"{directory}/model: tokenizer without chat template"


def unwritable_storage(directory: Path) -> tuple[list[str], str]:
    return [f"run_dir={directory}/train.jsonl/run"], rf"{directory}/train\.jsonl/run: cannot write to the run directory"


def unknown_storage(directory: Path) -> tuple[list[str], str]:
    return ["run_dir=nosuchscheme://bucket/run"], "nosuchscheme://bucket/run: no filesystem for this URL"


def foreign_directory(directory: Path) -> tuple[list[str], str]:
    (directory / "run").mkdir()
    (directory / "run" / "thesis.txt").write_text("")
    return [], rf"{directory}/run: not empty and without a config\.yaml"


def beta_zero(directory: Path) -> tuple[list[str], str]:
    return ["train.beta=0"], r"train\.beta: Input should be greater than 0; found 0"


def beta_negative(directory: Path) -> tuple[list[str], str]:
    return ["train.beta=-1"], r"train\.beta: Input should be greater than 0; found -1"


def too_many_workers(directory: Path) -> tuple[list[str], str]:
    overrides = ["ray.num_cpus=6", "train.num_workers=6"]
    return overrides, r"training needs 7 CPUs and the cluster has 6: lower train\.num_workers"


def too_many_engines(directory: Path) -> tuple[list[str], str]:
    overrides = ["ray.num_cpus=6", "generation.pool.min_size=6", "generation.pool.max_size=9"]
    return overrides, r"generation needs 7 CPUs and the cluster has 6: lower generation\.pool\.min_size"


def too_many_workers_to_start_with(directory: Path) -> tuple[list[str], str]:
    overrides = ["ray.num_cpus=6", "train.min_workers=6", "train.num_workers=9"]
    return overrides, r"training needs 7 CPUs and the cluster has 6: lower train\.min_workers"


def labels_that_no_node_has(directory: Path) -> tuple[list[str], str]:
    overrides = ["generation.pool.label_selector={mipo.io/role: generate}"]
    return overrides, r"generation: the 0 of 1 nodes that match the labels mipo\.io/role=generate have room for 0 of"


def workers_apart_on_one_node(directory: Path) -> tuple[list[str], str]:
    overrides = ["ray.num_cpus=6", "train.num_workers=2", "train.placement_strategy=STRICT_SPREAD"]
    return overrides, r"training: the nodes have room for 1 of the 2 .* strategy STRICT_SPREAD"


def flex_attention_without_gpus(directory: Path) -> tuple[list[str], str]:
    overrides = ["train.attention=flex_attention", "train.gpus_per_worker=0"]
    return overrides, r"train\.attention: flex_attention trains on GPUs only .*choose attention sdpa"


def unknown_key(directory: Path) -> tuple[list[str], str]:
    return ["trian.beta=1"], r"trian: unknown key; did you mean train\?"


def missing_recipe(directory: Path) -> tuple[list[str], str]:
    (directory / "defaults.yaml").unlink()
    return [], rf"{directory}/defaults\.yaml: cannot read the recipe"


def broken_template(directory: Path) -> tuple[list[str], str]:
    return [
        "prompts.context_template='{{ question }'"
    ], r"prompts\.context_template, line 1: not a valid Jinja2 template"


def judge_that_is_not_there(directory: Path) -> tuple[list[str], str]:
    return [
        f"evaluate.judge.model={directory}/nowhere"
    ], rf"evaluate\.judge\.model '{directory}/nowhere': expected .*a directory that exists"


def judge_without_references(directory: Path) -> tuple[list[str], str]:
    overrides = ["evaluate.judge.model=org/judge", "evaluate.judge.protocols=[pointwise]"]
    return overrides, r"held_out\.jsonl, line 1; .*and 3 more, field 'reference': evaluate\.judge\.protocols pointwise"


def judge_template_without_an_answer(directory: Path) -> tuple[list[str], str]:
    (directory / "judge.j2").write_text("{{ question }} {{ answer_a }}")
    overrides = ["evaluate.judge.model=org/judge", f"evaluate.judge.pairwise_template={directory}/judge.j2"]
    return overrides, r"judge\.j2: expected the template to use answer_b"


def key_in_the_configuration(directory: Path) -> tuple[list[str], str]:
    return [
        "evaluate.judge.model=gpt",
        "evaluate.judge.endpoint=https://me:key@host/v1",
    ], r"evaluate\.judge\.endpoint: found a URL with a user's password or key"


def system_that_the_template_drops(directory: Path) -> tuple[list[str], str]:
    (directory / "model" / "chat_template.jinja").write_text(LOSING["system"])
    return ["prompts.context_role=system"], (
        r"train\.jsonl, line 1: .*chat_template\.jinja: the chat template leaves out the system message.*"
        r"prompts\.context_role=system"
    )


def exemplars_that_the_template_drops(directory: Path) -> tuple[list[str], str]:
    (directory / "model" / "chat_template.jinja").write_text(LOSING["answers"])
    overrides = ["prompts.exemplars=[{question: 'One?', answer: 'Two.'}]"]
    return overrides, r"leaves out the assistant message or a part of it, message 2 of 3.*prompts\.exemplars"


def last_turn_that_the_template_drops(directory: Path) -> tuple[list[str], str]:
    (directory / "model" / "chat_template.jinja").write_text(LOSING["the last"])
    return ["prompts.system='Be kind.'"], r"leaves out the user message or a part of it, message 2 of 2"


def held_out_system_that_the_template_drops(directory: Path) -> tuple[list[str], str]:
    (directory / "model" / "chat_template.jinja").write_text(LOSING["system"])
    return [
        "evaluate.prompts.system='Be kind.'"
    ], r"held_out\.jsonl, line 1: .*system message.*evaluate\.prompts\.system"


def role_that_the_template_refuses(directory: Path) -> tuple[list[str], str]:
    (directory / "model" / "chat_template.jinja").write_text(NO_SYSTEM)
    return ["prompts.context_role=system"], (
        r"train\.jsonl, line 1: .*refuses a conversation of system, user: TemplateError: System role not supported\. .*"
        r"prompts\.context_role=system"
    )


def order_that_the_template_refuses(directory: Path) -> tuple[list[str], str]:
    (directory / "model" / "chat_template.jinja").write_text(ALTERNATING)
    turns = [{"role": role, "content": "Hm."} for role in ("user", "user")]
    write_rows(directory / "train.jsonl", [*map(prompt_row, range(60)), {"prompt_id": "late", "prompt": turns}])
    return ["conditioning.fallback=drop"], r"train\.jsonl, line 61: .*refuses .* user, user: .*must alternate"


def task_that_the_template_refuses(directory: Path) -> tuple[list[str], str]:
    (directory / "model" / "chat_template.jinja").write_text(ONE_TURN)
    write_rows(directory / "gsm8k.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    overrides = [f"evaluate.tasks={{gsm8k: {{path: {directory}/gsm8k.jsonl}}}}", "evaluate.task_max_model_len=2048"]
    return overrides, r"gsm8k\.jsonl, item .*refuses .*Only one message\. .*evaluate\.tasks\.gsm8k\.exemplars"


def judge_whose_template_drops_the_prompt(directory: Path) -> tuple[list[str], str]:
    shutil.copytree(directory / "model", directory / "judge")
    (directory / "judge" / "chat_template.jinja").write_text("Judge!")
    return [
        f"evaluate.judge.model={directory}/judge"
    ], r"evaluate\.judge\.model: .*judge/chat_template\.jinja: .*leaves out"


def control_token_in_a_context(directory: Path) -> tuple[list[str], str]:
    (directory / "model" / "tokenizer.json").write_text('{"added_tokens": [{"content": "<|end|>", "special": true}]}')
    rows = [prompt_row(index) for index in range(40)]
    rows[38]["context"] = "I say <|end|> and go on."
    write_rows(directory / "train.jsonl", rows)
    return [
        "prompts.control_tokens=refuse"
    ], r"train\.jsonl, line 39: the user message holds the control token '<\|end\|>'"


def template_argument_that_nobody_reads(directory: Path) -> tuple[list[str], str]:
    (directory / "model" / "chat_template.jinja").write_text(THINKING)
    return ["prompts.template_arguments.enable_thinkin=false"], (
        r"prompts\.template_arguments\.enable_thinkin: .*no such variable.*did you mean 'enable_thinking'"
    )


BAD_INPUT = [
    system_that_the_template_drops,
    exemplars_that_the_template_drops,
    last_turn_that_the_template_drops,
    held_out_system_that_the_template_drops,
    role_that_the_template_refuses,
    order_that_the_template_refuses,
    task_that_the_template_refuses,
    judge_whose_template_drops_the_prompt,
    control_token_in_a_context,
    template_argument_that_nobody_reads,
    empty_prompts,
    missing_prompts,
    row_without_the_column,
    content_that_is_no_text,
    broken_json,
    duplicate_id,
    one_single_prompt,
    one_single_held_out_prompt,
    all_prompts_equal,
    no_context,
    some_without_context,
    one_user,
    question_template_with_unknown_column,
    more_negatives_than_a_block_has,
    zip_that_does_not_divide,
    mixture_without_weights,
    broken_pattern,
    embedding_model_that_is_not_there,
    missing_model,
    incomplete_model,
    no_chat_template,
    unwritable_storage,
    unknown_storage,
    foreign_directory,
    beta_zero,
    beta_negative,
    too_many_workers,
    too_many_engines,
    too_many_workers_to_start_with,
    labels_that_no_node_has,
    workers_apart_on_one_node,
    flex_attention_without_gpus,
    unknown_key,
    missing_recipe,
    broken_template,
    judge_that_is_not_there,
    judge_without_references,
    judge_template_without_an_answer,
    key_in_the_configuration,
]


@pytest.mark.parametrize("mode", [["--dry-run"], []], ids=["dry-run", "run"])
@pytest.mark.parametrize("spoil", BAD_INPUT)
def test_bad_input_is_told_before_anything_starts(
    spoil: Callable[[Path], tuple[list[str], str]],
    mode: list[str],
    options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides, expected = spoil(tmp_path)
    code = main([*mode, *options, *overrides])
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.startswith("error: ")
    assert re.search(expected, printed.err), printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert looks_finished(tmp_path / "run") == []
    assert not (tmp_path / "run" / "lock.json").exists()


def test_a_cluster_that_grows_may_be_too_small(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["ray.num_cpus=6", "train.num_workers=6", "ray.autoscaling=true"]
    plan = dry_run([*options, *overrides, "train.label_selector={mipo.io/role: train}"], capsys)
    lines = {line[:16].strip(): line[16:] for line in plan.splitlines()}
    assert "6 workers; reserves 7 CPUs" in lines["training"]
    assert lines["workers"] == (
        "1 CPUs and 0 GPUs each on nodes with labels mipo.io/role=train, PACK; at most 6 CPUs and 0 GPUs; the nodes "
        "have room for 0 now"
    )
    assert lines["autoscaling"].startswith("which nodes can be added is not known before they are asked for; ")
    assert lines["CPUs"].startswith("no node has a GPU now, so that the run will use CPUs; ")
    plan = dry_run([*options, *overrides, "train.gpus_per_worker=0"], capsys)
    assert "no node has a GPU now" not in plan


def test_the_plan_says_what_a_round_must_keep(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "guard" not in dry_run(options, capsys)
    given = ["guard.when_bad=stop", "guard.bounds={self_bleu: null, pmi_initial: {max_fall: 2}}"]
    (line,) = [line for line in dry_run([*options, *given], capsys).splitlines() if line.startswith("guard")]
    assert line.startswith("guard           stop, beside the base: response_tokens min_ratio 0.5, max_ratio 2; trunc")
    assert line.endswith("kl_per_token max_rise 1; pmi_initial max_fall 2")
    assert main(["--dry-run", *options, "guard.when_bad=stop", "guard.bounds={gsm8k.accuracy: {max_fall: 0.1}}"]) == 2
    assert "error: guard.bounds: gsm8k.accuracy: expected a metric of the run's tasks" in capsys.readouterr().err


def test_the_plan_says_which_tasks_are_not_measured(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ["evaluate.tasks=[gsm8k, svamp]", "evaluate.enabled=false"]
    line = "tasks           gsm8k, svamp: not measured (evaluate.enabled=false)\n"
    assert line in dry_run([*options, *tasks], capsys)
    assert "not measured" not in dry_run([*options, "evaluate.enabled=false"], capsys)


@pytest.mark.parametrize(("visible", "gpus"), [("0,1,2", 3), ("", 0), ("-1", 0)])
def test_gpus_that_are_hidden_are_not_planned_with(
    visible: str,
    gpus: int,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    plan = dry_run(options, capsys)
    assert ("bfloat16" in plan) == (gpus > 0)
    monkeypatch.setenv("RAY_ADDRESS", "")  # set to nothing is not set
    code = main(["--dry-run", *options, f"generation.pool.tensor_parallel_size={max(gpus, 1)}"])
    assert code == 0
    code = main(["--dry-run", *options, f"generation.pool.gpus_per_engine={gpus + 1}"])
    assert code == 2
    assert f"generation needs {gpus + 1} GPUs and the cluster has {gpus}" in capsys.readouterr().err


# Run directories with work in them.


def entry(value: float, change: float | None = None) -> dict[str, Any]:
    figures = {"value": value, "low": value - 1, "high": value + 1, "n": 6, "unit": "tokens"}
    if change is not None:
        figures |= {"change": change, "change_low": change - 1, "change_high": change + 1}
    return figures


def finish_stages(options: list[str], stages: int | None = None) -> RunDirectory:
    """A run directory with the first `stages` stages finished (all: None), each with a small file."""
    config = load_config(options[0], options[1:])
    run = open_run(config.run_dir)
    plan = make_plan(check_inputs(config, run), [Node(CPU_ONLY)])
    record_config(run, config)
    for stage in plan.stages[:stages]:
        run.write_text(f"{stage}/file.txt", stage)
        commit(run, stage, config)
    return run


@pytest.fixture
def finished_run(options: list[str]) -> RunDirectory:
    run = finish_stages(options)
    results = {
        "base": {"response_tokens": entry(37.5)},
        "0": {"response_tokens": entry(41.5, 4.0)},
        "1": {"response_tokens": entry(42.5, 5.0)},
    }
    run.write_text("results.json", json.dumps(results))
    run.write_text("report.html", "<html></html>")
    return run


def snapshot(run: RunDirectory) -> dict[str, int]:
    return {name: os.stat(run.path(name)).st_mtime_ns for name in run.list_files("")}


def test_a_finished_run_answers_with_its_results(finished_run: RunDirectory, options: list[str]) -> None:
    before = snapshot(finished_run)
    code = (
        "import sys\n"
        "from mipo_ray.run import main\n"
        "code = main(sys.argv[1:])\n"
        "print([name for name in ('torch', 'vllm', 'transformers', 'deepspeed') if name in sys.modules])\n"
        "if 'ray' in sys.modules:\n"
        "    assert not sys.modules['ray'].is_initialized()\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *found, _, last, imported = done.stdout.splitlines()
    assert found[0].split() == ["length", "37.5", "->", "42.5", "tokens", "+5.0", "[+4.0,", "+6.0]", "rose"]
    assert found[1].startswith("(after round 1; ")
    assert last == f"{finished_run.url}: finished before, nothing to do"
    assert imported == "[]"
    assert snapshot(finished_run) == before


def test_the_whole_table_of_a_finished_run(
    finished_run: RunDirectory, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--full", *options]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "[" in line and "interval" not in line]
    assert [row[:4] for row in rows] == [["response_tokens", "tokens", "37.5", "0"], ["1", "42.5", "+5.0", "[+4.0,"]]
    assert "41.5" in rows[0]


def test_a_finished_run_answers_machines_and_the_quiet(
    finished_run: RunDirectory, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--json", *options]) == 0
    (end,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (end["event"], end["run_dir"]) == ("end", finished_run.url)
    (found,) = end["findings"]
    assert (found["measure"], found["base"], found["value"], found["change_low"]) == ("response_tokens", 37.5, 42.5, 4)
    assert main(["--quiet", *options]) == 0
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--quiet", "--json", *options])


@pytest.mark.parametrize("display", ["auto", "quiet", "json"])
def test_a_run_is_shown_as_asked(
    display: str, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With stand-ins for the cluster and for the rounds: what they print is not shown, what they say is."""

    def fake_connect(config: Config) -> list[Node]:
        print("Token authentication is enabled for this Ray cluster.")
        return [Node(CPU_ONLY)]

    def fake_run_rounds(plan: Any) -> None:
        print("[State Transition] RUNNING -> SHUTTING_DOWN.", file=sys.stderr)
        say("round 0  generate  started")
        results = {"base": {"response_tokens": entry(37.5)}, "0": {"response_tokens": entry(41.5, 4.0)}}
        plan.run.write_text("results.json", json.dumps(results))

    monkeypatch.setattr("mipo_ray.run.connect", fake_connect)
    monkeypatch.setattr("mipo_ray.loop.run_rounds", fake_run_rounds)
    assert main([*([] if display == "auto" else [f"--{display}"]), *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    if display == "json":
        found = [json.loads(line) for line in lines]
        assert [one["event"] for one in found] == ["message", "message", "end"]
        assert found[0]["text"].startswith("run directory   ")
        lines = [found[1]["text"], found[2]["text"]]
    assert ("round 0  generate  started" in lines) == (display != "quiet")
    assert lines[-1].startswith("finished in 0.0 minutes; results and report: ")
    assert len(lines) == 4 or display != "quiet"
    (file,) = Path("run/logs/libraries").iterdir()
    kept = file.read_text().splitlines()
    assert [line.split()[0] for line in kept] == ["Token", "[State"]


def test_a_mistake_is_json_too(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", *options, "rounds=-1"]) == 2
    printed = capsys.readouterr()
    (error,) = map(json.loads, printed.out.splitlines())
    assert (error["event"], error["kind"]) == ("error", "ConfigError")
    assert printed.err.startswith("error: ")


def test_a_dry_run_over_a_finished_run_says_so(
    finished_run: RunDirectory, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = dry_run(options, capsys)
    assert plan.count("finished\n") == 7
    assert plan.splitlines()[-1] == "finished: nothing to do"


def test_one_round_more_is_work_to_do(
    finished_run: RunDirectory, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = dry_run([*options, "rounds=3"], capsys)
    assert [line.split()[0] for line in plan.splitlines() if line.endswith("to do")] == [
        "rounds/002/generate",
        "rounds/002/train",
        "rounds/002/evaluate",
    ]
    assert plan.splitlines()[-1] == "dry run: nothing was started"


def lose_a_round_of_results(run: RunDirectory) -> None:
    results = json.loads(run.read_text("results.json") or "")
    del results["1"]
    run.write_text("results.json", json.dumps(results))
    os.utime(run.path("report.html"))


def lose_the_results(run: RunDirectory) -> None:
    os.remove(run.path("results.json"))


def lose_the_report(run: RunDirectory) -> None:
    os.remove(run.path("report.html"))


def keep_an_older_report(run: RunDirectory) -> None:
    results_written = os.stat(run.path("results.json")).st_mtime
    os.utime(run.path("report.html"), (results_written - 5, results_written - 5))


@pytest.mark.parametrize(
    "interrupt", [lose_a_round_of_results, lose_the_results, lose_the_report, keep_an_older_report]
)
def test_a_run_killed_after_its_last_stage_is_not_finished_before_its_report(
    interrupt: Callable[[RunDirectory], None],
    finished_run: RunDirectory,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt(finished_run)
    plan = dry_run(options, capsys)
    assert "to do" not in plan
    assert plan.splitlines()[-1] == "dry run: nothing was started"


@pytest.mark.parametrize(("share", "is_said"), [(0.75, True), (0.4, False)])
def test_the_plan_warns_where_the_limit_cut_most_of_the_bases_answers(
    options: list[str], capsys: pytest.CaptureFixture[str], share: float, is_said: bool
) -> None:
    options = [*options, "filters.truncated=drop"]
    config = load_config(options[0], options[1:])
    run = open_run(config.run_dir)
    record_config(run, config)
    cut = Entry(share, share - 0.1, share + 0.1, 12, "share", None)
    commit(run, "base/evaluate", config, results={"truncated": cut})
    assert main(["--dry-run", *options]) == 0
    said = "warning         the limit (generation.sampling.max_tokens 48) cut 75% of the base's held-out answers, and "
    assert (said in capsys.readouterr().out) == is_said


def test_the_plan_says_what_would_be_resumed(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    finish_stages(options, stages=3)
    plan = dry_run(options, capsys)
    states = {line.split()[0]: line.split()[1:] for line in plan.splitlines() if line.startswith("  ")}
    assert [name for name, state in states.items() if state == ["finished"]] == [
        "base/evaluate",
        "rounds/000/generate",
        "rounds/000/train",
    ]
    assert len(states) == 7


@pytest.mark.parametrize("mode", [["--dry-run"], []], ids=["dry-run", "run"])
def test_another_configuration_over_finished_work_is_refused(
    mode: list[str], finished_run: RunDirectory, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(finished_run)
    assert main([*mode, *options, "train.beta=0.3"]) == 2
    printed = capsys.readouterr().err
    assert "holds work of another configuration" in printed
    assert "  train.beta: 0.1 there, 0.3 now" in printed
    assert snapshot(finished_run) == before


@pytest.mark.parametrize("mode", [["--dry-run"], []], ids=["dry-run", "run"])
def test_a_damaged_stage_is_named(
    mode: list[str], finished_run: RunDirectory, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = finished_run.path("rounds/000/train/file.txt")
    os.remove(damaged)
    assert main([*mode, *options]) == 2
    assert f"error: {damaged}: the finished stage rounds/000/train is damaged" in capsys.readouterr().err


def test_a_run_directory_in_use_is_refused(
    finished_run: RunDirectory, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with hold_lock(finished_run):
        assert main(options) == 2
    assert f"error: {finished_run.url}: in use by process {os.getpid()} on " in capsys.readouterr().err
