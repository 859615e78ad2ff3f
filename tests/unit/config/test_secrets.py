"""A secret is planted in every field of the configuration that can hold a text: it is refused and shown nowhere.

python -m pytest tests/unit/config/test_secrets.py
"""

from __future__ import annotations

import functools
import json
import stat
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from mipo_ray.config.recipe import ConfigError, fields, load_config, to_yaml
from mipo_ray.config.schema import Config
from mipo_ray.evaluation.tasks.task import Task
from mipo_ray.monitoring.trackers import run_parameters
from mipo_ray.run import main
from mipo_ray.storage.configuration import check_config, record_config
from mipo_ray.storage.run_directory import StorageError, open_run

SECRET = "wq7Zr4Kd91Lm"
URLS = [f"s3://me:{SECRET}@bucket/x", f"https://host/x.jsonl?X-Amz-Signature={SECRET}"]
FORMS = [*URLS, f"hf_{SECRET}{SECRET}", SECRET]  # the last one as the value of a variable
FIELDS = [path for path, _ in fields()]
# Every value that a field takes is one of these with the text in it; whichever a field does not take is refused too.
SHAPES: list[Any] = [
    lambda text: text,
    lambda text: [text],
    lambda text: {"inner": text},
    lambda text: {text: "inner"},
    lambda text: {"inner": {"deeper": [text]}},
    lambda text: [{"question": text, "answer": "a"}],
    lambda text: [{"name": "mine", "regex": text}],
    lambda text: {"gsm8k": {"path": text}},
    lambda text: [[text, "b"]],
]


@pytest.fixture(autouse=True)
def variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_TOKEN", SECRET)


def planted(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return dict(value)


def refusal(values: dict[str, Any], directory: Path) -> str:
    recipe = directory / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as error:
        load_config(recipe, trusts_recipe=True)
    return str(error.value)


@pytest.mark.parametrize("path", FIELDS)
def test_no_field_takes_a_secret_and_no_message_shows_it(path: str, tmp_path: Path) -> None:
    for text in FORMS:
        for shape in SHAPES:
            assert SECRET not in refusal(planted(path, shape(text)), tmp_path)


@pytest.mark.parametrize("path", FIELDS)
def test_the_reason_is_told_where_the_field_takes_texts(path: str, tmp_path: Path) -> None:
    annotation = functools.reduce(_field_type, path.split("."), Config)
    if annotation not in (str, str | None):
        return
    for text in FORMS:
        message = refusal(planted(path, text), tmp_path)
        assert path in message
        # Fields with a form of their own (names of variables) may refuse it by that.
        assert "holds no secrets" in message or "(not shown)" in message


@pytest.mark.parametrize(
    "path",
    ["generation.pool.engine_args", "evaluate.judge.engine_args", "train.deepspeed", "prompts.template_arguments"],
)
@pytest.mark.parametrize("key", ["hf_token", "api_key", "password", "aws_secret_access_key"])
def test_a_key_that_names_a_secret_is_refused(path: str, key: str, tmp_path: Path) -> None:
    for value in ({key: "any thing"}, {"comet": {key: "any thing"}}, {"list": [{key: ["any thing"]}]}):
        message = refusal(planted(path, value), tmp_path)
        assert "any thing" not in message
        assert "found a secret, as its name says (" in message
        assert f"{key})" in message
        assert "HF_TOKEN" in message
    load_config(None, [f"{path}={{{key}: true}}"])  # hf_token: the one that the machine knows


def test_a_task_file_takes_none() -> None:
    values = {"name": "mine", "version": 1, "kind": "likelihood", "continuation": "text", "options_column": "o"}
    with pytest.raises(ValidationError) as error:
        Task(**values, path=URLS[0], answer_column="a", question_template="{{ q }}")
    assert "a URL with a user's password" in str(error.value)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("text", FORMS)
def test_a_run_directory_is_refused_and_not_shown(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StorageError, match="credentials come from the environment") as error:
        open_run(text)
    assert SECRET not in str(error.value)
    assert main(["--dry-run", f"run_dir={text}"]) == 2
    assert SECRET not in "".join(capsys.readouterr())


@pytest.mark.parametrize("path", ["model.path", "prompts.path", "evaluate.prompts.path", "train.deepspeed"])
def test_a_run_of_an_earlier_version_shows_none(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its config.yaml may hold secrets: the difference does not show them, and trackers do not get them."""
    run = open_run(str(tmp_path / "run"))
    value = {"comet": {"api_key": f"x{SECRET}"}} if path == "train.deepspeed" else f"s3://me:x{SECRET}@bucket/x"
    run.write_text("config.yaml", yaml.safe_dump(planted(path, value)))
    run.write_text("rounds/000/generate/manifest.json", "{}")
    with pytest.raises(StorageError, match="holds work of another configuration") as error:
        check_config(run, load_config())
    assert path in str(error.value)
    assert SECRET not in str(error.value)
    assert SECRET not in json.dumps(run_parameters(run))


def test_files_with_the_configuration_are_for_their_owner(tmp_path: Path) -> None:
    run = open_run(str(tmp_path / "run"))
    record_config(run, load_config())
    run.write_text("report.html", "x")
    run.write_text("results.json", "{}")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").iterdir()}
    assert modes["config.yaml"] == modes["report.html"] == 0o600
    assert modes["results.json"] & 0o600 == 0o600
    assert run.read_text("config.yaml") == to_yaml(load_config())


def _field_type(section: Any, name: str) -> Any:
    return typing.get_type_hints(section)[name]
