"""Training with real DeepSpeed: in this process, and on a Ray cluster with two workers."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch.nn.functional import logsigmoid

from mipo_ray import monitoring
from mipo_ray.config import Config, TrainConfig
from mipo_ray.errors import UserError
from mipo_ray.resources import Resources
from mipo_ray.storage import open_run
from mipo_ray.training import worker
from mipo_ray.training.engine import deepspeed_config
from mipo_ray.training.layout import PAIR_COLUMNS
from mipo_ray.training.worker import TrainingDiverged, WorkerSettings, train_round

VOCABULARY = 128
# 10 pairs in steps of 4: the third step of each epoch has 2.
ON_CPU = Resources(on_gpu=False, dtype="float32", gpus_per_engine=0.0, gpus_per_worker=0.0)
TRAIN = {
    "batch_size": 4,
    "epochs": 2,
    "learning_rate": 1e-3,
    "beta": 0.5,
    "max_grad_norm": 0.5,
    "weight_decay": 0.1,
    "warmup_ratio": 0.3,
}


def ragged_pairs(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return generator.integers(0, VOCABULARY, generator.integers(low, high)).astype(np.int32)

    return [
        {"prompt_token_ids": ids(2, 9), "chosen_token_ids": ids(1, 9), "rejected_token_ids": ids(1, 9)}
        for _ in range(count)
    ]


def save_tiny_llama(directory: Path, **options) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    LlamaForCausalLM(LlamaConfig(**(sizes | options))).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    directory = save_tiny_llama(tmp_path_factory.mktemp("model") / "initial", tie_word_embeddings=True)
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "pytorch_model.bin").write_bytes(b"older weights")
    generation = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [2, 7]}))
    return directory


def train_here(model_dir: Path, output_dir: Path, pairs: list[dict], dtype: str = "float32", **train):
    """Trains in this process alone; returns the summary and the metrics of every step."""
    settings = WorkerSettings(
        policy_dir=str(model_dir),
        reference_dir=str(model_dir),
        output_dir=str(output_dir),
        train=TrainConfig(**(TRAIN | train)),
        dtype=dtype,
        device="cpu",
        seed=0,
        pairs_per_worker=len(pairs),
        threads=1,
    )
    steps: list[dict[str, float]] = []
    return train_round(settings, lambda epoch: column_batches(pairs), steps.append), steps


def column_batches(pairs: list[dict], size: int = 3):
    for start in range(0, len(pairs), size):
        yield {name: [pair[name] for pair in pairs[start : start + size]] for name in PAIR_COLUMNS}


def load(directory: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory)


def sequence_logprob(model, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
    token_logprobs = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
    return token_logprobs[len(prompt) - 1 :].gather(1, ids[len(prompt) :, None]).sum()


@pytest.fixture(scope="module")
def plain_torch(model_dir):
    """The same training as a plain loop over single sequences: the trained model, losses and gradient norms."""
    policy = load(model_dir).eval()
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    pairs = ragged_pairs(10)
    # 6 steps, of which ceil(0.3 * 6) = 2 warm up; then half a cosine down to a tenth of the peak.
    rates = [0.5e-3, 1e-3] + [1e-4 + 9e-4 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(1, 5)]
    losses, norms = [], []
    for step, first in enumerate([0, 4, 8, 0, 4, 8]):
        batch = pairs[first : first + 4]
        optimizer.zero_grad()
        loss = torch.zeros(())
        for prompt, chosen, rejected in ([pair[name] for name in PAIR_COLUMNS] for pair in batch):
            with torch.no_grad():
                anchor = sequence_logprob(reference, prompt, chosen) - sequence_logprob(reference, prompt, rejected)
            ratio = sequence_logprob(policy, prompt, chosen) - sequence_logprob(policy, prompt, rejected)
            loss = loss - logsigmoid(0.5 * (ratio - anchor)) / len(batch)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5).item())
        losses.append(loss.item())
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
    return policy, losses, norms


@pytest.mark.parametrize(
    ("zero_stage", "micro_batch_size"), [(0, 3), (1, 1), (2, 3), (2, 4), (3, 3)], ids=lambda value: str(value)
)
def test_every_zero_stage_equals_a_plain_torch_loop(model_dir, plain_torch, tmp_path, zero_stage, micro_batch_size):
    policy, losses, norms = plain_torch
    summary, steps = train_here(
        model_dir, tmp_path / "policy", ragged_pairs(10), zero_stage=zero_stage, micro_batch_size=micro_batch_size
    )
    assert [step["pairs"] for step in steps] == [4, 4, 2, 4, 4, 2]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert [step["loss"] for step in steps] == pytest.approx(losses, abs=1e-5)
    assert [step["gradient_norm"] for step in steps] == pytest.approx(norms, abs=1e-4)
    assert (summary.steps, summary.pairs, summary.first_loss, summary.last_loss) == (
        6,
        10,
        steps[0]["loss"],
        steps[-1]["loss"],
    )
    exported = load(tmp_path / "policy")
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(exported.get_parameter(name), parameter, atol=1e-5, rtol=0, msg=name)


def test_export_is_a_whole_model_directory_with_untouched_companions(model_dir, tmp_path):
    train_here(model_dir, tmp_path / "policy", ragged_pairs(2), epochs=1)
    found = {path.name for path in (tmp_path / "policy").iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert found == expected
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "policy" / name).read_bytes() == (model_dir / name).read_bytes()


def test_metrics_describe_the_trained_pairs(model_dir, tmp_path):
    pairs = ragged_pairs(4)
    summary, (first, last) = train_here(model_dir, tmp_path / "policy", pairs, warmup_ratio=0.0)
    policy = load(model_dir)
    with torch.no_grad():
        chosen = [sequence_logprob(policy, p["prompt_token_ids"], p["chosen_token_ids"]).item() for p in pairs]
    assert first["chosen_logprob"] == pytest.approx(np.mean(chosen), abs=1e-4)
    assert (first["reward_accuracy"], first["reward_margin"]) == (0.5, 0.0)
    assert last["reward_accuracy"] > 0.5
    assert last["reward_margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"], abs=1e-6)
    tokens = sum(
        2 * len(p["prompt_token_ids"]) + len(p["chosen_token_ids"]) + len(p["rejected_token_ids"]) for p in pairs
    )
    assert summary.tokens == 2 * tokens
    assert [step["learning_rate"] for step in (first, last)] == pytest.approx([1e-3, 1e-4])


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_bfloat16_trains_from_ln_2_and_exports_bfloat16(model_dir, plain_torch, tmp_path, zero_stage):
    _, steps = train_here(
        model_dir, tmp_path / "policy", ragged_pairs(10), "bfloat16", zero_stage=zero_stage, micro_batch_size=3
    )
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert [step["loss"] for step in steps] == pytest.approx(plain_torch[1], abs=0.02)
    assert load(tmp_path / "policy").dtype == torch.bfloat16


def test_gradient_checkpointing_changes_nothing_though_the_model_has_dropout(tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropouts = {"dropout": 0.4, "attention_dropout": 0.4, "layerdrop": 0.4}
    config = OPTConfig(vocab_size=VOCABULARY, max_position_embeddings=64, word_embed_proj_dim=32, **sizes, **dropouts)
    OPTForCausalLM(config).save_pretrained(tmp_path / "initial")
    runs = [
        train_here(
            tmp_path / "initial", tmp_path / str(on), ragged_pairs(6), zero_stage=stage, gradient_checkpointing=on
        )[1]
        for stage, on in [(2, False), (2, True), (3, True)]
    ]
    assert runs[0][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    for run in runs[1:]:
        assert [step["loss"] for step in run] == pytest.approx([step["loss"] for step in runs[0]], abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_divergence_stops_training_before_a_policy_is_written(model_dir, tmp_path, zero_stage, dtype):
    with pytest.raises(TrainingDiverged, match=r"step 1: the (loss|gradient norm) is (nan|inf)"):
        train_here(model_dir, tmp_path / "policy", ragged_pairs(8), dtype, learning_rate=1e30, zero_stage=zero_stage)
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize(("streamed", "found"), [(7, "found 7"), (9, "found more")])
def test_another_number_of_pairs_than_promised_is_an_error(model_dir, tmp_path, streamed, found):
    settings = WorkerSettings(
        str(model_dir), str(model_dir), str(tmp_path / "o"), TrainConfig(), "float32", "cpu", 0, 8, 1
    )
    with pytest.raises(ValueError, match=f"epoch 0: expected 8 pairs for this worker, {found}"):
        train_round(settings, lambda epoch: column_batches(ragged_pairs(streamed)), lambda metrics: None)


def test_the_command_trains_a_parquet_file_and_prints_a_line_per_step(model_dir, tmp_path, capsys):
    columns = {name: [pair[name] for pair in ragged_pairs(5)] for name in PAIR_COLUMNS}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "pairs.parquet")
    paths = [
        "--pairs",
        str(tmp_path / "pairs.parquet"),
        "--model",
        str(model_dir),
        "--output",
        str(tmp_path / "policy"),
    ]
    worker.main([*paths, "train.batch_size=2", "model.dtype=float32"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:3] for line in lines[:-1]] == [
        [f"step {step}", "total_steps 3", f"pairs {pairs}"] for step, pairs in enumerate([2, 2, 1])
    ]
    assert lines[-1].startswith("TrainSummary(steps=3, pairs=5")
    assert load(tmp_path / "policy").num_parameters() > 0


def test_raw_deepspeed_keys_are_merged_over_the_generated_ones():
    train = TrainConfig(zero_stage=3, deepspeed={"zero_optimization": {"offload_param": {"device": "cpu"}}})
    config = deepspeed_config(train, "bfloat16", num_workers=2)
    assert config["zero_optimization"] == {"stage": 3, "offload_param": {"device": "cpu"}}
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (2, 1)
    with pytest.raises(UserError, match="found 'float16'"):
        deepspeed_config(train, "float16", num_workers=2)


def test_two_ray_workers_equal_one(ray_cluster, model_dir, tmp_path):
    import ray.data

    from mipo_ray.training.trainer import train_policy

    pairs = ragged_pairs(11)
    dataset = ray.data.from_items([{"pair_id": str(index), **pair} for index, pair in enumerate(pairs)])
    run = open_run(str(tmp_path / "two"))
    events = monitoring.start(run).at(0, "train")
    settings = TRAIN | {"num_workers": 2, "micro_batch_size": 1, "zero_stage": 2, "max_failures": 0}
    summary = train_policy(
        Config.model_validate({"train": settings}),
        dataset.repartition(3),
        len(pairs),
        policy=str(model_dir),
        reference=str(model_dir),
        run=run,
        stage="train",
        resources=ON_CPU,
        events=events,
    )
    events.flush()
    # Of 11 pairs in steps of 4, the last step has 3, of which the two workers can share 2.
    assert (summary.steps, summary.pairs, summary.pairs_unused) == (6, 10, 1)
    one, one_steps = train_here(model_dir, tmp_path / "one", pairs[:10])
    steps = [event for event in monitoring.read_events(run) if event["event"] == "train_step"]
    assert summary.tokens == one.tokens
    for key in ("step", "pairs", "loss", "gradient_norm", "reward_accuracy", "chosen_logprob", "learning_rate"):
        assert [step[key] for step in steps] == pytest.approx([step[key] for step in one_steps], abs=1e-4), key
    expected = load(tmp_path / "one")
    for name, parameter in load(tmp_path / "two" / "train" / "policy").named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), atol=1e-5, rtol=0, msg=name)


def test_a_failed_worker_is_reported_with_its_own_message_first(ray_cluster, model_dir, tmp_path):
    import ray.data

    from mipo_ray.training.trainer import train_policy

    dataset = ray.data.from_items([{"pair_id": str(index), **pair} for index, pair in enumerate(ragged_pairs(4))])
    run = open_run(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"^training worker 0: epoch 0: expected 5 pairs for this worker, found 4"):
        train_policy(
            Config.model_validate({"train": TRAIN | {"max_failures": 0}}),
            dataset,
            5,
            policy=str(model_dir),
            reference=str(model_dir),
            run=run,
            stage="train",
            resources=ON_CPU,
            events=monitoring.start(run),
        )
