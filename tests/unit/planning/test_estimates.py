"""Memory, tokens and GPU time as the plan estimates them, against arithmetic done by hand, and the shapes behind them.

python -m pytest tests/unit/planning/test_estimates.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mipo_ray.config.recipe import load_config
from mipo_ray.config.schema import Config
from mipo_ray.config.train import TrainConfig
from mipo_ray.models.shape import EMBEDDED_SHAPE, ModelShape, model_shape, read_shape
from mipo_ray.pairs.given import PairSummary
from mipo_ray.planning.estimates import (
    LOGIT_BYTES,
    describe_estimates,
    engine_memory,
    generation_flops,
    given_work,
    lora_parameters,
    round_work,
    training_flops,
    training_memory,
)
from mipo_ray.ray_cluster.resources import Resources

# Llama-3.2-1B: 1,235,814,400 parameters.
ONE_BILLION = ModelShape(1_235_814_400, 16, 2048, 8192, 32, 8, 64, 128_256)
BILLION = 1_235_814_400


def train(*overrides: str) -> TrainConfig:
    return load_config(overrides=[f"train.{override}" for override in overrides]).train


@pytest.mark.parametrize(
    ("overrides", "dtype", "workers", "expected"),
    [
        # Without ZeRO, float32: weights, gradients and reference 4 bytes each, Adam 8.
        (["zero_stage=0"], "float32", 1, {"weights": 4, "gradients": 4, "optimizer": 8, "reference": 4}),
        # bfloat16 trains with float32 master weights and gradients, by ZeRO-1 at least.
        (["zero_stage=0"], "bfloat16", 1, {"weights": 2, "gradients": 4, "optimizer": 12, "reference": 2}),
        (["zero_stage=1"], "bfloat16", 4, {"weights": 2, "gradients": 4, "optimizer": 3, "reference": 2}),
        (["zero_stage=2"], "bfloat16", 4, {"weights": 2, "gradients": 1, "optimizer": 3, "reference": 2}),
        (["zero_stage=3"], "bfloat16", 4, {"weights": 0.5, "gradients": 1, "optimizer": 3, "reference": 0.5}),
        (["reference_mode=cached"], "bfloat16", 4, {"weights": 2, "gradients": 1, "optimizer": 3, "reference": 0}),
        (["objective=sft"], "bfloat16", 4, {"weights": 2, "gradients": 1, "optimizer": 3, "reference": 0}),
        (
            ["offload_reference=true"],
            "bfloat16",
            4,
            {"weights": 2, "gradients": 1, "optimizer": 3, "reference": 0, "host": 0.5},
        ),
        (
            ["zero_stage=3", "offload_optimizer=true", "offload_parameters=true"],
            "bfloat16",
            4,
            {"weights": 0, "gradients": 0, "optimizer": 0, "reference": 0.5, "host": 4.5},
        ),
    ],
)
def test_bytes_per_parameter(overrides: list[str], dtype: str, workers: int, expected: dict[str, float]) -> None:
    memory = training_memory(ONE_BILLION, train(*overrides), dtype, workers, on_gpu=True)
    found = {
        name: getattr(memory, name) / BILLION for name in ("weights", "gradients", "optimizer", "reference", "host")
    }
    assert found == pytest.approx({"host": 0.0, **expected})
    parts = [memory.weights, memory.gradients, memory.optimizer, memory.reference]
    assert memory.device == sum([*parts, memory.activations, memory.logits, memory.buffers])


def test_adapters_alone_have_gradients_and_optimizer_states() -> None:
    # Rank 1 on q, o (2048 + 2048 each), k, v (2048 + 512 each), gate, up, down (2048 + 8192 each), 16 layers.
    one = 16 * (2 * 4096 + 2 * 2560 + 3 * 10240)
    assert lora_parameters(ONE_BILLION, 1) == one == 704_512
    memory = training_memory(ONE_BILLION, train("lora.rank=16", "reference_mode=adapter"), "bfloat16", 1, on_gpu=True)
    adapters = 16 * one
    assert memory.weights == 2 * (BILLION + adapters)
    assert (memory.gradients, memory.optimizer, memory.reference) == (4 * adapters, 12 * adapters, 0)


@pytest.mark.parametrize("shape", [EMBEDDED_SHAPE, ONE_BILLION])
def test_a_real_model_has_the_parameters_and_adapters_of_its_shape(shape: ModelShape) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_width,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters
    linear = [one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and name != "lm_head"]
    assert lora_parameters(shape, 8) == 8 * sum(layer.in_features + layer.out_features for layer in linear)


def test_activations_grow_with_the_micro_batch_and_shrink_with_checkpoints() -> None:
    small, large, saved = (
        training_memory(ONE_BILLION, train(*overrides), "bfloat16", 1, on_gpu=True).activations
        for overrides in (
            ["micro_batch_tokens=1000"],
            ["micro_batch_tokens=8000"],
            ["micro_batch_tokens=8000", "gradient_checkpointing=true"],
        )
    )
    layer = 2 * (4 * 2048 + 3 * 2048 + 3 * 512 + 4 * 8192) + 8 * 2048
    assert small == 1000 * 16 * layer
    assert large == 8 * small
    assert saved == 8000 * (16 * 2 * 2048 + layer)


def test_buffers_are_those_of_deepspeeds_buckets() -> None:
    def buffers(*overrides: str, on_gpu: bool = True) -> float:
        return training_memory(ONE_BILLION, train(*overrides), "bfloat16", 4, on_gpu=on_gpu).buffers

    assert buffers("zero_stage=1") == 4 * 500e6
    assert buffers("zero_stage=2") == 2 * 500e6
    assert buffers("deepspeed={zero_optimization: {reduce_bucket_size: 1000}}") == 2000
    assert buffers("zero_stage=3") == 2 * (500e6 + BILLION / 16 + 50e6)
    assert buffers("lora.rank=1", on_gpu=False) == 2 * 704_512
    assert training_memory(ONE_BILLION, train("zero_stage=0"), "float32", 1, on_gpu=True).buffers == 0


@given(st.sampled_from([0, 1, 2, 3]), st.sampled_from(["float32", "bfloat16"]), st.integers(1, 64))
def test_more_workers_never_need_more_memory_each(stage: int, dtype: str, workers: int) -> None:
    few, many = (
        training_memory(EMBEDDED_SHAPE, train(f"zero_stage={stage}"), dtype, count, on_gpu=True).device
        for count in (workers, workers + 1)
    )
    assert many <= few


def test_the_chunk_of_logits_is_the_one_that_training_uses() -> None:
    from mipo_ray.training.logprobs import CHUNK_BYTES

    assert 2 * CHUNK_BYTES == LOGIT_BYTES


def test_an_engine_shares_its_weights_and_key_heads_between_its_devices() -> None:
    # 2 x 16 layers x 8 key heads x 64 x 2 bytes a token.
    whole = engine_memory(ONE_BILLION, "bfloat16", 1, 1024)
    assert (whole.weights, whole.cache_token, whole.cache_window) == (2 * BILLION, 32_768, 32_768 * 1024)
    halved = engine_memory(ONE_BILLION, "bfloat16", 2, 1024)
    assert (halved.weights, halved.cache_token) == (BILLION, 16_384)
    # Three key heads on two devices: one of them holds two.
    assert engine_memory(EMBEDDED_SHAPE, "float32", 2, 1).cache_token == 2 * 30 * 2 * 64 * 4


def test_the_work_of_a_round() -> None:
    overrides = ["generation.sampling.max_tokens=100", "generation.samples_per_prompt=2"]
    overrides += ["generation.negatives_per_prompt=4", "train.epochs=3"]
    work = round_work(load_config(overrides=overrides), rows=10, characters=2000, responses=60)
    assert work.prompt_tokens == 60 * 50
    assert work.generated_tokens == 60 * 100
    assert work.scored_tokens == 20 * 2 * 150  # each of 20 chosen responses under two mismatched prompts
    assert work.trained_tokens == 3 * 20 * (50 + 3 * 100)  # shared: the prompt once, chosen and two rejected
    packed = round_work(load_config(overrides=[*overrides, "train.layout=packed"]), 10, 2000, 60)
    assert packed.trained_tokens == 3 * 20 * 3 * (50 + 100)
    assert (
        round_work(load_config(overrides=[*overrides, "generation.score_pmi=false"]), 10, 2000, 60).scored_tokens == 0
    )
    assert generation_flops(ONE_BILLION, work) == (2 * BILLION * (3000 + 6000), 2 * BILLION * 6000)
    assert training_flops(ONE_BILLION, train(), work) == 8 * BILLION * 21_000
    assert training_flops(ONE_BILLION, train("objective=sft", "gradient_checkpointing=true"), work) == (
        8 * BILLION * 21_000
    )


def test_the_work_of_a_round_on_pairs_that_exist() -> None:
    pairs = PairSummary((), (), (), rows=10, format="trl", rejected=2, fingerprint="",
                        prompt_characters=2000, response_characters=6000)  # fmt: skip
    own = ["pairs.path=a.jsonl", "rounds=1", "evaluate.enabled=false", "train.epochs=3"]

    def trained(*overrides: str) -> float:
        work = given_work(load_config(overrides=[*own, *overrides]), pairs)
        assert (work.prompt_tokens, work.generated_tokens, work.scored_tokens) == (0, 0, 0)
        return work.trained_tokens

    assert trained() == 3 * (500 + 1500)
    assert trained("train.layout=packed") == 3 * (3 * 500 + 1500)
    assert trained("train.objective=sft") == 3 * (500 + 500)


def lines(config: Config, resources: Resources, shape: ModelShape | str) -> dict[str, str]:
    work = round_work(config, rows=1_000_000, characters=400_000_000, responses=2_000_000)
    found = describe_estimates(config, resources, shape, work)
    return {line[:16].strip(): line[16:] for line in found}


def test_the_plan_names_its_estimates_and_assumptions() -> None:
    config = load_config(overrides=["train.num_workers=4", "generation.pool.tensor_parallel_size=2"])
    found = lines(config, Resources(True, "bfloat16", 2, 1), ONE_BILLION)
    assert list(found) == ["work", "worker memory", "engine memory"]
    assert all("estimate" in line for line in found.values())
    assert "200 million prompt tokens, up to 96 million generated" in found["work"]
    assert "(4 characters a token, no filters)" in found["work"]
    assert found["worker memory"].startswith("estimate of each of 4: ")
    assert "weights 2.3 GiB, gradients 1.2 GiB, optimizer 3.5 GiB, reference 2.3 GiB, " in found["worker memory"]
    assert "weights 1.2 GiB, KV cache 16 MiB for one window of 1,024 tokens" in found["engine memory"]


def test_without_a_shape_there_is_no_memory() -> None:
    on_cpus = Resources(False, "float32", 0, 0)
    assert list(lines(Config(), on_cpus, EMBEDDED_SHAPE)) == ["work", "worker memory", "engine memory"]
    unknown = lines(Config(), on_cpus, "org/name was not downloaded yet")
    assert unknown["memory"] == "no estimate: org/name was not downloaded yet"
    assert list(unknown) == ["work", "memory"]


# Shapes.


def llama(**changes: Any) -> dict[str, Any]:
    values = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    values |= {"num_attention_heads": 4, "vocab_size": 400}
    return {**values, **changes}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (llama(), ModelShape(7, 2, 64, 128, 4, 4, 16, 400)),
        (llama(num_key_value_heads=2, head_dim=32), ModelShape(7, 2, 64, 128, 4, 2, 32, 400)),
        ({"text_config": llama(), "model_type": "gemma3"}, ModelShape(7, 2, 64, 128, 4, 4, 16, 400)),
        ({"model_type": "llama", "hidden_size": 64}, "config.json does not say num_hidden_layers, intermediate_size, "),
        (llama(num_local_experts=8), "config.json: num_local_experts: mixtures of experts are not estimated"),
    ],
)
def test_what_a_config_tells(config: dict[str, Any], expected: ModelShape | str) -> None:
    found = read_shape(config, 7)
    if isinstance(expected, str):
        assert isinstance(found, str)
        assert found.startswith(expected)
    else:
        assert found == expected


def test_parameters_are_counted_from_the_headers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama()))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    first = {"a": numpy.zeros((3, 4), numpy.float32), "scalar": numpy.zeros((), numpy.float32)}
    save_file(first, tmp_path / "model-1.safetensors", metadata={"format": "pt"})
    save_file({"b": numpy.zeros((2, 3, 5), numpy.float16)}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "scalar": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert model_shape(str(tmp_path)) == ModelShape(12 + 1 + 30, 2, 64, 128, 4, 4, 16, 400)
    assert model_shape(f"file://{tmp_path}") == model_shape(str(tmp_path))


def test_a_model_of_the_hub_has_no_shape_before_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        model_shape("no-such-organisation/no-such-model") == "no-such-organisation/no-such-model was not downloaded yet"
    )
