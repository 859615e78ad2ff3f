"""A model directory on any filesystem, and whether it holds what a model needs: read without loading its weights.

Nothing here imports torch, transformers, ray or vllm.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mipo_ray.errors import UserError, brief, cut
from mipo_ray.paths import open_path

_LONGEST_HEADER = 100_000_000  # bytes; safetensors itself reads no longer one
SINGLE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
# How the names of the tensors end that hold a row for each token, in the families' own words.
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
_VOCABULARIES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json")


@dataclass(frozen=True)
class ModelDirectory:
    """A model directory on any filesystem."""

    shown: str
    """Its name in messages."""
    filesystem: Any
    root: str
    details: dict[str, dict[str, Any]]
    """By file name relative to the root: what the filesystem knows of it."""

    def size(self, name: str) -> int:
        """Size of a file in bytes."""
        return int(self.details[name]["size"])

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes `start` to `end` of a file; all of it without them."""
        try:
            return self.filesystem.cat_file(f"{self.root}/{name}", start=start, end=end)
        except FileNotFoundError:
            raise
        except Exception as error:  # every object store has exceptions of its own
            if "://" not in self.shown:
                raise
            raise UserError(f"{self.shown}/{name}: cannot be read: {type(error).__name__}: {error}") from error

    def read_json(self, name: str) -> dict[str, Any]:
        """A file that must hold a JSON object."""
        text = self.read(name)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.shown}/{name}: expected JSON, found: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"{self.shown}/{name}: expected a JSON object, found {type(content).__name__}")
        return content


def is_remote(path: str) -> bool:
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> Path:
    """A local path, absolute; raises UserError for what can be the name of no file."""
    name = path.removeprefix("file://")
    try:
        is_name = "\0" not in name and all(len(os.fsencode(part)) <= 255 for part in name.split("/"))
    except UnicodeEncodeError:  # half of a surrogate pair
        is_name = False
    if not is_name:
        raise UserError(f"model {brief(path)}: expected a path, found what can be the name of no file")
    return Path(name).expanduser().absolute()


def open_directory(path: str) -> ModelDirectory:
    """List a model directory, local or remote."""
    shown = path.rstrip("/")
    try:
        filesystem, root = open_path(path if is_remote(path) else str(local_path(path)))
        filesystem.invalidate_cache()  # a long-lived worker must see what other machines wrote since its last call
        root = root.rstrip("/")
        found = filesystem.find(root, maxdepth=1, detail=True)
    except FileNotFoundError:
        found = {}
    except ImportError as error:
        raise UserError(
            f"model.path {path!r}: {error}; for s3:// install mipo-ray[s3], for gs:// mipo-ray[gcs]"
        ) from error
    except Exception as error:  # every object store has exceptions of its own
        raise UserError(f"model.path {path!r}: cannot be listed: {type(error).__name__}: {error}") from error
    if not found:
        raise UserError(f"model.path {path!r}: expected a directory with a model, found none or an empty one")
    details = {name.removeprefix(f"{root}/"): info for name, info in found.items()}
    return ModelDirectory(shown, filesystem, root, details)


def read_header(directory: ModelDirectory, name: str) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file, by name, with their `shape`; the file's size is compared with what they say.

    Layout: 8 bytes, little-endian length of the header; the header, a JSON object of tensors with their
    `data_offsets`; the data.
    """
    size = directory.size(name)
    shown = f"{directory.shown}/{name}"
    header_size = int.from_bytes(directory.read(name, 0, 8), "little") if size >= 8 else 0
    if size < 8 or header_size > _LONGEST_HEADER or 8 + header_size > size:
        raise UserError(
            f"{shown}: expected at least {8 + header_size} bytes of safetensors header, found {size}: truncated or no "
            f"safetensors file"
        )
    try:
        header = json.loads(directory.read(name, 8, 8 + header_size))
        tensors = {key: tensor for key, tensor in header.items() if key != "__metadata__"}
        for tensor in tensors.values():
            _check_numbers(tensor["shape"])
            _check_numbers(tensor["data_offsets"])
        data_size = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(f"{shown}: expected a safetensors header, found something else ({error!r})") from error
    expected = 8 + header_size + data_size
    if size != expected:
        raise UserError(f"{shown}: expected {expected} bytes as its header says, found {size}")
    return tensors


def _check_numbers(values: Any) -> None:
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise TypeError(f"expected a list of whole numbers, found {brief(values)}")


def weight_map(directory: ModelDirectory) -> dict[str, str]:
    """Tensor -> its file, as the index of the weights says; {} for a directory without one."""
    if _INDEX not in directory.details:
        return {}
    shards = directory.read_json(_INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(
            f"{directory.shown}/{_INDEX}: field weight_map: expected file names by tensor, found {brief(shards)}"
        )
    return shards


def weight_files(directory: ModelDirectory) -> list[str]:
    """The names of the files with the weights; raises UserError where there are none, or not all of them."""
    if _INDEX in directory.details:
        names = sorted(set(weight_map(directory).values()))
        if missing := [name for name in names if name not in directory.details]:
            raise UserError(
                f"{directory.shown}: expected the {len(names)} weight files that {_INDEX} names, missing "
                f"{cut(', '.join(missing))}"
            )
        return names
    if SINGLE_FILE in directory.details:
        return [SINGLE_FILE]
    if ADAPTER in directory.details:
        base = directory.read_json(ADAPTER).get("base_model_name_or_path")
        raise UserError(
            f"{directory.shown}: expected a model with weights of its own, found {ADAPTER}, an adapter of "
            f"{brief(base)}: merge it into that model first"
        )
    others = sorted(
        name for name in directory.details if name.endswith((".bin", ".pt", ".pth", ".gguf", ".safetensors"))
    )
    raise UserError(
        f"{directory.shown}: expected weights in {SINGLE_FILE} or {_INDEX}, found {', '.join(others) or 'no weights'}"
        + ("; only safetensors are read" if others else "")
    )


@contextlib.contextmanager
def well_formed(directory: ModelDirectory, files: str) -> Iterator[None]:
    """For what reads the values of `files`: raises UserError, which names them, where one is not what the reader takes
    it for, a list where a number should stand."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise UserError(
            f"{directory.shown}: {files}: expected the values that models have there, found another ({brief(error)})"
        ) from error


def _check_tokenizer(directory: ModelDirectory) -> None:
    names = directory.details.keys()
    has_vocabulary = any(name in _VOCABULARIES or name.endswith(".tiktoken") for name in names)
    if "tokenizer.json" not in names and not ("tokenizer_config.json" in names and has_vocabulary):
        raise UserError(
            f"{directory.shown}: expected a tokenizer (tokenizer.json, or tokenizer_config.json with a vocabulary), "
            f"found {', '.join(sorted(names))}"
        )
    if "chat_template.jinja" in names:
        return
    template = None
    if "tokenizer_config.json" in names:
        template = directory.read_json("tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several named ones
        with well_formed(directory, "tokenizer_config.json"):
            template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    if not template:
        raise UserError(
            f"{directory.shown}: tokenizer without chat template: expected chat_template.jinja, or chat_template in "
            f"tokenizer_config.json; an instruct model brings one, a base model does not"
        )


def check_directory(directory: ModelDirectory) -> list[str]:
    """Check that a directory's files are complete; return the names of those with the weights."""
    if "config.json" not in directory.details:
        if ADAPTER in directory.details:
            weight_files(directory)  # says what an adapter lacks
        raise UserError(f"{directory.shown}: expected config.json, found {', '.join(sorted(directory.details))}")
    if not isinstance(model_type := directory.read_json("config.json").get("model_type"), str):
        raise UserError(f"{directory.shown}/config.json: field model_type: expected a name, found {brief(model_type)}")
    weights = weight_files(directory)
    for name in weights:
        read_header(directory, name)
    _check_tokenizer(directory)
    return weights
