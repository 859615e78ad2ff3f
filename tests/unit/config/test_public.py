"""What of a run's settings and texts may be told to others.

python -m pytest tests/unit/config/test_public.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mipo_ray.config.public import LOCAL, NO_PATH, REMOTE, public_file, public_model, public_settings, public_text
from mipo_ray.config.recipe import load_config


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("embedded", "SmolLM2-135M-Instruct (as mipo-ray carries it)"),
        ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
        ("Qwen/Qwen2.5-3B-Instruct@refs/pr/7", "Qwen/Qwen2.5-3B-Instruct@refs/pr/7"),
        ("/home/ada/models/mine", LOCAL),
        ("~/models/mine", LOCAL),
        ("s3://company-bucket/model", REMOTE),
    ],
)
def test_a_model_is_named_where_anybody_can_get_it(source: str, shown: str) -> None:
    assert public_model(source) == shown


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("bundled:instructions", "bundled:instructions"),
        ("hf://datasets/openai/gsm8k/main/train.parquet", "hf://datasets/openai/gsm8k/main/train.parquet"),
        ("data/train.jsonl", LOCAL),  # it has the form of a model's name
        ("../data/train-*.jsonl", LOCAL),
        ("s3://company-bucket/prompts.jsonl", REMOTE),
    ],
)
def test_a_file_is_named_where_anybody_can_get_it(path: str, shown: str) -> None:
    assert public_file(path) == shown


def test_a_directory_is_no_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """models/mine has the form of a name of the Hub, and is a folder here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/mine").mkdir(parents=True)
    assert public_model("models/mine") == LOCAL


def test_settings_are_those_that_differ_and_decide(tmp_path: Path) -> None:
    overrides = [
        f"run_dir={tmp_path}",  # where it ran decides nothing
        "train.beta=0.25",
        "prompts.path=/data/people.jsonl",
        "prompts.template_arguments={tools_path: /data/tools.json, style: short}",
    ]
    settings = public_settings(load_config(None, overrides))
    assert settings["train.beta"] == 0.25
    assert settings["prompts.path"] == LOCAL
    assert settings["prompts.template_arguments"]["style"] == "short"
    assert not any("/data" in f"{name} {value}" for name, value in settings.items())
    assert "run_dir" not in settings
    assert "train.learning_rate" not in settings


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Read /home/ada/notes.txt and answer.", f"Read {NO_PATH} and answer."),
        ("Read ~/notes.txt", f"Read {NO_PATH}"),
        ("from s3://bucket/key", f"from {REMOTE}"),
        ("yes and/or no, /think, 3/4, km/h", "yes and/or no, /think, 3/4, km/h"),
        ("[MIPO](https://arxiv.org/abs/2603.19294)", "[MIPO](https://arxiv.org/abs/2603.19294)"),
        ("datasets/openai/gsm8k", "datasets/openai/gsm8k"),
        ("key hf_abcdefghijklmnopqrstuvwx1234", "key (not shown)"),
    ],
)
def test_texts_keep_words_and_lose_paths(text: str, shown: str) -> None:
    assert public_text(text) == shown


def test_the_place_of_the_run_is_never_told() -> None:
    assert public_text("see D:runs/ours for it", ["D:runs/ours"]) == f"see {NO_PATH} for it"
