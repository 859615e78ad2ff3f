"""What is written file by file at ZeRO stage 3 is what is written of the whole model; here by one worker.

python -m pytest tests/unit/training/test_sharded_export.py
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mipo_ray.config.train import LoraConfig, TrainConfig
from mipo_ray.training import export, sharded_export
from mipo_ray.training.adapters import plain_weights, with_adapters
from mipo_ray.training.deepspeed_config import deepspeed_config
from mipo_ray.training.deepspeed_engine import join_process_group, quiet_libraries
from mipo_ray.training.export import export_policy
from mipo_ray.training.export_check import ExportDiffers
from mipo_ray.training.sharded_export import PlannedFile, plan_files, write_files
from mipo_ray.training.sharded_loading import load_own_part
from tests.helpers.model_zoo import make_member

CONFIG = deepspeed_config(TrainConfig(zero_stage=3), "float32")


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """Of this process alone, where no other test has made one."""
    was_there = torch.distributed.is_initialized()
    quiet_libraries("cpu")
    join_process_group("cpu")
    yield
    if not was_there:
        torch.distributed.destroy_process_group()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


def whole_and_sharded(name: str, source: Path) -> tuple[Any, Any]:
    """A member of the zoo as transformers loads it, and with every parameter sharded."""
    from transformers import AutoModelForCausalLM

    make_member(name, source)
    whole = AutoModelForCausalLM.from_pretrained(source).eval()
    return whole, load_own_part(str(source), CONFIG, torch.float32, trust_remote_code=False)


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("most_bytes", ["5GB", "200KB"])
@pytest.mark.parametrize("name", ["Llama", "Llama, tied", "Gemma3", "GPT2", "Bloom"])
def test_files_are_the_same_to_the_byte(
    name: str, most_bytes: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MOST_BYTES", most_bytes)
    whole, sharded = whole_and_sharded(name, source)
    export_policy(whole, source, tmp_path / "whole")
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "model-00001-of-99999.safetensors").write_bytes(b"of another export")
    export_policy(sharded, source, tmp_path / "sharded")
    assert len(tensors_of(tmp_path / "whole")) > 10
    assert files_of(tmp_path / "sharded") == files_of(tmp_path / "whole")
    assert ("model.safetensors.index.json" in files_of(tmp_path / "sharded")) == (most_bytes != "5GB")
    # The engine goes on with its own weights.
    assert all(parameter.numel() == 0 for parameter in sharded.parameters())


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3 of experts"])
def test_experts_are_stored_one_by_one_in_files_that_are_not_larger(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would keep the experts of a layer in one file, as they are views of one tensor."""
    monkeypatch.setattr(export, "MOST_BYTES", "300KB")
    whole, sharded = whole_and_sharded(name, source)
    export_policy(whole, source, tmp_path / "whole")
    export_policy(sharded, source, tmp_path / "sharded")
    found, expected = tensors_of(tmp_path / "sharded"), tensors_of(tmp_path / "whole")
    assert found.keys() == expected.keys() == tensors_of(source).keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    assert max(file.stat().st_size for file in (tmp_path / "sharded").glob("*.safetensors")) < 310_000


def test_adapters_are_merged(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    monkeypatch.setattr(export, "MOST_BYTES", "200KB")
    written = []
    for model in whole_and_sharded("Llama, tied", source):
        torch.manual_seed(0)
        adapted = with_adapters(model, LoraConfig(rank=2, alpha=4.0))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if written:
            deepspeed.zero.Init(module=adapted, config_dict_or_path=CONFIG, dtype=torch.float32)
        written.append(tmp_path / f"{len(written)}")
        export_policy(adapted, source, written[-1])
    first, second = map(tensors_of, written)
    assert first.keys() == second.keys() == tensors_of(source).keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(
        first["model.layers.0.mlp.up_proj.weight"], tensors_of(source)["model.layers.0.mlp.up_proj.weight"]
    )


def test_no_more_than_a_file_and_a_parameter_is_held(source: Path, tmp_path: Path) -> None:
    _, sharded = whole_and_sharded("Llama", source)
    weights = list(plain_weights(sharded))
    held: dict[int, tuple[weakref.ref[Tensor], int]] = {}
    most = [0]

    def gather(weight: Any) -> Tensor:
        tensor = export._gathered(weight)
        held[len(held)] = (weakref.ref(tensor), tensor.nbytes)
        most[0] = max(most[0], sum(size for one, size in held.values() if one() is not None))
        return tensor

    files = plan_files(sharded, weights, 200_000)
    assert files is not None
    assert len(files) > 3
    write_files(sharded, weights, files, gather, tmp_path / "out")
    total, largest = sum(size for _, size in held.values()), max(size for _, size in held.values())
    assert most[0] <= 200_000 + largest < total / 2


def test_a_tensor_that_several_weights_make_takes_the_way_of_whole_models(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some families' conversions need: what of two weights becomes one can not be planned weight by weight."""
    from transformers import core_model_loading

    whole, sharded = whole_and_sharded("Llama", source)
    revert = core_model_loading.revert_weight_conversion

    def of_two(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pair = {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"}
        if len(pair & tensors.keys()) == 1:
            raise KeyError("the other one")
        return revert(model, tensors)

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", of_two)
    assert plan_files(sharded, list(plain_weights(sharded)), "5GB") is None
    export_policy(whole, source, tmp_path / "whole")
    export_policy(sharded, source, tmp_path / "sharded")
    assert tensors_of(tmp_path / "whole").keys() == tensors_of(tmp_path / "sharded").keys()


def test_a_file_that_does_not_hold_what_was_written_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sharded = whole_and_sharded("Llama", source)

    def spoiled(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, file, metadata=metadata)

    monkeypatch.setattr("safetensors.torch.save_file", spoiled)
    with pytest.raises(
        ExportDiffers, match=r"model\.safetensors: tensor model\.norm\.weight: expected the trained values"
    ):
        export_policy(sharded, source, tmp_path / "out")


@pytest.mark.parametrize("fault", ["gone", "other"])
def test_a_policy_that_loads_as_another_is_refused(
    fault: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the files, each of which is as it was written, and the model that they make."""
    _, sharded = whole_and_sharded("Llama", source)
    write = export._write_other_files

    def spoil(model: Any, source: Path, output: Path) -> None:
        write(model, source, output)
        tensors = load_file(output / "model.safetensors")
        if fault == "gone":
            del tensors["model.norm.weight"]
        else:
            tensors["model.norm.weight"] += 1
        save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export, "_write_other_files", spoil)
    message = "missing_keys: model.norm.weight" if fault == "gone" else "found other ones: model.norm.weight"
    with pytest.raises(ExportDiffers, match=message):
        export_policy(sharded, source, tmp_path / "out")


def test_a_plan_that_does_not_hold_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, sharded = whole_and_sharded("Llama", source)
    planned = [PlannedFile("model.safetensors", ("model.norm.weight", "more"), ("model.norm.weight",))]
    monkeypatch.setattr(export, "plan_files", lambda *_: planned)
    with pytest.raises(ExportDiffers, match="expected tensors as planned, lacking more"):
        export_policy(sharded, source, tmp_path / "out")


def test_a_large_policy_is_not_loaded_whole(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, sharded = whole_and_sharded("Llama", source)
    monkeypatch.setattr(sharded_export, "WHOLE_BYTES", 0)
    monkeypatch.setattr(export, "check_sums", lambda *_: pytest.fail("it was loaded"))
    export_policy(sharded, source, tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == tensors_of(source).keys()
