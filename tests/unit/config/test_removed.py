"""Fields that are no more: recipes that name one are told so, runs that hold one go on. Values that were renamed are
read by their present names.

python -m pytest tests/unit/config/test_removed.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mipo_ray import evaluate, run
from mipo_ray.comparison.definition import load_comparison
from mipo_ray.config.recipe import ConfigError, config_hash, fields, load_config, load_run_config, to_yaml
from mipo_ray.config.removed import REMOVED, RENAMED_VALUES
from mipo_ray.storage.configuration import check_config, record_config
from mipo_ray.storage.run_directory import StorageError, open_run

CHANGELOG = Path(__file__).parents[3] / "CHANGELOG.md"
every_field = pytest.mark.parametrize("path", REMOVED)


def recipe_with(path: str, value: Any, **others: Any) -> str:
    for name in reversed(path.split(".")):
        value = {name: value}
    return yaml.safe_dump(others | value)


def older_config(path: str, value: Any, **changes: Any) -> str:
    """What an earlier version wrote to config.yaml: every field, and one that is no more."""
    values = yaml.safe_load(to_yaml(load_config())) | changes
    *sections, name = path.split(".")
    section = values
    for one in sections:
        section = section[one]
    section[name] = value
    return yaml.safe_dump(values)


def told(path: str) -> str:
    return f"{path}: was removed in version {REMOVED[path].since}: {REMOVED[path].instead}; take the key out"


@every_field
def test_a_removed_field_is_no_field_and_stands_in_the_changelog(path: str) -> None:
    assert path not in dict(fields())
    removed = CHANGELOG.read_text().split("### Removed")[1].split("\n## ")[0]
    assert f"`{path}`" in removed


@every_field
def test_a_recipe_its_base_and_an_override_are_told_of_a_removed_field(path: str, tmp_path: Path) -> None:
    recipe, base = tmp_path / "recipe.yaml", tmp_path / "base.yaml"
    recipe.write_text(recipe_with(path, 1))
    with pytest.raises(ConfigError) as by_recipe:
        load_config(recipe)
    assert str(by_recipe.value) == told(path)
    with pytest.raises(ConfigError) as by_override:
        load_config(None, [f"{path}=null"])
    assert str(by_override.value) == told(path)
    base.write_text(recipe_with(path, 1))
    recipe.write_text("base: base.yaml\n")
    with pytest.raises(ConfigError) as by_base:
        load_config(recipe)
    assert str(by_base.value) == f"{told(path)}; in {base}"


@every_field
def test_a_comparison_is_told_of_a_removed_field_of_all_arms_or_of_one(path: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), "arms": {"mipo": {}}}))
    with pytest.raises(ConfigError) as of_all:
        load_comparison(recipe, [f"{path}=1"])
    assert str(of_all.value) == told(path)
    with pytest.raises(ConfigError) as of_one:
        load_comparison(recipe, [f"arms.mipo.{path}=1"])
    assert str(of_one.value) == f"arms.mipo.{told(path)}"


@every_field
def test_the_command_ends_with_code_2(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--dry-run", f"run_dir={tmp_path}/run", f"{path}=1"]) == 2
    assert f"error: {told(path)}\n" in capsys.readouterr().err


@every_field
@pytest.mark.parametrize("value", [0, None, "odd", {"deeper": [1]}], ids=repr)
def test_a_run_that_holds_a_removed_field_goes_on_whatever_its_value(path: str, value: Any, tmp_path: Path) -> None:
    directory = open_run(str(tmp_path / "run"))
    directory.write_text("config.yaml", older_config(path, value, run_dir=directory.url))
    directory.write_text("rounds/000/generate/manifest.json", '{"files": {}}')
    config = load_config(None, [f"run_dir={directory.url}"])
    check_config(directory, config)
    text = directory.read_text("config.yaml")
    assert config_hash(load_run_config(text or "", "config.yaml")) == config_hash(config)
    with pytest.raises(StorageError, match=r"train\.beta: 0\.1 there, 0\.7 now"):
        check_config(directory, load_config(None, [f"run_dir={directory.url}", "train.beta=0.7"]))
    # What the run is gone on with holds it no more.
    record_config(directory, config)
    assert load_config(Path(directory.path("config.yaml"))) == config


@every_field
def test_a_run_that_holds_a_removed_field_is_evaluated(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = open_run(str(tmp_path / "run"))
    directory.write_text("config.yaml", older_config(path, 7))
    config, found, trained = evaluate._load(directory.url, ["judge.temperature=0.5"])
    assert (config.run_dir, found.url, trained) == (directory.url, directory.url, [])
    assert config.evaluate.judge.temperature == 0.5
    # An override is what somebody says now, and is told.
    assert evaluate.main(["--dry-run", directory.url, f"{path}=1"]) == 2
    assert told(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rounds: [", "RUN/config.yaml: not valid YAML"),
        ("- rounds", "RUN/config.yaml: expected a mapping of configuration keys, found list"),
        ("train: {betta: 0.2}", "train.betta: unknown key; did you mean train.beta?"),
    ],
)
def test_a_damaged_configuration_of_a_run_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_run_config(text, "RUN/config.yaml")
    assert str(error.value).startswith(message)


RENAMED = [(path, former, now) for path, names in RENAMED_VALUES.items() for former, now in names.items()]
every_renamed_value = pytest.mark.parametrize(("path", "former", "now"), RENAMED)


def value_of(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def test_the_switch_for_cut_responses_means_what_it_meant() -> None:
    assert RENAMED == [("filters.truncated", True, "drop"), ("filters.truncated", False, "keep")]
    assert load_config().filters.truncated == "keep"  # before: false


@every_renamed_value
def test_a_former_value_is_read_in_a_recipe_an_override_and_an_arm(
    path: str, former: Any, now: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_with(path, former))
    assert value_of(load_config(recipe), path) == now
    assert value_of(load_config(None, [f"{path}={yaml.safe_dump(former).split()[0]}"]), path) == now
    recipe.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), "arms": {"mipo": {}}}))
    assert value_of(load_comparison(recipe, [f"{path}={now}"]).shared, path) == now
    assert CHANGELOG.read_text().count(f"`{path}`") >= 1


@every_renamed_value
def test_a_run_that_holds_a_former_value_goes_on_with_its_present_name_and_no_other(
    path: str, former: Any, now: str, tmp_path: Path
) -> None:
    directory = open_run(str(tmp_path / "run"))
    directory.write_text("config.yaml", older_config(path, former, run_dir=directory.url))
    directory.write_text("rounds/000/generate/manifest.json", '{"files": {}}')
    config = load_config(None, [f"run_dir={directory.url}", f"{path}={now}"])
    check_config(directory, config)
    text = directory.read_text("config.yaml")
    assert config_hash(load_run_config(text or "", "config.yaml")) == config_hash(config)
    other = next(value for value in ("drop", "keep") if value != now)
    for value in (other, "trim"):
        with pytest.raises(StorageError, match=rf"{path}: '{now}' there, '{value}' now"):
            check_config(directory, load_config(None, [f"run_dir={directory.url}", f"{path}={value}"]))
    record_config(directory, config)
    assert load_config(Path(directory.path("config.yaml"))) == config


def test_another_value_of_a_widened_field_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^filters\.truncated: Input should be 'drop', 'keep' or 'trim'; found 1$"):
        load_config(None, ["filters.truncated=1"])
    with pytest.raises(ConfigError, match=r"found 'cut'$"):
        load_config(None, ["filters.truncated=cut"])
