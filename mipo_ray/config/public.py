"""What of a run may be told to others: its settings and texts, without places of this machine and without secrets.

Cards of exported pairs and of published models are made of these. What is not known to be public is not shown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mipo_ray.config.recipe import result_fields
from mipo_ray.config.schema import Config
from mipo_ray.models.hub import hub_file, hub_model
from mipo_ray.redaction import redacted, redacted_values

LOCAL = "(files of the run's own)"
REMOTE = "(files of an object store)"
NO_PATH = "(path not shown)"

EMBEDDED = "SmolLM2-135M-Instruct (as mipo-ray carries it)"

# Settings that say where something lies: the names of models, and how the names of others end.
_MODELS = ("model.path", "conditioning.similar.model")
_FILES = ("path", "profiles_path")
# An absolute path, or one below a home directory, of two parts at least: "and/or" and "/think" are words.
_PATH = re.compile(r"(?<![\w.:/])(?:~[\w-]*|/[\w.@+-]+)(?:/[\w.@+*=-]+)+/?")
_URL = re.compile(r"\b(?!https?://|hf://)[a-z][a-z0-9+.-]*://\S+", re.IGNORECASE)
_SHORTEST_PLACE = 4  # characters of a directory whose name is looked for


def public_file(path: str) -> str:
    """A data file as a run names it, where anybody can get it under that name; else what kind of place that is."""
    if path.startswith("bundled:") or hub_file(path) is not None:
        return path
    return REMOTE if "://" in path else LOCAL


def public_model(source: str) -> str:
    """A model as a run names it (`model.source`), where anybody can get it under that name; else what kind of place."""
    if source == "embedded":
        return EMBEDDED
    if hub_model(source) is not None and not os.path.exists(source.partition("@")[0]):
        return source
    return REMOTE if "://" in source else LOCAL


def public_settings(config: Config) -> dict[str, Any]:
    """The settings that decide what a run computes and that are not the defaults: dotted name -> value."""
    defaults = result_fields(Config().model_dump(mode="json"))
    settings = result_fields(config.model_dump(mode="json"))
    changed = {name: value for name, value in settings.items() if value != defaults.get(name)}
    return {name: _public(name, value) for name, value in redacted_values(changed).items()}


def public_text(text: str, private: Sequence[str] = ()) -> str:
    """A text without secrets, paths of this machine and `private` ones."""
    here = {os.getcwd(), os.path.expanduser("~"), *private}
    for place in sorted((place for place in here if len(place) >= _SHORTEST_PLACE), key=len, reverse=True):
        text = text.replace(place, NO_PATH)
    return redacted(_URL.sub(REMOTE, _PATH.sub(NO_PATH, text)))


def _public(name: str, value: Any) -> Any:
    """A value without places; `name` is the key that it stands under."""
    if isinstance(value, Mapping):
        return {key: _public(str(key), below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_public(name, below) for below in value]
    if not isinstance(value, str):
        return value
    if name in _MODELS:
        return public_model(value)
    return public_file(value) if name.rpartition(".")[2] in _FILES else public_text(value)
