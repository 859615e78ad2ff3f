"""Where a model comes from: checks its name and files before anything starts, and brings it to this machine's disk.

A model is named by `embedded`, a local directory, a remote URL of a model directory (any filesystem that fsspec opens)
or a Hugging Face id. Nothing here imports torch, transformers, ray or vllm.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from mipo_ray.errors import UserError
from mipo_ray.models.cache import cache_dir, make_once
from mipo_ray.models.directory import (
    ModelDirectory,
    check_directory,
    is_remote,
    local_path,
    open_directory,
    well_formed,
)
from mipo_ray.models.fetch import fetch
from mipo_ray.models.hub import asked_again, downloaded, hub_model, passing_problem
from mipo_ray.models.one_model import check_one_model
from mipo_ray.models.policy_check import check_policy, check_window
from mipo_ray.models.unused import make_room, note_use
from mipo_ray.models.vocabulary import check_vocabulary

EMBEDDED = "embedded"
EMBEDDING_KEY = "conditioning.similar.model"

# Files beside the weights that a model needs. Python code comes along only where the user trusts it.
_COMPANIONS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
# What filesystems call the things that change with a file's content.
_VERSION_FIELDS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")


def check_model(path: str) -> None:
    """Check, within seconds and without starting anything, that `path` names a model that can be used.

    Of a Hugging Face id only the form is checked, and with HF_HUB_OFFLINE set whether it was downloaded before.

    Raises:
        UserError: naming what was expected and what was found.
    """
    if path == EMBEDDED:
        from mipo_ray.models.embedded import check_embedded_model

        check_embedded_model()
    elif is_remote(path) or (path and local_path(path).is_dir()):
        check_model_directory(path)
    elif path and local_path(path).exists():
        raise UserError(f"model.path {path!r}: expected a directory with a model, found a file")
    elif (named := hub_model(path)) is None:
        raise UserError(
            f"model.path {path!r}: expected {EMBEDDED!r}, a directory that exists, a remote URL (s3://, gs://) or a "
            f"Hugging Face id (organisation/name or organisation/name@revision)"
        )
    else:
        from huggingface_hub import constants

        identifier, revision = named
        if revision is not None and local_path(identifier).is_dir():
            raise UserError(
                f"model.path {identifier!r}: found a directory, which has no revision {revision!r}; only a Hugging "
                "Face id has: remove model.revision"
            )
        if constants.HF_HUB_OFFLINE and downloaded(path, "config.json") is None:
            raise UserError(
                f"model.path {path!r}: no such directory; as a Hugging Face id it was not downloaded before, and "
                f"HF_HUB_OFFLINE is set"
            )


def check_model_directory(path: str) -> list[str]:
    """Check a model directory, local or remote, without reading its weights; return the files that hold them.

    It must hold config.json with a model_type, complete safetensors of one model, a tokenizer whose tokens all have
    embeddings, and a chat template.

    Raises:
        UserError: naming the file, what was expected and what was found.
    """
    directory = open_directory(path)
    weights = check_directory(directory)
    with well_formed(directory, "config.json"):
        check_one_model(directory, weights, are_all_read=not is_remote(path))
    check_vocabulary(directory, weights)
    return weights


def known_directory(path: str) -> ModelDirectory | str:
    """The directory of a model that `check_model` accepts, or, as a string, why it is not known: `embedded` and models
    of the Hub may not have been brought to this machine yet."""
    if path == EMBEDDED:
        from mipo_ray.models.embedded import embedded_directory

        if not embedded_directory().is_dir():
            return f"{path} was not converted yet"
        return open_directory(str(embedded_directory()))
    if is_remote(path) or local_path(path).is_dir():
        return open_directory(path)
    if (config_file := downloaded(path, "config.json")) is None:
        return f"{path} was not downloaded yet"
    return open_directory(str(config_file.parent))


def check_policy_model(path: str, windows: Mapping[str, int]) -> None:
    """Check a model that `check_model` accepts further: that it can be trained here, and that vLLM and transformers
    read the same model out of its directory. A model that is not on this machine yet is let pass.

    windows: of a field of the configuration that sets a context window, its name -> tokens.

    Raises:
        UserError: naming the file, the field, what was expected and what was found.
    """
    directory = known_directory(path)
    if not isinstance(directory, ModelDirectory):
        return
    try:
        weights = check_directory(directory)
    except UserError:
        if is_remote(path) or local_path(path).is_dir():
            raise
        weights = []  # of the Hub, whose weights may not be there yet
    with well_formed(directory, "config.json"):
        check_policy(directory, weights, windows)


def check_sampled_model(path: str, windows: Mapping[str, int]) -> None:
    """As `check_policy_model`, of a model that is sampled only: its window has to be long enough."""
    directory = known_directory(path)
    if isinstance(directory, ModelDirectory):
        with well_formed(directory, "config.json"):
            check_window(directory, windows)


def _is_wanted(name: str, weights: Iterable[str], trust_remote_code: bool) -> bool:
    return name in weights or name.endswith(_COMPANIONS) or (trust_remote_code and name.endswith(".py"))


def _download(path: str, trust_remote_code: bool) -> Path:
    """Copy a remote model directory into the cache, once for each content it has had."""
    remote = open_directory(path)
    weights = check_model_directory(path)
    sizes = {name: remote.size(name) for name in remote.details if _is_wanted(name, weights, trust_remote_code)}
    versions = _versions(remote, sizes)
    # A changed remote gets a directory of its own: another process may be reading the former one.
    key = json.dumps([remote.shown, sizes, versions], sort_keys=True)
    directory = cache_dir() / "models" / hashlib.sha256(key.encode()).hexdigest()[:24]

    def is_complete(local: Path) -> bool:
        return all((local / name).is_file() and (local / name).stat().st_size == sizes[name] for name in sizes)

    def make(local: Path) -> None:
        make_room(directory.parent, sum(sizes.values()), now=local.stat().st_mtime)
        fetch(remote, list(sizes), local)
        # A file comes in parts: one that was replaced meanwhile by another of its size would be a mixture of both.
        now = _versions(open_directory(path), sizes)
        if changed := next((name for name in sizes if now[name] != versions[name]), None):
            (local / changed).unlink()
            raise UserError(f"{remote.shown}/{changed}: it changed while it was downloaded; fetch the model again")

    note_use(directory)  # before it is looked at: what is in use is not swept
    make_once(directory, make, is_complete, goes_on=True)
    note_use(directory)
    return directory


def _versions(remote: ModelDirectory, names: Iterable[str]) -> dict[str, list[str]]:
    """What the store says of each file that is another for another content; nothing of a file that is gone."""
    return {name: [str(remote.details.get(name, {}).get(field)) for field in _VERSION_FIELDS] for name in names}


def _download_from_hub(path: str, trust_remote_code: bool) -> str:
    """The model of a Hub's name as a directory of its cache, checked: the commit that the revision stands for now."""
    directory = _snapshot(path, trust_remote_code)
    check_model_directory(directory)
    return directory


def _snapshot(path: str, trust_remote_code: bool, key: str = "model.path") -> str:
    from huggingface_hub import snapshot_download

    named = hub_model(path)
    assert named is not None
    patterns = ["*.safetensors", *(f"*{suffix}" for suffix in _COMPANIONS)] + (["*.py"] if trust_remote_code else [])
    # Weights in folders, and "consolidated" ones, are the same model once more in another format.
    download = functools.partial(
        snapshot_download,
        named[0],
        revision=named[1],
        allow_patterns=patterns,
        ignore_patterns=["*/*.safetensors", "consolidated*.safetensors"],
    )
    try:
        return asked_again(download)  # files that are there are not fetched again
    except Exception as error:
        if not isinstance(error, OSError) and passing_problem(error) is None:
            raise
        raise UserError(f"{key} {path!r}: cannot be downloaded: {error}") from error


def local_model_directory(path: str, trust_remote_code: bool = False) -> str:
    """The model as a directory on this machine's disk, brought there first where it is elsewhere.

    Processes of one machine may call it at the same time: the first one downloads, the others wait for it.

    Args:
        path: `embedded`, a local directory, a remote URL or a Hugging Face id, also `organisation/name@revision`.
        trust_remote_code: bring the Python files of a remote model along.

    Returns:
        An absolute path.

    Raises:
        UserError: no usable model there; the message says what was expected and found.
    """
    if path == EMBEDDED:
        from mipo_ray.models.embedded import prepare_embedded_model

        return str(prepare_embedded_model())
    check_model(path)
    if is_remote(path):
        return str(_download(path, trust_remote_code))
    if local_path(path).is_dir():
        return str(local_path(path))
    return _download_from_hub(path, trust_remote_code)


def local_tokenizer(path: str) -> str | None:
    """The directory of a model's tokenizer where that takes no download and no conversion; None where it does."""
    if path == EMBEDDED:
        from mipo_ray.models.embedded import prepared_directory

        return prepared_directory()
    if is_remote(path):
        return None
    if local_path(path).is_dir():
        return str(local_path(path))
    found = downloaded(path, "tokenizer_config.json")
    return None if found is None else str(found.parent)


def embedding_model(path: str, trust_remote_code: bool = False) -> str:
    """What an engine loads for `conditioning.similar.model`: `embedded`'s directory, a local one, or a Hugging Face id;
    of an id with a revision the directory of that revision, which is downloaded.

    Raises what `check_embedding_model` raises.
    """
    check_embedding_model(path)
    if path == EMBEDDED:
        return local_model_directory(path)
    if not is_remote(path) and local_path(path).is_dir():
        return str(local_path(path))
    named = hub_model(path)
    return path if named is None or named[1] is None else _snapshot(path, trust_remote_code, EMBEDDING_KEY)


def check_embedding_model(path: str) -> None:
    """Checks, without starting or downloading anything, what `conditioning.similar.model` names.

    An embedding model needs no chat template, so that `check_model` would refuse most. Raises UserError, within
    seconds, when `path` cannot be one.
    """
    if path == EMBEDDED:
        check_model(path)
        return
    local = local_path(path)
    if not is_remote(path) and local.is_dir():
        if not any(local.glob("*.safetensors")):
            raise UserError(f"{EMBEDDING_KEY} {path!r}: expected weights as *.safetensors, found none")
        return
    if hub_model(path) is None:
        raise UserError(
            f"{EMBEDDING_KEY} {path!r}: expected {EMBEDDED!r}, a directory that exists on every node, or a "
            f"Hugging Face id (organisation/name or organisation/name@revision)"
        )
