"""From a YAML recipe and dotted overrides to a checked `Config`, and back.

python -m mipo_ray.run jobs/NAME.yaml train.beta=0.2 rounds=3
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mipo_ray.config import Config
from mipo_ray.errors import UserError


class ConfigError(UserError):
    """A configuration that cannot be run; the message names each wrong key and what was expected."""


# YAML 1.1 reads 1e-5 (no dot) as a string; users mean the number. Quoted, it is a string here too.
_SCIENTIFIC_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """Reads scientific notation as numbers."""


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as numbers."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC_FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC_FLOAT, list("-+.0123456789"))


def load_config(recipe: str | Path | None = None, overrides: typing.Sequence[str] = ()) -> Config:
    """Reads a YAML recipe (none: the defaults), applies `dotted.key=value` overrides and checks everything.

    Raises ConfigError with one line per wrong key: its path, what was expected, what was found and, for an unknown
    key, the nearest valid name.
    """
    values = {} if recipe is None else _read_recipe(Path(recipe))
    for override in overrides:
        _apply_override(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from None


def fields(section: type[BaseModel] = Config, prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    """Every leaf field as (dotted path, pydantic FieldInfo), in the order of their definition."""
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from fields(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def result_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The leaf values of a dumped configuration that decide what the run computes, by dotted path.

    Execution-only fields (places, sizes of pools, ...) are left out.
    """
    execution_only = {path for path, info in fields() if (info.json_schema_extra or {}).get("execution_only")}
    return {path: value for path, value in _flatten(values) if path not in execution_only}


def config_hash(config: Config) -> str:
    """Stable hash (16 hex digits) of `result_fields`."""
    text = json.dumps(result_fields(config.model_dump(mode="json")), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal object."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        values = _load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the recipe: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date and is none
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of configuration keys, found {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{override!r}: expected key=value, for example train.beta=0.2")
    try:
        value = _load_yaml(text)
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"{key}: {text!r} is not a valid YAML value; put text in quotes: {key}='\"...\"'") from None
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key}: {parent} is a value, not a section")
    values[leaf] = value


def _load_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def _explain(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        valid = [name for name, _ in _names(Config)]
        nearest = difflib.get_close_matches(path, valid, n=1, cutoff=0.5)
        leaf_matches = [name for name in valid if name.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]]
        best = leaf_matches or nearest
        hint = f"; did you mean {best[0]}?" if best else ""
        return f"{path}: unknown key{hint}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {message}; found {item['input']!r}"


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
