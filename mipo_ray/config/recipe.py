"""From a YAML recipe and dotted overrides to a checked `Config`, and back.

    python -m mipo_ray.run jobs/NAME.yaml train.beta=0.2 rounds=3

A recipe may build on others: `base: NAME.yaml`, or a list of them, each relative to the file that names it. Later
bases override earlier ones, and the recipe itself overrides them all. Sections, and values that are mappings, are
merged key by key; lists, other values and `conditioning.mixture` (a mixture is its weights together) are replaced. A
base may have bases of its own; one that is reached twice counts once, where it is reached first.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import itertools
import json
import os
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mipo_ray.config.removed import explain_removed, in_present_terms
from mipo_ray.config.schema import Config
from mipo_ray.config.trust import Said, check_trust
from mipo_ray.config.yaml_text import dump_yaml, load_yaml, parse_yaml
from mipo_ray.errors import MOST_SHOWN, UserError, brief, cut, few


class ConfigError(UserError):
    """A configuration that cannot be run; the message names each wrong key and what was expected."""


# Merged key by key, a base's weights would stay in the mixture unseen.
_REPLACED_WHOLE = "conditioning.mixture"
_NOWHERE = object()

MOST_MESSAGE = 1000  # characters of one error


def load_config(
    recipe: str | Path | None = None, overrides: typing.Sequence[str] = (), *, trusts_recipe: bool = False
) -> Config:
    """Reads a YAML recipe with its bases (none: the defaults), applies `dotted.key=value` overrides, checks everything.

    trusts_recipe: the user's word that the recipe may do what `trust` lists; what overrides set is theirs anyway.

    Raises ConfigError with one line per wrong key: its path, what was expected, what was found, for an unknown key
    the nearest valid name, and the base that it stands in, where it stands in one. A base that cannot be used is named
    with the recipes that led to it. Raises TrustError for what needs the user's word.
    """
    values, layers = read_recipe(recipe, overrides)
    with _explained(layers, overrides):
        config = Config.model_validate(values)
    check_trust(config, Said.on_command_line(overrides, trusts_recipe), str(recipe))
    return config


def load_run_config(
    text: str, name: str, overrides: typing.Sequence[str] = (), *, trusts_recipe: bool = False
) -> Config:
    """The configuration of a run from the text of its config.yaml (`name`, for messages), with overrides, checked.

    What was removed or renamed since it was written is read as it is now. Raises what `load_config` raises.
    """
    values = in_present_terms(_read_mapping(text, name))
    for override in overrides:
        _apply_override(values, override)
    with _explained({}, overrides):
        config = Config.model_validate(values)
    check_trust(config, Said.on_command_line(overrides, trusts_recipe), name)
    return config


@contextlib.contextmanager
def _explained(layers: dict[Path, dict[str, Any]], overrides: typing.Sequence[str]) -> typing.Iterator[None]:
    """Turns pydantic's errors into one ConfigError, a line each."""
    try:
        yield
    except ValidationError as error:
        raise ConfigError(
            few(error.errors(), lambda item: _explain_override(item, overrides) + _origin(item, layers, overrides))
        ) from None


def read_recipe(
    recipe: str | Path | None, overrides: typing.Sequence[str]
) -> tuple[dict[str, Any], dict[Path, dict[str, Any]]]:
    """The values of a recipe, its bases and the overrides, not yet checked; and those of each file, overridden first.

    Raises ConfigError where a file cannot be read or an override is none.
    """
    layers = {} if recipe is None else _read_layers(Path(recipe))
    values: dict[str, Any] = {}
    for layer in layers.values():
        values = merge(values, layer)
    for override in overrides:
        _apply_override(values, override)
    return values, layers


def split_arguments(
    arguments: typing.Sequence[str], more_keys: typing.Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """The words of a command line as (recipes or run directories, overrides `dotted.key=value`), each in their order.

    A path may hold an equals sign itself: what stands before the first one is then no key of the configuration (nor of
    `more_keys`), and it holds a slash or the path is there.
    """
    places: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        key, separator, _ = argument.partition("=")
        is_key = key.split(".")[0] in {*Config.model_fields, *more_keys}
        is_place = not separator or (not is_key and ("/" in key or os.path.exists(argument)))
        (places if is_place else overrides).append(argument)
    return places, overrides


def fields(section: type[BaseModel] = Config, prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    """Every leaf field as (dotted path, pydantic FieldInfo), in the order of their definition."""
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from fields(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def result_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The leaf values of a dumped configuration that decide what the run computes, by dotted path.

    Execution-only fields (places, sizes of pools, ...) are left out, and those that the configuration has no more.
    """
    execution_only = {path for path, info in fields() if (info.json_schema_extra or {}).get("execution_only")}
    return {path: value for path, value in _flatten(in_present_terms(values)) if path not in execution_only}


def config_hash(config: Config) -> str:
    """Stable hash (16 hex digits) of `result_fields`."""
    text = json.dumps(result_fields(config.model_dump(mode="json")), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal object."""
    return dump_yaml(config.model_dump())


def _read_layers(path: Path, chain: tuple[Path, ...] = ()) -> dict[Path, dict[str, Any]]:
    """The values of a recipe and its bases by absolute path, overridden ones first; `chain`: what led to the recipe."""
    chain = (*chain, path)
    shown = " -> ".join(map(str, chain))
    values = _read_recipe(path, shown)
    bases = values.pop("base", [])
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{shown}: base: expected the file name of a recipe, or a list of them; found {brief(bases)}")
    layers: dict[Path, dict[str, Any]] = {}
    for base in bases:
        # ".." is taken from the names, not from where links point: a mounted folder of recipes may consist of links.
        base_path = Path(os.path.normpath(path.parent / base))
        if _absolute(base_path) in map(_absolute, chain):
            raise ConfigError(f"{shown} -> {base_path}: a recipe cannot be its own base")
        for name, layer in _read_layers(base_path, chain).items():
            layers.setdefault(name, layer)
    return {**layers, _absolute(path): values}


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _read_recipe(path: Path, shown: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{shown}: cannot read the recipe: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown}: expected UTF-8 text: {error}") from None
    return _read_mapping(text, shown)


def _read_mapping(text: str, shown: str) -> dict[str, Any]:
    try:
        values = load_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{shown}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{shown}: expected a mapping of configuration keys, found {type(values).__name__}")
    return values


def merge(values: dict[str, Any], layer: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`values` overridden by `layer`, as new dicts: YAML's aliases stand for one and the same dict."""
    merged = dict(values)
    for key, value in layer.items():
        if isinstance(value, dict):
            below = merged.get(key)
            kept = below if isinstance(below, dict) and f"{prefix}{key}" != _REPLACED_WHOLE else {}
            value = merge(kept, value, f"{prefix}{key}.")
        merged[key] = value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{brief(override)}: expected key=value, for example train.beta=0.2")
    value = _override_value(text)
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key}: {parent} is a value, not a section")
    values[leaf] = value


def _override_value(text: str) -> Any:
    """What was typed, letter for letter, unless all of it is YAML of another type, or text in YAML's quotes.

    A number, true, false, null, and [...] and {...} are plainly YAML, and so is nothing at all (null). What YAML would
    cut off or rewrite is text: "exp #1", "Note: be brief", "- first", lines that it would join; and so is what is past
    the limits of `yaml_text`.
    """
    try:
        node, value = parse_yaml(text)
    except (yaml.YAMLError, ValueError):
        return text
    if node is None:  # nothing, or a comment alone
        return text if text.strip() else None
    if text[node.start_mark.index : node.end_mark.index] != text.strip() or text.strip()[0] in "&!":
        return text  # a part alone, or YAML's anchors and tags
    if isinstance(node, yaml.CollectionNode):
        return value if node.flow_style else text
    if text.strip()[0] in "'\"":
        return value
    # A time of day is a number to YAML.
    return text if isinstance(value, str) or ":" in text else value


def explain(item: Any) -> str:
    """One line for one error of pydantic's: the key, what was expected, what was found."""
    path = ".".join(str(part) for part in item["loc"])
    if len(path) > MOST_SHOWN:
        return f"{brief(path)}: unknown key"
    if item["type"] == "extra_forbidden":
        if (removed := explain_removed(path)) is not None:
            return removed
        valid = [name for name, _ in _names(Config)]
        nearest = difflib.get_close_matches(path, valid, n=1, cutoff=0.5)
        leaf_matches = [name for name in valid if name.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]]
        best = leaf_matches or nearest
        hint = f"; did you mean {best[0]}?" if best else ""
        return f"{path}: unknown key{hint}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{path}: {cut(message, MOST_MESSAGE)}" if path else cut(message, MOST_MESSAGE)
    # A key that was put where its variable's name belongs is not shown.
    found = "something else (not shown)" if "key" in path.rpartition(".")[2] else brief(item["input"])
    return f"{path}: {message}; found {found}"


def _explain_override(item: Any, overrides: typing.Sequence[str]) -> str:
    """`explain`, and for an override that YAML reads as no text how to make it text."""
    path = ".".join(map(str, item["loc"]))
    typed = [override.partition("=")[2] for override in overrides if override.partition("=")[0] == path]
    is_no_text = typed and item["type"] == "string_type"
    hint = f"; for text, put it in quotes: {path}='\"{cut(typed[-1])}\"'" if is_no_text else ""
    return explain(item) + hint


def _origin(item: Any, layers: dict[Path, dict[str, Any]], overrides: typing.Sequence[str]) -> str:
    """Names the base that a wrong value stands in; "" for the recipe's own values, overrides and whole sections."""
    keys = list(itertools.takewhile(lambda part: isinstance(part, str), item["loc"]))
    path = ".".join(keys)
    if any(path == key or path.startswith(f"{key}.") for key in (override.split("=")[0] for override in overrides)):
        return ""
    for index, (name, layer) in enumerate(reversed(layers.items())):
        found: Any = layer
        for key in keys:
            found = found.get(key, _NOWHERE) if isinstance(found, dict) else _NOWHERE
        if found is not _NOWHERE:
            return f"; in {name}" if index and not isinstance(found, dict) else ""
    return ""


def _names(section: type[BaseModel], prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    for name, info in section.model_fields.items():
        yield f"{prefix}{name}", info
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _names(info.annotation, f"{prefix}{name}.")


def _flatten(values: dict[str, Any], prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    sections = {path for path, info in _names(Config) if _is_section(info)}
    for name, value in values.items():
        if f"{prefix}{name}" in sections:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_section(info: Any) -> bool:
    return isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
