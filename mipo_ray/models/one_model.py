"""Whether a model directory holds one model: vLLM and transformers choose among the files of a directory differently.

Nothing here imports torch, transformers or vllm.
"""

from __future__ import annotations

from typing import Any

from mipo_ray.errors import UserError, cut
from mipo_ray.models.directory import ADAPTER, EMBEDDINGS, SINGLE_FILE, ModelDirectory, read_header, weight_map

# Bytes that are compared at a time.
_CHUNK = 64 * 1024**2
_HEADS = ("lm_head.weight", "embed_out.weight")


def check_one_model(directory: ModelDirectory, weights: list[str], *, are_all_read: bool) -> None:
    """Raises UserError for a directory out of which vLLM and transformers would read two models.

    weights: the files of its weights, those of the index or the single one. are_all_read: an engine reads this very
    directory; else only `weights`, and files that hold no weights, are brought to it.
    """
    if ADAPTER in directory.details:
        raise UserError(
            f"{directory.shown}/{ADAPTER}: expected no adapter beside the weights, found one: transformers would add "
            "it to them, vLLM would not; merge it, or remove it where the weights hold it already"
        )
    if are_all_read:
        _check_no_other_weights(directory, weights)
    headers = {name: read_header(directory, name) for name in weights}
    _check_index(directory, headers)
    if are_all_read and directory.read_json("config.json").get("tie_word_embeddings") is True:
        check_tied(directory, headers)


def check_tied(directory: ModelDirectory, headers: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Raises UserError where a model with tied embeddings brings an output head that differs from them: vLLM would
    leave the head out, transformers would use it.

    headers: of each file of weights, as `read_header` gives them.
    """
    places = {tensor: file for file, tensors in headers.items() for tensor in tensors}
    head = next((name for name in places if name.endswith(_HEADS)), None)
    embedding = next((name for name in places if name.endswith(EMBEDDINGS)), None)
    if head is None or embedding is None:
        return
    facts = [headers[places[name]][name] for name in (head, embedding)]
    is_same = all(facts[0].get(name) == facts[1].get(name) for name in ("dtype", "shape"))
    if not is_same or not _are_equal(directory, headers, places, (head, embedding)):
        raise UserError(
            f"{directory.shown}: config.json says tie_word_embeddings true, but {cut(head)} differs from "
            f"{cut(embedding)}: vLLM would use the one, transformers the other; set tie_word_embeddings to false, or "
            "remove the head"
        )


def _check_no_other_weights(directory: ModelDirectory, weights: list[str]) -> None:
    found = sorted(name for name in directory.details if name.endswith(".safetensors") and name not in weights)
    has_index = weights != [SINGLE_FILE]
    # Of weights with an index vLLM reads those that it names, and transformers the single file where there is one; and
    # vLLM takes "consolidated" ones before all others.
    harmful = [name for name in found if not has_index or name == SINGLE_FILE or name.startswith("consolidated")]
    if harmful:
        raise UserError(
            f"{directory.shown}: expected one model, found {cut(', '.join(harmful))} beside "
            f"{weights[0] if len(weights) == 1 else f'the {len(weights)} files of the index'}: vLLM and transformers "
            "would read different ones; remove what is not the model"
        )


def _check_index(directory: ModelDirectory, headers: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Every tensor of the index in its file, and none in two files."""
    first: dict[str, str] = {}
    for file, tensors in headers.items():
        for tensor in tensors:
            if tensor in first:
                raise UserError(
                    f"{directory.shown}: tensor {cut(tensor)}: expected it in one file, found it in "
                    f"{first[tensor]} and {file}"
                )
            first[tensor] = file
    for tensor, file in weight_map(directory).items():
        if tensor not in headers[file]:
            raise UserError(f"{directory.shown}/{file}: expected tensor {cut(tensor)}, as the index says, found none")


def _are_equal(
    directory: ModelDirectory,
    headers: dict[str, dict[str, dict[str, Any]]],
    places: dict[str, str],
    names: tuple[str, str],
) -> bool:
    """Whether two tensors of the same shape and dtype hold the same bytes."""
    places_of = [(places[name], headers[places[name]][name]["data_offsets"]) for name in names]
    starts = [_data_start(directory, file) + offsets[0] for file, offsets in places_of]
    begin, end = places_of[0][1]
    size = end - begin
    for done in range(0, size, _CHUNK):
        length = min(_CHUNK, size - done)
        first, second = (
            directory.read(file, start + done, start + done + length)
            for (file, _), start in zip(places_of, starts, strict=True)
        )
        if first != second:
            return False
    return True


def _data_start(directory: ModelDirectory, file: str) -> int:
    return 8 + int.from_bytes(directory.read(file, 0, 8), "little")
