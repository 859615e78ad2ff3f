"""Model directories and names that are none: each is refused by name, none hangs or ends in a traceback.

python -m pytest tests/unit/models/test_hostile_files.py
"""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from mipo_ray.errors import UserError
from mipo_ray.models.chat_template import read_chat_template
from mipo_ray.models.shape import model_shape
from mipo_ray.models.source import check_model, check_policy_model, embedding_model

GOOD = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
DEEP = b"[" * 100_000 + b"]" * 100_000
LONG = b"1" * 5000  # more digits than Python reads


def _tensor(**fields: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | fields}).encode()


HEADERS = {
    "deep list": DEEP,
    "deep mapping": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "long number": b'{"a": {"shape": [2], "data_offsets": [0, ' + LONG + b"]}}",
    "list": b"[]",
    "tensor that is a list": b'{"a": [1]}',
    "no text": b"\xff",
    "no shape": b'{"a": {"data_offsets": [0, 8]}}',
    "shape of text": _tensor(shape=["x"]),
    "shape of lists": _tensor(shape=[[[2]]]),
    "number as shape": _tensor(shape=3),
    "negative shape": _tensor(shape=[-2]),
    "offsets of text": _tensor(data_offsets=[0, "8"]),
    "offset that is null": _tensor(data_offsets=[0, None]),
    "offset that is true": _tensor(data_offsets=[0, True]),
    "offset of a part": _tensor(data_offsets=[0, 8.5]),
    "one offset": _tensor(data_offsets=[8]),
}
INDEXES = {
    "number": b'{"weight_map": {"a": 1}}',
    "list": b'{"weight_map": {"a": ["x"]}}',
    "mapping": b'{"weight_map": {"a": {}}}',
    "null": b'{"weight_map": {"a": null}}',
    "elsewhere": b'{"weight_map": {"a": "../../elsewhere"}}',
    "no mapping": b'{"weight_map": [1]}',
    "long number": b'{"weight_map": ' + LONG + b"}",
    "deep": DEEP,
    "no text": b"\xff",
}
CONFIGS = {
    "number": b'{"model_type": 1}',
    "deep": DEEP,
    "long number": LONG,
    "long": b'{"model_type": [' + b"1," * 9999 + b"1]}",
}


def _model(directory: Path, header: bytes = GOOD, index: bytes | None = None, config: bytes | None = None) -> str:
    (directory / "config.json").write_bytes(config or b'{"model_type": "llama"}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    if index is not None:
        (directory / "model.safetensors.index.json").write_bytes(index)
    return str(directory)


def _refused(path: str, file: str) -> None:
    with pytest.raises(UserError) as refused:
        check_model(path)
    assert str(refused.value).startswith(f"{path}/{file}") or str(refused.value).startswith(f"{path}: expected the")
    assert len(str(refused.value)) < 2000
    model_shape(path)  # says why, or what it is
    with contextlib.suppress(UserError):
        read_chat_template(path)


def test_the_directory_that_is_damaged_below_is_good(tmp_path: Path) -> None:
    check_model(_model(tmp_path))


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_of_weights(tmp_path: Path, name: str) -> None:
    _refused(_model(tmp_path, header=HEADERS[name]), "model.safetensors: expected")


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_of_weights(tmp_path: Path, name: str) -> None:
    _refused(_model(tmp_path, index=INDEXES[name]), "model.safetensors.index.json: ")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration(tmp_path: Path, name: str) -> None:
    _refused(_model(tmp_path, config=CONFIGS[name]), "config.json: ")


VALUES = [-1, "x" * 5000, [[1]], {"a": {}}, {"1": {"content": [1]}}, [{"content": "a", "id": "x"}], 10**4000]
FIELDS = {
    "config.json": ("text_config", "rope_scaling", "architectures", "max_position_embeddings", "vocab_size"),
    "tokenizer.json": ("model", "added_tokens"),
    "tokenizer_config.json": ("added_tokens_decoder", "eos_token"),
    "special_tokens_map.json": ("eos_token",),
    "generation_config.json": ("eos_token_id",),
}


@pytest.mark.parametrize("value", VALUES, ids=[str(number) for number in range(len(VALUES))])
@pytest.mark.parametrize(("file", "field"), [(file, field) for file in FIELDS for field in FIELDS[file]])
def test_a_value_of_another_type_ends_in_no_traceback(tmp_path: Path, file: str, field: str, value: Any) -> None:
    path = _model(tmp_path, config=b'{"model_type": "llama", "vocab_size": 1}')
    before = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    (tmp_path / file).write_text(json.dumps(before | {field: value}))
    messages = []
    for check in (check_model, model_shape, read_chat_template, lambda path: check_policy_model(path, {"window": 500})):
        try:
            check(path)
        except UserError as error:
            messages.append(str(error))
    assert [message for message in messages if path not in message or len(message) > 2000] == []


def test_a_header_that_is_longer_than_any(tmp_path: Path) -> None:
    path = _model(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.write(struct.pack("<Q", 1 << 40))
        file.truncate(1 << 41)  # a file of holes
    _refused(path, "model.safetensors: expected")


NAMES = [
    *("http://", "https://", "http://[", "s3://", "gs://", "hf://", "zip://", "memory://", "local://"),
    *("file://", "://", "a://b", "data://", "", "\0", "file://\0", "x" * 5000, "http://127.0.0.1:1/x"),
    *("\ud800", "file://\ud800", "s3://\ud800"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", [check_model, embedding_model])
def test_a_name_of_no_model(check: Any, name: str) -> None:
    with pytest.raises(UserError, match=r"model|expected config\.json"):
        check(name)
