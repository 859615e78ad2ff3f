"""What the sections share: one definition of the fields and the checks that several of them have.

python -m pytest tests/unit/config/test_base.py
"""

from __future__ import annotations

import functools

import pytest

from mipo_ray.config.recipe import ConfigError, fields, load_config

INFOS = dict(fields())
SET_BY_FIELDS = [
    *("model", "tokenizer", "dtype", "max_model_len", "tensor_parallel_size", "trust_remote_code"),
    *("generation_config", "logprobs_mode"),
]


@pytest.mark.parametrize("section", ["generation.pool", "evaluate.judge"])
@pytest.mark.parametrize("name", SET_BY_FIELDS)
def test_no_engine_is_told_by_raw_arguments_what_fields_say(section: str, name: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(overrides=[f"{section}.engine_args.{name}=x", f"{section}.engine_args.seed=1"])
    assert str(error.value) == f"{section}: engine_args.{name} is set by the configuration itself; remove it"
    found = load_config(overrides=[f"{section}.engine_args.max_num_seqs=4"])
    assert functools.reduce(getattr, section.split("."), found).engine_args == {"max_num_seqs": 4}


@pytest.mark.parametrize("name", ["hf_overrides", "load_format", "quantization", "revision"])
def test_a_judge_may_be_loaded_in_other_ways_than_its_files_say_and_the_policy_not(name: str) -> None:
    load_config(overrides=[f"evaluate.judge.engine_args.{name}=x"])
    with pytest.raises(ConfigError, match=f"generation.pool: engine_args.{name} would make .* another model"):
        load_config(overrides=[f"generation.pool.engine_args.{name}=x"])


@pytest.mark.parametrize(
    ("fewest", "most"), [("generation.pool.min_size", "max_size"), ("train.min_workers", "num_workers")]
)
def test_a_least_number_is_at_most_the_largest(fewest: str, most: str) -> None:
    section, name = fewest.rsplit(".", 1)
    load_config(overrides=[f"{fewest}=3", f"{section}.{most}=3"])
    with pytest.raises(ConfigError) as error:
        load_config(overrides=[f"{fewest}=3", f"{section}.{most}=2"])
    assert str(error.value) == f"{section}: {name} (3) is larger than {most} (2)"


@pytest.mark.parametrize(
    ("answer", "window", "message"),
    [
        (
            "generation.sampling.max_tokens",
            "model.max_model_len",
            "generation.sampling.max_tokens (64) leaves no room for a prompt in model.max_model_len (64)",
        ),
        (
            "evaluate.judge.max_tokens",
            "evaluate.judge.max_model_len",
            "evaluate.judge: max_tokens (64) leaves no room for a prompt in max_model_len (64)",
        ),
    ],
)
def test_an_answer_leaves_room_for_its_prompt(answer: str, window: str, message: str) -> None:
    judge = "evaluate.judge.model=org/judge"
    load_config(overrides=[judge, f"{answer}=64", f"{window}=65"])
    with pytest.raises(ConfigError) as error:
        load_config(overrides=[judge, f"{answer}=64", f"{window}=64"])
    assert str(error.value) == message
    if answer.startswith("evaluate"):  # who judges behind an endpoint has a window of its own
        load_config(overrides=[judge, f"{answer}=64", f"{window}=64", "evaluate.judge.endpoint=http://host:1/v1"])


def test_engines_and_workers_are_placed_by_fields_of_one_form() -> None:
    for ending, default in (("gpus_per_", None), ("cpus_per_", 1.0), ("label_selector", {})):
        one, other = (
            info
            for path, info in INFOS.items()
            if path.startswith(("generation.pool.", "train.")) and path.rsplit(".", 1)[1].startswith(ending)
        )
        assert (one.default, other.default) == (default, default)
        assert one.annotation == other.annotation
        assert one.json_schema_extra == other.json_schema_extra == {"execution_only": True}


def test_a_mutable_default_is_not_shared() -> None:
    one, other = load_config(), load_config()
    assert one.train.label_selector is not other.train.label_selector
    assert one.evaluate.tasks is not other.evaluate.tasks
