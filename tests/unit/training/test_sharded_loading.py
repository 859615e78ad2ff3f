"""What a worker loads of its own at ZeRO stage 3 is what transformers loads whole, to the bit; here by one worker.

python -m pytest tests/unit/training/test_sharded_loading.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mipo_ray.config.train import TrainConfig
from mipo_ray.errors import UserError
from mipo_ray.training import deepspeed_engine
from mipo_ray.training.deepspeed_config import deepspeed_config
from mipo_ray.training.sharded_loading import MappedWeights, load_own_part
from tests.helpers.model_zoo import make_member
from tests.helpers.tiny_families import tiny_model
from tests.helpers.tiny_training import save_tied_llama

# Tied and not, rotary buffers of several kinds, a weight that is [in, out], prefixes that the files lack, experts that
# the files hold one by one.
MEMBERS = (
    "Llama",
    "Llama, tied",
    "Llama 3.1",
    "Phi3, LongRoPE",
    "Gemma3",
    "GPT2",
    "Bloom",
    "Mixtral",
    "Granite of experts",
)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """Of this process alone, where no other test has made one."""
    was_there = torch.distributed.is_initialized()
    deepspeed_engine.quiet_libraries("cpu")
    deepspeed_engine.join_process_group("cpu")
    yield
    if not was_there:
        torch.distributed.destroy_process_group()


def zero_3(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return deepspeed_config(TrainConfig(zero_stage=3), str(dtype).removeprefix("torch."))


def own_parts(model: Any) -> dict[str, Tensor]:
    """Of one worker, whose part of every parameter is all of it; under each name that a parameter has."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert all(parameter.numel() == 0 for parameter in parameters.values())
    return {name: one.ds_tensor[: one.ds_numel].view(one.ds_shape) for name, one in parameters.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def names_of_each(model: Any) -> set[frozenset[str]]:
    """Which names stand for one parameter."""
    named = list(model.named_parameters(remove_duplicate=False))
    return {frozenset(name for name, other in named if other is one) for _, one in named}


def assert_is_what_transformers_loads(directory: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    own = load_own_part(str(directory), zero_3(dtype), dtype, trust_remote_code=False)
    assert_same(own_parts(own), {name: one.detach() for name, one in whole.named_parameters(remove_duplicate=False)})
    assert_same(dict(own.named_buffers()), dict(whole.named_buffers()))
    assert names_of_each(own) == names_of_each(whole)
    for what in ("config", "generation_config"):
        assert getattr(own, what).to_dict() == getattr(whole, what).to_dict()
    assert (own.training, own.name_or_path, type(own)) == (whole.training, whole.name_or_path, type(whole))
    # By which an export turns experts back into the tensors of the files.
    assert len(own._weight_conversions) == len(whole._weight_conversions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as stored", "cast"])
@pytest.mark.parametrize("name", MEMBERS)
def test_families(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make_member(name, tmp_path)
    assert_is_what_transformers_loads(tmp_path, dtype)


def test_several_files(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_is_what_transformers_loads(tmp_path, torch.float32)


def test_a_buffer_that_the_files_hold_is_read_whole(tmp_path: Path) -> None:
    """As in DeepSeek-V3, whose router's corrections are a buffer."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4}
    attention = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    groups = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **attention, **groups))
    buffers = [name for name in model.state_dict() if "e_score_correction_bias" in name]
    assert buffers
    with torch.no_grad():
        for name in buffers:
            model.get_buffer(name).normal_()
    model.save_pretrained(tmp_path)
    assert_is_what_transformers_loads(tmp_path, torch.float32)


CUSTOM = """
from transformers import LlamaForCausalLM

class Own(LlamaForCausalLM):
    def own(self):
        return 5
"""


def test_a_model_with_code_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    save_tied_llama(tmp_path / "model")
    (tmp_path / "model" / "modeling_own.py").write_text(CUSTOM)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    model = load_own_part(str(tmp_path / "model"), zero_3(), torch.float32, trust_remote_code=True)
    assert model.own() == 5
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert_same({name: own_parts(model)[name] for name in tensors}, tensors)


def test_random_numbers_stay_what_they_were(tmp_path: Path) -> None:
    """By which adapters begin."""
    save_tied_llama(tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_own_part(str(tmp_path), zero_3(), torch.float32, trust_remote_code=False)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("is_equal", [True, False])
def test_tied_weights_that_the_files_hold_twice(is_equal: bool, tmp_path: Path) -> None:
    """transformers ties them where they are equal, and else keeps both."""
    save_tied_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if not is_equal:
        tensors["lm_head.weight"][3, 5] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_is_what_transformers_loads(tmp_path, torch.float32)


def test_what_the_files_lack_is_left_whole_for_deepspeed(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load_own_part(str(tmp_path), zero_3(), torch.float32, trust_remote_code=False)
    whole = [name for name, parameter in model.named_parameters() if not hasattr(parameter, "ds_id")]
    assert whole == ["model.norm.weight"]
    assert torch.equal(model.model.norm.weight, torch.ones(32))


def test_a_tensor_of_another_shape_is_refused_as_before_and_nothing_stays_turned_over(tmp_path: Path) -> None:
    from transformers import core_model_loading

    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(33)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    before = core_model_loading.set_param_for_module, dict(os.environ)
    with pytest.raises(RuntimeError, match="size"):
        load_own_part(str(tmp_path), zero_3(), torch.float32, trust_remote_code=False)
    assert before == (core_model_loading.set_param_for_module, dict(os.environ))


def memory_of_files() -> int:
    """Bytes of mapped files that this process has in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


def test_maps_are_read_where_they_are_used_and_given_back(tmp_path: Path) -> None:
    size = 64 * 1024**2
    save_tied_llama(tmp_path)
    config = (tmp_path / "config.json").read_bytes()
    save_file(
        {"large": torch.arange(size // 4, dtype=torch.int32), "none": torch.empty(0, 3)}, tmp_path / "model.safetensors"
    )
    weights = MappedWeights(str(tmp_path))
    assert (tmp_path / "config.json").read_bytes() == config
    assert weights.tensors["none"].shape == (0, 3)
    before = memory_of_files()
    large = weights.tensors["large"]
    assert large[1_000_000:1_100_000].sum().item() == sum(range(1_000_000, 1_100_000))
    assert memory_of_files() - before < size // 8
    assert large.sum().item() == sum(range(size // 4))
    assert memory_of_files() - before > size * 0.9
    weights.give_back()
    assert memory_of_files() - before < size // 8
    assert large[-1].item() == size // 4 - 1  # it is read again


def test_a_digest_tells_trainings_of_one_model_apart(tmp_path: Path) -> None:
    for seed in (0, 1):
        tiny_model(seed=seed).save_pretrained(tmp_path / str(seed))
    tiny_model(seed=0).save_pretrained(tmp_path / "again", max_shard_size="20KB")
    digests = {name: MappedWeights(str(tmp_path / name)).digest() for name in ("0", "1", "again")}
    assert digests["0"] == digests["again"] != digests["1"]


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    save_tied_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F99"', 1))
    with pytest.raises(UserError, match=r"model\.safetensors: tensor .*: expected a dtype of F64, .*, found 'F99'"):
        MappedWeights(str(tmp_path))


@pytest.mark.parametrize(
    ("raw", "is_own"),
    [
        ({}, True),
        ({"offload_param": {"device": "cpu"}}, True),
        ({"offload_param": {"device": "nvme", "nvme_path": "/x"}}, False),
        ({"zero_quantized_nontrainable_weights": True}, False),
        ({"zero_hpz_partition_size": 8}, False),
        ({"stage": 2}, False),
    ],
)
def test_who_loads_its_part_alone(raw: dict[str, Any], is_own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    train = TrainConfig(zero_stage=3, layout="padded", deepspeed={"zero_optimization": raw})
    made = nn.Module()
    monkeypatch.setattr(deepspeed_engine, "load_own_part", lambda *_: made)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: nn.Module())
    config = deepspeed_config(train, "float32")
    assert (deepspeed_engine._load("model", train, config, "float32", False) is made) == is_own
