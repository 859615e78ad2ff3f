"""Whether every token that a tokenizer can make has a row in the model's embeddings.

Nothing here imports torch, transformers or vllm.
"""

from __future__ import annotations

from typing import Any

from mipo_ray.errors import UserError, brief
from mipo_ray.models.directory import EMBEDDINGS, ModelDirectory, read_header, well_formed
from mipo_ray.models.rope import text_config

_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_vocabulary(directory: ModelDirectory, weights: list[str]) -> None:
    """Raises UserError, naming the token, for one whose id has no embedding: an engine would die of it.

    A special token that neither the chat template nor a named role (end, padding, ...) uses is let pass: text never
    becomes one, and some models bring such tokens for the parts that were taken out of them.

    weights: the files of the model's weights.
    """
    config = directory.read_json("config.json")
    with well_formed(directory, "config.json"):
        vocabulary = text_config(config).get("vocab_size")
    rows = _embedding_rows(directory, weights)
    if isinstance(vocabulary, int) and rows is not None and rows < vocabulary:
        raise UserError(
            f"{directory.shown}/config.json: field vocab_size: expected at most {rows}, the rows of the embeddings, "
            f"found {brief(vocabulary)}"
        )
    known = [size for size in (vocabulary, rows) if isinstance(size, int)]
    if not known:
        return
    size = min(known)
    with well_formed(directory, "the tokenizer's files"):
        for token, (number, file) in _used_tokens(directory).items():
            if number >= size:
                raise UserError(
                    f"{directory.shown}/{file}: token {brief(token)}: expected an id below {size}, the rows of the "
                    f"model's embeddings, found {brief(number)}: resize the embeddings, or take the tokenizer that "
                    "belongs to the model"
                )
    for file in ("config.json", "generation_config.json"):
        _check_named_ids(directory, file, size)


def _check_named_ids(directory: ModelDirectory, file: str, size: int) -> None:
    if file not in directory.details:
        return
    content = directory.read_json(file)
    for field in _ID_FIELDS:
        value = content.get(field)
        for number in value if isinstance(value, list) else [value]:
            # -1 stands for "none" in some configurations
            if isinstance(number, int) and number >= size:
                raise UserError(
                    f"{directory.shown}/{file}: field {field}: expected an id below {size}, the rows of the model's "
                    f"embeddings, found {brief(number)}"
                )


def _embedding_rows(directory: ModelDirectory, weights: list[str]) -> int | None:
    for file in weights:
        for name, tensor in read_header(directory, file).items():
            if name.endswith(EMBEDDINGS) and len(tensor["shape"]) == 2:
                return int(tensor["shape"][0])
    return None


def _used_tokens(directory: ModelDirectory) -> dict[str, tuple[int, str]]:
    """Token -> its id and the file that says so, of those that text, the template or a named role can bring about."""
    ordinary: dict[str, tuple[int, str]] = {}
    special: dict[str, tuple[int, str]] = {}
    tokenizer = _json(directory, "tokenizer.json")
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        ordinary |= {token: (number, "tokenizer.json") for token, number in vocabulary.items()}
    elif isinstance(vocabulary, list):  # a unigram model: [token, score] in the order of ids
        ordinary |= {str(entry[0]): (number, "tokenizer.json") for number, entry in enumerate(vocabulary)}
    elif "vocab.json" in directory.details:
        ordinary |= {token: (number, "vocab.json") for token, number in _json(directory, "vocab.json").items()}
    for entry in tokenizer.get("added_tokens") or []:
        (special if entry.get("special") else ordinary)[entry["content"]] = (entry["id"], "tokenizer.json")
    settings = _json(directory, "tokenizer_config.json")
    for number, entry in (settings.get("added_tokens_decoder") or {}).items():
        (special if entry.get("special") else ordinary)[entry["content"]] = (int(number), "tokenizer_config.json")
    for token, number in _json(directory, "added_tokens.json").items():
        if token not in special:
            ordinary[token] = (number, "added_tokens.json")
    template = _template(directory, settings)
    named = {_content(settings.get(name)) for name in _NAMED_TOKENS}
    named |= {_content(_json(directory, "special_tokens_map.json").get(name)) for name in _NAMED_TOKENS}
    used = {token: place for token, place in special.items() if token in named or token in template}
    return ordinary | used


def _template(directory: ModelDirectory, settings: dict[str, Any]) -> str:
    if "chat_template.jinja" in directory.details:
        return directory.read("chat_template.jinja").decode("utf-8", errors="replace")
    return str(settings.get("chat_template") or "")


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _json(directory: ModelDirectory, name: str) -> dict[str, Any]:
    return directory.read_json(name) if name in directory.details else {}
