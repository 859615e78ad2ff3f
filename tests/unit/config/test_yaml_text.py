"""YAML of others within limits: small texts that stand for much, wherever such a text is read.

python -m pytest tests/unit/config/test_yaml_text.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mipo_ray.comparison.definition import load_comparison
from mipo_ray.config.recipe import load_config
from mipo_ray.config.schema import Config
from mipo_ray.config.yaml_text import MOST_CHARACTERS, MOST_DEPTH, MOST_NODES, dump_yaml, load_yaml
from mipo_ray.errors import MOST_SHOWN, UserError, brief
from mipo_ray.evaluation.tasks.task import load_task
from mipo_ray.storage.configuration import check_config
from mipo_ray.storage.run_directory import open_run


def _tenfold(form: str, times: int) -> str:
    """`times` lines of which each names the one before it ten times."""
    lines = ["seed: 1", "x0: &x0 {seed: 1}"]
    lines += [f"x{n}: &x{n} " + form % ", ".join([f"*x{n - 1}"] * 10) for n in range(1, times)]
    return "\n".join(lines)


BOMBS = {
    "aliases": _tenfold("[%s]", 9),
    "merge keys": _tenfold("{<<: [%s]}", 9),
    "merge keys that double": "x0: &x0 {a: 1}\n"
    + "\n".join(f"x{n}: &x{n} {{<<: [*x{n - 1}, *x{n - 1}]}}" for n in range(1, 26)),
    "itself in a list": "x: &x [*x]",
    "itself in a mapping": "x: &x {y: *x}",
    "itself as a merge key": "x: &x {<<: *x}",
    "nested lists": "x: " + "[" * 20_000,
    "nested mappings": "x: " + "{a: " * 2000 + "1" + "}" * 2000,
    "nested by indentation": "\n".join(" " * n + "a:" for n in range(2000)),
    "many keys": "\n".join(f"k{n}: 1" for n in range(MOST_NODES)),
    "a long text": "x: " + "a" * MOST_CHARACTERS,
    "a long number": "x: 1" + "0" * 5000,
    "a number to the base 60": "x: 1" + ":1" * 100_000,
    "a wrong type, repeated": "x: &x " + str(["a" * 90] * 10) + "\nseed: [" + ", ".join(["*x"] * 500) + "]",
    "a wrong type, long": "seed: " + "a" * 300_000,
    "an unknown key, long": "a" * 900 + ": 1",
    "many unknown keys": "\n".join(f"k{n}: 1" for n in range(1000)),
}


def _recipe(path: Path) -> object:
    return load_config(path)


def _task(path: Path) -> object:
    return load_task(str(path))


def _comparison(path: Path) -> object:
    return load_comparison(path)


def _config_of_a_run(path: Path) -> object:
    path.rename(path.parent / "config.yaml")
    (path.parent / "rounds").mkdir()
    (path.parent / "rounds" / "work").touch()
    return check_config(open_run(str(path.parent)), Config())


@pytest.mark.parametrize("reader", [_recipe, _task, _comparison, _config_of_a_run])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_text_costs_little_and_says_what_is_wrong_in_a_few_lines(
    tmp_path: Path, bomb: str, reader: Callable[[Path], object]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(BOMBS[bomb])
    started = time.process_time()
    with pytest.raises(UserError) as refused:
        reader(path)
    assert time.process_time() - started < 10
    lines = str(refused.value).splitlines()
    assert len(lines) < 50
    assert max(map(len, lines)) < 1500


@pytest.mark.parametrize("bomb", ["aliases", "nested lists", "a wrong type, long"])
def test_an_override_is_yaml_too(bomb: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(None, [f"train.beta={BOMBS[bomb].removeprefix('x: ')}"])
    assert len(str(refused.value)) < 1500


def test_an_override_past_the_limits_is_text_and_its_message_is_short() -> None:
    deep = "[" * 2 * MOST_DEPTH + "]" * 2 * MOST_DEPTH
    assert load_config(None, [f"run_dir={deep}"]).run_dir == deep
    with pytest.raises(UserError, match="in quotes") as refused:
        load_config(None, [f"run_dir=[{'1, ' * 9999}]"])
    assert len(str(refused.value)) < 1500


def test_aliases_and_merge_keys_within_the_limits_are_read() -> None:
    assert load_yaml("a: &a {x: 1, y: [1e-5]}\nb: {<<: *a, x: 2}\nc: [*a, *a]") == {
        "a": {"x": 1, "y": [1e-5]},
        "b": {"x": 2, "y": [1e-5]},
        "c": [{"x": 1, "y": [1e-5]}, {"x": 1, "y": [1e-5]}],
    }


def test_what_is_just_within_the_limits_is_read() -> None:
    depth = MOST_DEPTH - 1
    assert load_yaml("[" * depth + "1" + "]" * depth) is not None
    assert len(load_yaml("[" + "1," * (MOST_NODES - 1) + "]")) == MOST_NODES - 1
    with pytest.raises(yaml.YAMLError, match="keys and values"):
        load_yaml("[" + "1," * MOST_NODES + "]")


def test_what_is_written_is_read_back() -> None:
    shared = {"text": "1e-5", "list": [1, 2.5, None, True]}
    values = {"one": shared, "other": shared, "date": "2024-07-26", "é": "línea\nnueva"}
    assert load_yaml(dump_yaml(values)) == values


def test_no_text_is_a_date() -> None:
    for text in ("2024-07-26", "2024-99-99", "2024-07-26 12:00:00"):
        assert load_yaml(text) == text


@pytest.mark.parametrize("text", ["0b_", "!!bool x", "!!int ''", "!!int x", "!!timestamp x", "!!float ''"])
def test_a_value_that_is_not_what_it_begins_as_is_refused(text: str) -> None:
    with pytest.raises((yaml.YAMLError, ValueError)):
        load_yaml(text)


def test_only_plain_types_are_made() -> None:
    for text in ("!!python/object/apply:os.system [ls]", "!!python/name:os.system", "!mine 1"):
        with pytest.raises(yaml.YAMLError):
            load_yaml(text)


def test_a_value_in_a_message_is_one_line_of_bounded_length() -> None:
    assert brief("a\nb") == "'a\\nb'"
    assert len(brief(["a" * 1000] * 1000)) < MOST_SHOWN + 40
    assert brief(10**5000).startswith("int that is too long")
    assert brief([10**5000]).startswith("list that is too long")
