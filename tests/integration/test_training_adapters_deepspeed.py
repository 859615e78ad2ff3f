"""LoRA adapters under real DeepSpeed, in this process: what trains, the base behind it, and the exported model.

python -m pytest tests/integration/test_training_adapters_deepspeed.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mipo_ray.config.train import LoraConfig, TrainConfig
from mipo_ray.training.adapters import adapters_off, plain_weights
from mipo_ray.training.deepspeed_engine import join_process_group, policy_engine, quiet_libraries
from mipo_ray.training.export import export_policy
from mipo_ray.training.layout import TokenBatch, Tree, lay_out
from mipo_ray.training.logprobs import ResponseLogprobs

VOCABULARY = 128
LINEAR_LAYERS = 2 * 7
# Of log-probs around -20 nats.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.3}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model_dir(request, tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("model") / "initial"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=request.param,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def batch() -> TokenBatch:
    generator = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return generator.integers(0, VOCABULARY, count)

    return lay_out([Tree(ids(5), (ids(4), ids(6))), Tree(ids(3), (ids(1), ids(5)))], "padded")


def engine_with_adapters(model_dir: Path, dtype: str, **train: Any):
    settings = TrainConfig(
        lora=LoraConfig(rank=4, alpha=8.0), layout="padded", learning_rate=0.02, max_grad_norm=100.0, **train
    )
    quiet_libraries("cpu")
    join_process_group("cpu")
    torch.manual_seed(0)
    return policy_engine(str(model_dir), settings, dtype, "cpu", trust_remote_code=False)


def plain_logprobs(directory: Path, dtype: str) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        return ResponseLogprobs(model)(batch())


def logprobs(engine) -> torch.Tensor:
    with torch.no_grad():
        return engine.module(batch())


def base_logprobs(engine) -> torch.Tensor:
    with torch.no_grad(), adapters_off(engine.module.model):
        return engine.module(batch())


def base_weights(engine) -> dict[str, torch.Tensor]:
    return {weight.name: whole(weight.tensor) for weight in plain_weights(engine.module.model)}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    import deepspeed

    if not hasattr(tensor, "ds_id"):
        return tensor.detach().clone()
    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


def train(engine, steps: int) -> None:
    """Makes the first response of a prompt likelier than the second, with the base as a reference in every step."""
    for _ in range(steps):
        policy = engine(batch())
        ratio = policy - base_logprobs(engine)
        engine.backward(ratio[1::2].mean() - ratio[0::2].mean())
        engine.step()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3}], ids=str)
def test_deepspeed_trains_adapters_only_and_exports_a_plain_model(model_dir, dtype, options, tmp_path):
    engine = engine_with_adapters(model_dir, dtype, **options)
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * LINEAR_LAYERS
    initial = plain_logprobs(model_dir, dtype)
    assert torch.equal(logprobs(engine), initial)  # the policy is its base at the start
    base_before, adapters_before = base_weights(engine), [whole(parameter) for parameter in trained]

    train(engine, steps=3)

    assert all(torch.equal(tensor, base_before[name]) for name, tensor in base_weights(engine).items())
    assert not any(torch.equal(whole(p), before) for p, before in zip(trained, adapters_before, strict=True))
    assert torch.equal(base_logprobs(engine), initial)
    adapted = logprobs(engine)
    gain = (adapted - initial)[0::2].sum() - (adapted - initial)[1::2].sum()
    assert gain > 10  # nats

    export_policy(engine, model_dir, tmp_path)

    torch.testing.assert_close(plain_logprobs(tmp_path, dtype), adapted, rtol=0, atol=TOLERANCE[dtype])
    assert torch.equal(logprobs(engine), adapted)
    train(engine, steps=1)  # it goes on after an export
    assert not torch.equal(logprobs(engine), adapted)


@pytest.mark.parametrize("model_dir", [False], indirect=True, ids=["untied"])
def test_sharding_and_recomputing_change_nothing_but_memory(model_dir):
    results = []
    for options in [
        {"zero_stage": 0},
        {"zero_stage": 2, "gradient_checkpointing": True},
        {"zero_stage": 3, "gradient_checkpointing": True},
        {"zero_stage": 3, "offload_parameters": True, "offload_optimizer": True},
    ]:
        engine = engine_with_adapters(model_dir, "float32", **options)
        train(engine, steps=2)
        results.append(logprobs(engine))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-4)
