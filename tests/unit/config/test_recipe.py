"""Recipes, overrides and what they refuse.

python -m pytest tests/unit/config/test_recipe.py
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mipo_ray.config.guard import DEFAULT_BOUNDS
from mipo_ray.config.recipe import (
    ConfigError,
    config_hash,
    fields,
    load_config,
    load_run_config,
    split_arguments,
    to_yaml,
)
from mipo_ray.config.schema import Config

# What may change between two calls over one run directory, written out by hand.
EXECUTION_ONLY = {
    "evaluate.primary",
    "run_dir",
    "rounds",
    "schedule",
    "evaluate.schedule",
    "trackers",
    "guard.when_bad",
    "guard.bounds",
    "cost.gpu",
    "cost.gpu_hour_dollars",
    "cost.earlier_runs",
    "generation.pool.min_size",
    "generation.pool.max_size",
    "generation.pool.lifetime",
    "generation.pool.tensor_parallel_size",
    "generation.pool.gpus_per_engine",
    "generation.pool.cpus_per_engine",
    "generation.pool.batches_in_flight",
    "generation.pool.engine_args",
    "generation.pool.label_selector",
    "generation.stall_minutes",
    "generation.max_quarantined_share",
    "filters.max_dropped_share",
    "train.offload_reference",
    "train.layout",
    "train.attention",
    "train.micro_batch_tokens",
    "train.gradient_checkpointing",
    "train.torch_compile",
    "train.num_workers",
    "train.reference_mode",
    "train.min_workers",
    "train.gpus_per_worker",
    "train.cpus_per_worker",
    "train.label_selector",
    "train.placement_strategy",
    "train.zero_stage",
    "train.offload_optimizer",
    "train.offload_parameters",
    "train.checkpoint_steps",
    "train.max_failures",
    "evaluate.matrix",
    "evaluate.scoring_batch_size",
    "evaluate.scorers",
    "prompts.reference_column",
    "evaluate.prompts.reference_column",
    "evaluate.judge.model",
    "evaluate.judge.endpoint",
    "evaluate.judge.protocols",
    "evaluate.judge.pairwise_template",
    "evaluate.judge.pointwise_template",
    "evaluate.judge.temperature",
    "evaluate.judge.max_tokens",
    "evaluate.judge.dtype",
    "evaluate.judge.max_model_len",
    "evaluate.judge.trust_remote_code",
    "evaluate.judge.tensor_parallel_size",
    "evaluate.judge.engine_args",
    "evaluate.judge.api_key_variable",
    "evaluate.judge.max_concurrent_requests",
    "evaluate.judge.timeout_seconds",
    "evaluate.judge.max_retries",
    "evaluate.tasks",
    "evaluate.task_max_model_len",
    "ray.address",
    "ray.num_cpus",
    "ray.autoscaling",
    "ray.wait_timeout_minutes",
}

# Values that differ from the default, where adding to the default would be refused.
PROMPTS_VALUES: dict[str, Any] = {
    "limit": 7,
    "system": "Be short.",
    "loader": "prism",
    "profiles_path": "survey.jsonl",
    "question_template": "{{ question }}",
    "exemplars": [{"question": "1 + 1?", "answer": "2"}],
    "context_role": "system",
    "context_template": "{{ context }}: {{ question }}",
}
OTHER_VALUES: dict[str, Any] = {
    **{f"prompts.{key}": value for key, value in PROMPTS_VALUES.items()},
    **{f"evaluate.prompts.{key}": value for key, value in PROMPTS_VALUES.items()},
    "prompts.control_tokens": "refuse",
    "preference.chooser": "judge",
    "evaluate.primary": "pmi_initial",
    "model.dtype": "bfloat16",
    "model.thought_marks": [["<cot>", "</cot>"]],
    "filters.thoughts": "drop",
    "filters.truncated": "drop",
    "prompts.revision": "v1",
    "evaluate.prompts.revision": "v1",
    "model.revision": "v1",
    "conditioning.strategy": "random_prompt",
    "conditioning.mixture": {"random_prompt": 2.0},
    "conditioning.fallback": "drop",
    "conditioning.similar.model": "org/name",
    "generation.pairing": "all",
    "filters.equal_answers": "number",
    "trackers": ["tensorboard"],
    "guard.when_bad": "stop",
    "guard.bounds": {**DEFAULT_BOUNDS, "self_bleu": {"max_rise": 0.5}, "kl_per_token": None},
    "cost.gpu": "A100",
    "cost.gpu_hour_dollars": 1.5,
    "cost.earlier_runs": ["runs/before"],
    "filters.max_length_ratio": 3.0,
    "filters.min_pmi": 1.0,
    "filters.patterns": [{"name": "refusal", "regex": "cannot"}],
    "generation.sampling.top_p": 0.5,
    "generation.pool.gpus_per_engine": 1.0,
    "generation.pool.label_selector": {"mipo.io/role": "generate"},
    "train.objective": "ipo",
    "train.reference": "initial",
    "train.reference_mode": "cached",
    "train.lora.target_modules": ["q_proj"],
    "train.adam_betas": [0.8, 0.9],
    "train.layout": "packed",
    "train.attention": "flex_attention",
    "train.min_workers": 1,
    "train.gpus_per_worker": 1.0,
    "train.label_selector": {"mipo.io/role": "train"},
    "train.placement_strategy": "SPREAD",
    "train.zero_stage": 3,
    "train.checkpoint_steps": 50,
    "evaluate.judge.model": "org/judge",
    "evaluate.judge.endpoint": "http://localhost:8000/v1",
    "evaluate.judge.protocols": ["pointwise"],
    "evaluate.judge.pairwise_template": "pairwise.j2",
    "evaluate.judge.pointwise_template": "pointwise.j2",
    "evaluate.judge.dtype": "bfloat16",
    "evaluate.judge.tensor_parallel_size": 2,
    "evaluate.tasks": {"gsm8k": {"limit": 5}},
    "evaluate.task_max_model_len": 2048,
    "pairs.format": "trl",
    "pairs.limit": 7,
    "ray.address": "auto",
    "generation.pool.lifetime": "stage",
    "schedule": "streaming",
    "evaluate.schedule": "overlapping",
    "ray.num_cpus": 9,
}

ON_PAIRS = {"rounds": 1, "evaluate": {"enabled": False}, "pairs": {"path": "a.jsonl"}}

# Values of other fields without which a field could not be changed.
BY_JUDGE = {"evaluate": {"judge": {"model": "org/judge", "endpoint": "http://localhost/v1"}}}
NEEDED_BESIDE: dict[str, dict[str, Any]] = {
    "model.revision": {"model": {"path": "org/name"}},
    "prompts.revision": {"prompts": {"path": "hf://datasets/org/name/x.jsonl"}},
    "evaluate.prompts.revision": {"evaluate": {"prompts": {"path": "hf://datasets/org/name/x.jsonl"}}},
    "pairs.path": ON_PAIRS,
    "pairs.format": ON_PAIRS,
    "pairs.limit": ON_PAIRS,
    "preference.chooser": BY_JUDGE,
    "preference.function": {"preference": {"chooser": "function", "function": "rewards:short"}},
    "preference.samples": {"preference": {"chooser": "function", "function": "rewards:short"}},
    "conditioning.mixture": {"conditioning": {"strategy": "mixture", "mixture": {"random_prompt": 1.0}}},
    "generation.samples_per_prompt": {"generation": {"pairing": "all"}},
    "generation.pool.min_size": {"generation": {"pool": {"max_size": 2}}},
    "train.offload_parameters": {"train": {"zero_stage": 3}},
    "evaluate.judge.endpoint": {"evaluate": {"judge": {"model": "org/judge"}}},
    "evaluate.prompts.reference_column": {"evaluate": {"prompts": {"path": "held_out.jsonl"}}},
}


def value_at(config: Config, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), config)


def nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def merged(values: dict[str, Any], path: dict[str, Any]) -> dict[str, Any]:
    """`values` with the one leaf of a `nested` dict set."""
    ((key, value),) = path.items()
    if isinstance(value, dict) and isinstance(values.get(key), dict) and key != "mixture":
        value = merged(values[key], value)
    return values | {key: value}


def other_value(path: str, default: Any) -> Any:
    if path in OTHER_VALUES:
        return OTHER_VALUES[path]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return default / 2 if default else 0.25
    if isinstance(default, str):
        return default + "x"
    if isinstance(default, dict):
        return {"key": 1}
    raise AssertionError(f"{path}: give another value than {default!r} in OTHER_VALUES")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("pmi", "found 'pmi'"),
        ("corpus_distinct_2", "found 'corpus_distinct_2', which has no interval"),
        ("context_pmi_echo", "found 'context_pmi_echo', which only a rise has"),
    ],
)
def test_a_primary_measure_is_one_that_is_measured_with_an_interval(name: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[f"evaluate.primary={name}"])
    message = str(caught.value)
    assert message.startswith("evaluate.primary: expected one of reward_accuracy, reward_margin, context_pmi_initial, ")
    assert message.endswith(found)
    for measured in ("kl_per_token", "context_pmi_matched", "pmi_adjusted", "context_pmi_copy_free"):
        assert load_config(overrides=[f"evaluate.primary={measured}"]).evaluate.primary == measured


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.bata=0.2", "train.bata: unknown key; did you mean train.beta?"),
        ("train.rank=8", "train.rank: unknown key; did you mean train.lora.rank?"),
        ("trian.beta=0.2", "trian: unknown key; did you mean train?"),
        ("evaluate.prompts.colum=q", "evaluate.prompts.colum: unknown key; did you mean evaluate.prompts.column?"),
        ("train.temperature=1", "train.temperature: unknown key; did you mean generation.sampling.temperature?"),
        ("zzzzzz=1", "zzzzzz: unknown key"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_name(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[override])
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("override", "key", "found"),
    [
        ("rounds=two", "rounds", "'two'"),
        ("rounds=1.5", "rounds", "1.5"),
        ("rounds=true", "rounds", "True"),
        ("rounds=0", "rounds", "0"),
        ("seed=-1", "seed", "-1"),
        ("train.beta=0", "train.beta", "0"),
        ("train.beta=-0.1", "train.beta", "-0.1"),
        ("train.beta=.nan", "train.beta", "nan"),
        ("train.beta=.inf", "train.beta", "inf"),
        ("train.beta=", "train.beta", "None"),
        ("train.label_smoothing=0.5", "train.label_smoothing", "0.5"),
        ("train.zero_stage=4", "train.zero_stage", "4"),
        ("train.micro_batch_tokens=0", "train.micro_batch_tokens", "0"),
        ("train.min_workers=0", "train.min_workers", "0"),
        ("train.checkpoint_steps=0", "train.checkpoint_steps", "0"),
        ("train.objective=simpo", "train.objective", "'simpo'"),
        ("train.lora.rank=-1", "train.lora.rank", "-1"),
        ("train.lora.target_modules=q_proj", "train.lora.target_modules", "'q_proj'"),
        ("train.adam_betas=[0.9]", "train.adam_betas", "0.9"),
        ("model.dtype=float16", "model.dtype", "'float16'"),
        ("conditioning.strategy=random", "conditioning.strategy", "'random'"),
        ("evaluate.enabled=1", "evaluate.enabled", "1"),
        ("train=3", "train", "3"),
    ],
)
def test_wrong_values_name_key_and_value(override: str, key: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[override])
    message = str(caught.value)
    assert message.startswith(key)
    assert found in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["generation.pool.min_size=3", "generation.pool.max_size=2"], "generation.pool: min_size (3) is larger than"),
        (["train.min_workers=3", "train.num_workers=2"], "train: min_workers (3) is larger than num_workers (2)"),
        (["generation.sampling.max_tokens=64", "model.max_model_len=64"], "generation.sampling.max_tokens (64) leaves"),
        (["filters.min_length_ratio=2", "filters.max_length_ratio=1"], "filters: min_length_ratio (2.0) is above"),
        (["generation.sampling.min_tokens=49"], "generation.sampling.min_tokens is larger"),
        (["generation.pool.engine_args={dtype: half}"], "generation.pool: engine_args.dtype is set by"),
        (["generation.pool.engine_args={hf_overrides: {}}"], "generation.pool: engine_args.hf_overrides would make"),
        (["generation.pool.engine_args={quantization: fp8}"], "generation.pool: engine_args.quantization would make"),
        (["generation.pool.engine_args={load_format: dummy}"], "generation.pool: engine_args.load_format would make"),
    ],
)
def test_contradictions_are_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides)
    assert str(caught.value).startswith(expected)


OWN_PAIRS = ["pairs.path=a.jsonl", "rounds=1", "evaluate.enabled=false"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["pairs.limit=3"], "pairs.limit says how pairs.path is read"),
        (["pairs.format=trl"], "pairs.format says how pairs.path is read"),
        ([*OWN_PAIRS, "rounds=2"], "pairs.path holds the pairs of one round: expected rounds=1, found 2"),
        ([*OWN_PAIRS, "train.objective=sami"], "train.objective sami compares two prompts"),
        ([*OWN_PAIRS, "schedule=streaming"], "schedule streaming trains while pairs are sampled"),
        ([*OWN_PAIRS, "evaluate.schedule=overlapping"], "evaluate.schedule overlapping evaluates while pairs are"),
        ([*OWN_PAIRS, "evaluate.enabled=true"], "with pairs.path a run measures on held-out prompts of your own"),
        (
            [*OWN_PAIRS, "prompts.system=Be kind.", "generation.pairing=all", "filters.min_pmi=1"],
            "prompts.system, generation.pairing, filters.min_pmi: expected only what training on pairs.path reads",
        ),
        ([*OWN_PAIRS, "conditioning.strategy=random_prompt"], "conditioning.strategy: expected only"),
    ],
)
def test_what_makes_no_sense_beside_pairs_that_exist_is_refused_by_name(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides)
    assert str(caught.value).startswith(expected)


def test_what_pairs_that_exist_share_with_sampled_ones_may_be_set() -> None:
    shared = ["prompts.template_arguments={enable_thinking: false}", "prompts.control_tokens=refuse", "pairs.limit=3"]
    shared += ["filters.max_length_ratio=2", "train.objective=infonce", "schedule=sequential"]
    assert not load_config(overrides=[*OWN_PAIRS, *shared]).starts_engines
    measured = ["evaluate.enabled=true", "evaluate.prompts.path=mine.jsonl", "conditioning.strategy=random_prompt"]
    assert load_config(overrides=[*OWN_PAIRS, *measured]).starts_engines


def test_a_run_on_pairs_that_exist_reads_its_own_configuration_back() -> None:
    config = load_config(overrides=[*OWN_PAIRS, "pairs.format=ms-swift"])
    assert load_run_config(to_yaml(config), "config.yaml") == config


def test_values_on_the_border_of_a_contradiction_are_taken() -> None:
    config = load_config(
        overrides=[
            "generation.pool.min_size=2",
            "generation.pool.max_size=2",
            "train.num_workers=3",
            "train.min_workers=3",
            "generation.sampling.max_tokens=63",
            "model.max_model_len=64",
            "filters.min_length_ratio=1",
            "filters.max_length_ratio=1",
        ]
    )
    assert config.generation.sampling.max_tokens == 63


def test_every_wrong_key_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=["train.beta=0", "rounds=none", "sede=1"])
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["rounds", "train.beta", "sede"]


@pytest.mark.parametrize(
    ("text", "number"), [("1e-5", 1e-5), ("5E-7", 5e-7), ("1.5e-4", 1.5e-4), ("2e+0", 2.0), (".5e-3", 5e-4)]
)
def test_scientific_notation_is_a_number(text: str, number: float, tmp_path: Path) -> None:
    assert load_config(overrides=[f"train.learning_rate={text}"]).train.learning_rate == number
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"train:\n  learning_rate: {text}\n")
    assert load_config(recipe).train.learning_rate == number


@pytest.mark.parametrize("text", ["1e5", "7", "true", "null", "2020-01-01", "{{ question }}"])
def test_quotes_keep_text_what_it_is(text: str) -> None:
    config = load_config(overrides=[f'prompts.column="{text}"'])
    assert config.prompts.column == text


@pytest.mark.parametrize(
    "text",
    [
        "exp #1",
        "#be brief",
        "#",
        "exp [1]",
        "[draft] #2",
        "Note: be brief",
        "- be brief",
        "? why",
        "one\ntwo",
        "one\n\ntwo\n",
        " led and trailed ",
        "'half quoted",
        '"quoted" and not',
        "it''s",
        "{{ question }}",
        "[1",
        "2020-01-01",
        "2020-13-45",
        "12:30",
        "&name",
        "*name",
        "!tag text",
        "!!str 5",
        "| text",
        "> text",
        "%50",
        "@home",
        "`x`",
        "--- text",
        "a=b",
        "7 # lucky",
        "null # nothing",
        "back\\slash",
        "übung 中文",
        "bell \x07",
        "a\tb",
    ],
)
def test_an_override_is_what_was_typed(text: str) -> None:
    for key in ("run_dir", "prompts.system", "prompts.question_template", "model.path"):
        config: Any = load_config(overrides=[f"{key}={text}"])
        for part in key.split("."):
            config = getattr(config, part)
        assert config == text


@given(text=st.text(max_size=30))
def test_an_override_is_what_was_typed_whatever_it_is(text: str) -> None:
    """No number, null or list of YAML begins with an x; text in quotes is what a quoted string of JSON is."""
    assert load_config(overrides=[f"prompts.system=x{text}"]).prompts.system == f"x{text}"
    quoted = json.dumps(text, ensure_ascii=False)
    if yaml.reader.Reader.NON_PRINTABLE.search(quoted) is None and not set(quoted) & set("\x85\u2028\u2029\ufeff"):
        assert load_config(overrides=[f"prompts.system={quoted}"]).prompts.system == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("prompts.system=", None),
        ("prompts.system=null", None),
        ("prompts.system= ~ ", None),
        ("prompts.limit=1_000", 1000),
        ("evaluate.enabled=no", False),
        ("trackers=[tensorboard]", ("tensorboard",)),
        ("train.deepspeed={a: '#1', b: [2, x y]}", {"a": "#1", "b": [2, "x y"]}),
        ("train.deepspeed={a: 1, # one\n b: 2}", {"a": 1, "b": 2}),
        ("prompts.system='it''s'", "it's"),
        ('prompts.system="a\\nb"', "a\nb"),
    ],
)
def test_an_override_that_is_plainly_yaml_is_its_value(override: str, value: Any) -> None:
    config: Any = load_config(overrides=[override])
    for part in override.partition("=")[0].split("."):
        config = getattr(config, part)
    assert config == value


@pytest.mark.parametrize("text", ["7", "no", "[x]", "1e5"])
def test_what_yaml_takes_for_another_type_is_refused_with_the_way_to_mean_text(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"; for text, put it in quotes: run_dir='\"{text}\"'")):
        load_config(overrides=[f"run_dir={text}"])
    assert load_config(overrides=[f'run_dir="{text}"']).run_dir == text


def test_a_comment_in_the_place_of_a_number_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^rounds: .*; found '7 # lucky'$"):
        load_config(overrides=["rounds=7 # lucky"])


def test_a_run_may_be_called_by_a_date_in_a_recipe_too(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run_dir: 2026-01-31\n")
    assert load_config(recipe).run_dir == "2026-01-31"


def test_words_of_the_command_line_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path with an equals sign is a path, also one without a slash before it, where it is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    (tmp_path / "a=b/recipe.yaml").write_text("")
    places = [
        "recipe.yaml",
        "x/beta=1/recipe.yaml",
        "/context=none/r.yaml",
        "./rounds=2",
        "a=b/recipe.yaml",
        "s3://b/c=d",
    ]
    overrides = [
        "rounds=2",
        "train.beta=1",
        "prompts.path=a/b=c.jsonl",
        "bata=1",
        "a=c/recipe.yaml",
        "run_dir=x/y",
        "arms.x=1",
    ]
    for arguments in (places + overrides, overrides + places):
        assert split_arguments(arguments) == (places, overrides)
    assert split_arguments(["seeds=a/b", "rounds/x=1"], ("seeds",)) == (["rounds/x=1"], ["seeds=a/b"])


@pytest.mark.parametrize("override", ["train.beta", "=3", ""])
def test_an_override_without_key_or_value_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="expected key=value"):
        load_config(overrides=[override])


def test_overrides_win_over_the_recipe_and_later_ones_over_earlier_ones(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rounds: 5\nseed: 3\ntrain:\n  beta: 0.3\n  epochs: 2\n")
    config = load_config(recipe, ["train.beta=0.4", "seed=1", "seed=2"])
    assert (config.rounds, config.seed, config.train.beta, config.train.epochs) == (5, 2, 0.4, 2)


def test_an_override_below_a_value_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rounds: 5\n")
    with pytest.raises(ConfigError, match=r"rounds\.number: rounds is a value, not a section"):
        load_config(recipe, ["rounds.number=1"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"train: [1, 2\n", "not valid YAML"),
        (b"- rounds: 2\n", "expected a mapping of configuration keys, found list"),
        (b"two rounds\n", "expected a mapping of configuration keys, found str"),
        (b"run_dir: \xff\xfe\n", "expected UTF-8 text"),
        (b"run_dir: !!python/object:os.system x\n", "not valid YAML"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_named(content: bytes, expected: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(recipe)
    assert str(caught.value).startswith(f"{recipe}: {expected}")


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: cannot read the recipe: No such file"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot read the recipe: Is a directory"):
        load_config(tmp_path)


# Recipes that build on others.


def write_recipes(directory: Path, recipes: dict[str, str]) -> Path:
    """Writes recipes by name; returns the path of the first one."""
    for name, content in recipes.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return directory / next(iter(recipes))


def test_later_bases_override_earlier_ones_and_the_recipe_them_all(tmp_path: Path) -> None:
    recipe = write_recipes(
        tmp_path,
        {
            "paper/job.yaml": "base: [../tasks/task.yaml, ../model.yaml]\nrounds: 5\ntrain: {epochs: 9}",
            "tasks/task.yaml": "base: ../shared.yaml\nseed: 2\nrounds: 2\ntrain: {epochs: 2, beta: 0.2}",
            "model.yaml": "seed: 3\ntrain: {epochs: 3}\nmodel: {path: org/name}",
            "shared.yaml": "seed: 1\ntrain: {beta: 0.1, learning_rate: 1e-5}",
        },
    )
    config = load_config(recipe, ["train.warmup_ratio=0.5"])
    assert (config.rounds, config.seed, config.model.path) == (5, 3, "org/name")
    train = config.train
    assert (train.epochs, train.beta, train.learning_rate, train.warmup_ratio) == (9, 0.2, 1e-5, 0.5)


def test_a_base_of_two_bases_does_not_override_the_first_one(tmp_path: Path) -> None:
    recipe = write_recipes(
        tmp_path,
        {
            "job.yaml": "base: [first.yaml, second.yaml]",
            "first.yaml": "base: shared.yaml\nseed: 2",
            "second.yaml": "base: [./shared.yaml]\nrounds: 3",
            "shared.yaml": "seed: 1\nrounds: 1",
        },
    )
    config = load_config(recipe)
    assert (config.seed, config.rounds) == (2, 3)


def test_mappings_are_merged_and_lists_and_mixtures_replaced(tmp_path: Path) -> None:
    recipe = write_recipes(
        tmp_path,
        {
            "job.yaml": (
                "base: base.yaml\n"
                "conditioning: {mixture: {swapped_response: 1}}\n"
                "prompts: {exemplars: [{question: c, answer: d}]}\n"
                "generation: {pool: {engine_args: {max_num_seqs: 8}}}\n"
            ),
            "base.yaml": (
                "conditioning: {strategy: mixture, mixture: {random_prompt: 1}}\n"
                "prompts: {exemplars: [{question: a, answer: b}, {question: c, answer: d}]}\n"
                "generation: {pool: {engine_args: {enforce_eager: true}}}\n"
            ),
        },
    )
    config = load_config(recipe)
    assert config.conditioning.mixture == {"swapped_response": 1.0}
    assert [exemplar.question for exemplar in config.prompts.exemplars] == ["c"]
    assert config.generation.pool.engine_args == {"enforce_eager": True, "max_num_seqs": 8}
    alone = load_config(recipe, ["conditioning.strategy=random_prompt", "conditioning.mixture={}"])
    assert alone.conditioning.strategies == ("random_prompt",)


def test_an_override_changes_one_of_two_aliases(tmp_path: Path) -> None:
    content = "prompts: &style {system: Be short.}\nevaluate: {prompts: *style}"
    config = load_config(write_recipes(tmp_path, {"job.yaml": content}), ["evaluate.prompts.path=held_out.jsonl"])
    assert config.prompts.system == config.evaluate.prompts.system == "Be short."
    assert (config.prompts.path, config.evaluate.prompts.path) == (Config().prompts.path, "held_out.jsonl")
    assert "&" not in to_yaml(config)


@pytest.mark.parametrize(
    ("recipes", "expected"),
    [
        ({"a.yaml": "base: a.yaml"}, "{0}/a.yaml -> {0}/a.yaml: a recipe cannot be its own base"),
        (
            {"a.yaml": "base: b/c.yaml", "b/c.yaml": "base: [d.yaml]", "b/d.yaml": "base: ../a.yaml"},
            "{0}/a.yaml -> {0}/b/c.yaml -> {0}/b/d.yaml -> {0}/a.yaml: a recipe cannot be its own base",
        ),
        (
            {"a.yaml": "base: b.yaml", "b.yaml": "base: missing.yaml"},
            "{0}/a.yaml -> {0}/b.yaml -> {0}/missing.yaml: cannot read the recipe: No such file or directory",
        ),
        (
            {"a.yaml": "base: b.yaml", "b.yaml": "- rounds"},
            "{0}/a.yaml -> {0}/b.yaml: expected a mapping of configuration keys, found list",
        ),
        (
            {"a.yaml": "base: [b.yaml, 3]", "b.yaml": ""},
            "{0}/a.yaml: base: expected the file name of a recipe, or a list of them; found ['b.yaml', 3]",
        ),
        (
            {"a.yaml": "base: {name: b.yaml}"},
            "{0}/a.yaml: base: expected the file name of a recipe, or a list of them; found [{{'name': 'b.yaml'}}]",
        ),
        # A wrong value is named with the base that it stands in.
        (
            {"a.yaml": "base: b.yaml", "b.yaml": "train: {bata: 0.2}"},
            "train.bata: unknown key; did you mean train.beta?; in {0}/b.yaml",
        ),
        (
            {"a.yaml": "base: b.yaml\nseed: -1", "b.yaml": "seed: 1\nrounds: 0"},
            "rounds: Input should be greater than 0; found 0; in {0}/b.yaml\n"
            "seed: Input should be greater than or equal to 0; found -1",
        ),
        (
            {"a.yaml": "base: b.yaml", "b.yaml": "prompts: {exemplars: [{question: q}]}"},
            "prompts.exemplars.0.answer: Field required; found {{'question': 'q'}}; in {0}/b.yaml",
        ),
    ],
)
def test_bases_that_cannot_be_used_are_named(recipes: dict[str, str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write_recipes(tmp_path, recipes))
    assert str(caught.value) == expected.format(tmp_path)


def test_an_override_in_place_of_a_bases_value_is_not_blamed_on_the_base(tmp_path: Path) -> None:
    recipe = write_recipes(tmp_path, {"a.yaml": "base: b.yaml", "b.yaml": "seed: 1"})
    with pytest.raises(ConfigError, match=r"found -1$"):
        load_config(recipe, ["seed=-1"])


def test_an_empty_recipe_is_the_default(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# nothing yet\n")
    assert load_config(recipe) == load_config() == Config()


TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1) | st.sampled_from(
    ["1e5", "-2E-3", "null", "yes", "1_000", "0x1f", "12:30:45", "2020-01-01", "~", "{a: 1}", " padded ", "a\nb"]
)


@settings(deadline=None, max_examples=50)
@example(text="a", system=None, rate=1e-5, betas=(0.9, 0.95), engine_args={"limit": float("inf")})
@given(
    text=TEXTS,
    system=st.none() | TEXTS,
    rate=st.floats(min_value=1e-12, max_value=1e3),
    betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    engine_args=st.dictionaries(TEXTS, st.booleans() | st.integers() | TEXTS | st.floats(allow_nan=False), max_size=3),
)
def test_written_configuration_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    text: str,
    system: str | None,
    rate: float,
    betas: tuple[float, float],
    engine_args: dict[str, Any],
) -> None:
    config = Config.model_validate(
        {
            "run_dir": text,
            "prompts": {"column": text, "system": system},
            "train": {"learning_rate": rate, "adam_betas": betas},
            "generation": {"pool": {"engine_args": {f"x{key}": value for key, value in engine_args.items()}}},
        }
    )
    recipe = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    recipe.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(recipe, trusts_recipe=True) == config


def test_the_hash_ignores_execution_only_fields_and_nothing_else() -> None:
    assert {path for path, _ in fields()} >= EXECUTION_ONLY
    for path, _ in fields():
        values = NEEDED_BESIDE.get(path, {})
        before = Config.model_validate(values)
        old = value_at(before, path)
        changed = Config.model_validate(merged(values, nested(path, other_value(path, old))))
        assert value_at(changed, path) != old, path
        assert (config_hash(changed) == config_hash(before)) == (path in EXECUTION_ONLY), path


def test_the_hash_is_the_same_for_equal_configurations() -> None:
    first = load_config(overrides=["train.beta=0.2", "train.deepspeed={a: 1, b: 2}"])
    second = load_config(overrides=["train.deepspeed={b: 2, a: 1}", "train.beta=2e-1"])
    assert config_hash(first) == config_hash(second)
    assert len(config_hash(first)) == 16


def test_the_configuration_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        typing.cast(Any, Config()).rounds = 3


def test_importing_the_configuration_imports_no_engine() -> None:
    code = (
        "import sys, mipo_ray.config.schema, mipo_ray.config.recipe\n"
        "print([name for name in ('torch', 'ray', 'vllm', 'transformers', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_marks_of_thoughts_are_pairs() -> None:
    marks = load_config(
        None, ['model.thought_marks=[["<cot>", "</cot>"], ["Thought:", "Answer:"]]']
    ).model.thought_marks
    assert marks == (("<cot>", "</cot>"), ("Thought:", "Answer:"))
    for wrong in ("[[a, a]]", '[["", a]]', '[[a, " "]]', "[[a]]", "[a, b]"):
        with pytest.raises(ConfigError, match=r"model\.thought_marks"):
            load_config(None, [f"model.thought_marks={wrong}"])


def test_a_revision_belongs_to_an_id_of_the_hub() -> None:
    assert load_config(overrides=["model.path=a/b", "model.revision=v1"]).model.source == "a/b@v1"
    assert load_config(overrides=["model.path=a/b"]).model.source == "a/b"
    for path, revision in [
        ("embedded", "v1"),
        ("/models/x", "v1"),
        ("s3://a/b", "v1"),
        ("a/b@v1", "v2"),
        ("a/b", "../x"),
    ]:
        with pytest.raises(ConfigError, match=r"^model: revision is a branch, tag or commit of a Hugging Face id"):
            load_config(overrides=[f"model.path={path}", f"model.revision={revision}"])


def test_another_revision_is_another_configuration() -> None:
    one, other = (load_config(overrides=["model.path=a/b", f"model.revision={name}"]) for name in ("v1", "v2"))
    assert config_hash(one) != config_hash(other)
