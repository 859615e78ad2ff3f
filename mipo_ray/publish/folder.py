"""The folder that is published: weights, tokenizer and chat template of a policy, the card, and what is asked for."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mipo_ray.config.public import public_file, public_model, public_text
from mipo_ray.errors import UserError
from mipo_ray.pairs.card import write_card
from mipo_ray.pairs.export import CARD, write_pairs
from mipo_ray.paths import files_below
from mipo_ray.publish.model_card import render_card
from mipo_ray.publish.policy import Policy
from mipo_ray.storage.records import to_json
from mipo_ray.storage.results import read_evaluation, read_results

PAIRS = "pairs"
RESULTS = "results"
_PATH_KEYS = ("_name_or_path", "name_or_path")  # where transformers notes what a model was loaded from


@dataclass(frozen=True)
class Publication:
    """What is published, and as what: `to` is the repository's name."""

    policy: Policy
    to: str
    is_adapter: bool = False
    with_pairs: bool = False
    with_results: bool = False


def write_folder(publication: Publication, folder: Path, *, copies: bool) -> dict[str, int]:
    """Writes all files of a publication to an empty folder; returns them with their bytes.

    copies: whether weights on a local disk are copied; else they are links, which is enough to send them.
    """
    policy = publication.policy
    rank = None
    if publication.is_adapter:
        from mipo_ray.publish.adapter import write_adapter

        rank = write_adapter(policy, folder)
    for name in policy.files:
        if not (publication.is_adapter and _is_the_models(name)):
            _bring(policy, name, folder / name, copies=copies)
    if publication.with_pairs:
        export = write_pairs(policy.run, "trl", folder / PAIRS, [round.number for round in policy.generated])
        write_card(export, policy.run, folder / PAIRS)
    if publication.with_results:
        _write_results(policy, folder / RESULTS)
    card = render_card(policy, publication.to, adapter_rank=rank)
    (folder / CARD).write_text(public_text(card, [policy.run.root, policy.run.url]), encoding="utf-8")
    return files_below(str(folder))


def _is_the_models(name: str) -> bool:
    """Whether a file of a policy belongs to the whole model, and not to its tokenizer."""
    return name.endswith((".safetensors", ".index.json")) or name in ("config.json", "generation_config.json")


def _bring(policy: Policy, name: str, to: Path, *, copies: bool) -> None:
    """One file of the policy: a copy or a link; a small JSON file without the path that a model was loaded from."""
    source = policy.run.path(policy.directory, name)
    if policy.run.is_local and Path(source).resolve() != Path(policy.run.path(policy.directory)).resolve() / name:
        raise UserError(
            f"{source}: expected a file that the run wrote, found a link; what it leads to is not published"
        )
    to.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("config.json"):
        try:
            text = _without_paths(policy.run.filesystem.cat_file(source).decode("utf-8"))
        except ValueError as error:
            raise UserError(f"{source}: expected a JSON object, found something else: {error}") from None
        to.write_text(text, encoding="utf-8")
    elif not policy.run.is_local:
        policy.run.filesystem.get_file(source, str(to))
    elif copies:
        shutil.copyfile(source, to)
    else:
        to.symlink_to(Path(source).absolute())


def _without_paths(text: str) -> str:
    """A config.json without the names of local directories; else letter for letter what it was. Raises ValueError for
    what is none."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"a {type(values).__name__}")
    private = [
        key for key in _PATH_KEYS if isinstance(values.get(key), str) and public_model(values[key]) != values[key]
    ]
    if not private:
        return text
    return json.dumps({key: value for key, value in values.items() if key not in private}, indent=2) + "\n"


def _write_results(policy: Policy, folder: Path) -> None:
    """results.json and evaluation.json without the places of task files and judges."""
    folder.mkdir(parents=True)
    found = {"results.json": read_results(policy.run), "evaluation.json": read_evaluation(policy.run)}
    for name, values in found.items():
        if values:
            public = _public(to_json(values), [policy.run.root, policy.run.url])
            (folder / name).write_text(json.dumps(public, indent=2, ensure_ascii=False), encoding="utf-8")


def _public(value: Any, private: list[str], key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _public(below, private, name) for name, below in value.items()}
    if isinstance(value, list):
        return [_public(below, private) for below in value]
    if not isinstance(value, str):
        return value
    if key in ("data", "judge"):
        return public_file(value) if key == "data" else public_model(value)
    return public_text(value, private)
