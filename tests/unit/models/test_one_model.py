"""A model directory is one model: files out of which the libraries would read two are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import numpy
import pytest
from safetensors.numpy import save_file

from mipo_ray.errors import UserError
from mipo_ray.models.source import check_model, local_model_directory
from tests.unit.models.test_models import shard, write_model


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIPO_RAY_CACHE", str(tmp_path / "cache"))
    return write_model(tmp_path / "model")


def weights(file: Path, **tensors: Any) -> None:
    save_file({name.replace("__", "."): numpy.asarray(value, numpy.float32) for name, value in tensors.items()}, file)


def refused(model: Path, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_model(str(model))
    with pytest.raises(UserError, match=message):
        local_model_directory(str(model))


def test_an_adapter_beside_merged_weights_is_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))
    refused(model, r"model/adapter_config\.json: expected no adapter beside the weights, found one")
    # Of a remote directory it would be downloaded with the model.
    with pytest.raises(UserError, match=r"adapter_config\.json: expected no adapter"):
        local_model_directory(f"local://{model}")


@pytest.mark.parametrize("has_config", [True, False])
def test_an_adapter_alone_is_no_model(has_config: bool, model: Path) -> None:
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    if not has_config:
        (model / "config.json").unlink()
    refused(model, "expected a model with weights of its own, found adapter_config.json, an adapter of 'some/base'")


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors", "old.safetensors"])
def test_weights_beside_the_single_file_are_refused(name: str, model: Path) -> None:
    weights(model / name, other=[1.0])
    refused(model, f"expected one model, found {name} beside model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "consolidated.safetensors", "consolidated-00001.safetensors"])
def test_weights_beside_those_of_an_index_are_refused(name: str, model: Path) -> None:
    shard(model)
    weights(model / name, other=[1.0])
    refused(model, f"expected one model, found {name} beside the 2 files of the index")


def test_what_no_library_reads_is_let_be(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    (model / "original").mkdir()
    weights(model / "original" / "consolidated.safetensors", other=[1.0])
    check_model(str(model))
    shard(model)
    weights(model / "left-over.safetensors", other=[1.0])  # vLLM reads the files of the index alone
    check_model(str(model))


def test_what_does_not_come_along_from_a_remote_directory_is_let_be(model: Path) -> None:
    weights(model / "consolidated.safetensors", other=[1.0])
    directory = Path(local_model_directory(f"local://{model}"))
    assert not (directory / "consolidated.safetensors").exists()
    check_model(str(directory))


def test_a_tensor_in_two_files_is_refused(model: Path) -> None:
    shard(model)
    weights(model / "model-00002-of-00002.safetensors", second=[2.0], first=[9.0])
    refused(model, r"tensor first: expected it in one file, found it in model-00001.* and model-00002")


def test_a_tensor_that_is_not_where_the_index_says_is_refused(model: Path) -> None:
    shard(model)
    weights(model / "model-00002-of-00002.safetensors", third=[2.0])
    refused(model, r"model-00002-of-00002\.safetensors: expected tensor second, as the index says, found none")


@pytest.mark.parametrize("head", [[[1.0, 2.0], [3.0, 5.0]], [[1.0, 2.0]]], ids=["other values", "another shape"])
def test_tied_embeddings_with_a_head_that_differs_are_refused(head: list[list[float]], model: Path) -> None:
    tie(model, True)
    weights(model / "model.safetensors", model__embed_tokens__weight=[[1, 2], [3, 4]], lm_head__weight=head)
    refused(model, "tie_word_embeddings true, but lm_head.weight differs from model.embed_tokens.weight")


def test_tied_embeddings_with_an_equal_head_or_none_pass(model: Path) -> None:
    tie(model, True)
    same = [[1, 2], [3, 4]]
    weights(model / "model.safetensors", lm_head__weight=same, model__embed_tokens__weight=same)
    check_model(str(model))
    weights(model / "model.safetensors", model__embed_tokens__weight=same)
    check_model(str(model))
    tie(model, False)
    weights(model / "model.safetensors", model__embed_tokens__weight=same, lm_head__weight=[[5, 6], [7, 8]])
    check_model(str(model))


def tie(model: Path, is_tied: bool) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": is_tied}))


def test_the_tied_tensors_may_lie_in_two_files(model: Path) -> None:
    shard(model)
    tie(model, True)
    names = {"transformer.wte.weight": "model-00001-of-00002.safetensors", "lm_head.weight": "two.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    weights(model / "model-00001-of-00002.safetensors", transformer__wte__weight=[[1, 2]])
    weights(model / "two.safetensors", lm_head__weight=[[1, 2]])
    check_model(str(model))
    weights(model / "two.safetensors", lm_head__weight=[[1, 3]])
    refused(model, "lm_head.weight differs from transformer.wte.weight")


def test_an_adapter_in_a_remote_directory_is_refused_before_the_download(model: Path, tmp_path: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    (model / "adapter_config.json").write_text("{}")
    filesystem.put([str(file) for file in model.iterdir()], [f"/bucket/one/{file.name}" for file in model.iterdir()])
    with pytest.raises(UserError, match="expected no adapter beside the weights"):
        local_model_directory("memory://bucket/one")
    assert not (tmp_path / "cache").exists()
