"""Training with real DeepSpeed in this process, against a plain torch loop; no Ray.

python -m pytest tests/integration/test_training.py
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch.nn.functional import logsigmoid

from mipo_ray.config.train import TrainConfig
from mipo_ray.errors import UserError
from mipo_ray.pairs.schema import pair_columns
from mipo_ray.storage.manifests import TrainSummary
from mipo_ray.training import deepspeed_engine as prepare
from mipo_ray.training import profile, worker
from mipo_ray.training.checkpoint import Checkpoints
from mipo_ray.training.deepspeed_config import deepspeed_config
from mipo_ray.training.reference import read_logprobs
from mipo_ray.training.step import TrainingDiverged
from mipo_ray.training.steps import known_steps, steps_of
from mipo_ray.training.worker import train_round
from mipo_ray.training.worker_settings import WorkerSettings
from tests.helpers.covering import combinations
from tests.helpers.tiny_training import VOCABULARY, ragged_pairs, read_all

LAYOUTS = ("padded", "packed", "shared")
LORA = {"rank": 4, "alpha": 8.0}
DPO_COLUMNS = ["pair_id", "prompt_token_ids", "chosen_token_ids", "rejected_token_ids"]
TRAIN = {
    "batch_size": 4,
    "epochs": 2,
    "learning_rate": 1e-3,
    "beta": 0.5,
    "max_grad_norm": 0.5,
    "weight_decay": 0.1,
    "warmup_ratio": 0.3,
    "micro_batch_tokens": 60,  # several micro-batches in a step
}


def pairs_with(rejected: int, count: int = 10) -> list[dict[str, Any]]:
    """10 pairs in steps of 4, so that the third step of each epoch has 2; with as many mismatched prompts."""
    sources = [ragged_pairs(count, seed) for seed in range(rejected)]
    return [
        {
            **rows[0],
            "rejected_token_ids": [row["rejected_token_ids"][0] for row in rows],
            "mismatched_prompt_token_ids": [row["prompt_token_ids"][::-1] for row in rows],
        }
        for rows in zip(*sources, strict=True)
    ]


def save_llama(directory: Path, seed: int = 0, **options: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        # Far from a fresh model's, so that attention matters.
        "initializer_range": 0.1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**(sizes | options))).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", autouse=True)
def unfrozen_afterwards():
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    directory = save_llama(tmp_path_factory.mktemp("model") / "initial", tie_word_embeddings=True)
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "pytorch_model.bin").write_bytes(b"older weights")
    generation = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [2, 7]}))
    return directory


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory) -> Path:
    """Another model of the same shape, as a reference that the policy does not start from."""
    return save_llama(tmp_path_factory.mktemp("model") / "other", seed=1, tie_word_embeddings=True)


def train_here(
    model_dir: Path,
    output_dir: Path,
    pairs: list[dict[str, Any]],
    dtype: str = "float32",
    reference_dir: Path | None = None,
    checkpoints: Checkpoints | None = None,
    **train: Any,
) -> tuple[TrainSummary, list[dict[str, float]]]:
    """Trains in this process alone; returns the summary and the metrics of every step."""
    settings = WorkerSettings(
        policy_dir=str(model_dir),
        reference_dir=str(reference_dir or model_dir),
        output_dir=str(output_dir),
        reference_cache=str(output_dir.parent / f"{output_dir.name} cache"),
        train=TrainConfig(**(TRAIN | train)),
        dtype=dtype,
        device="cpu",
        seed=0,
        pair_count=len(pairs),
        threads=1,
    )
    steps: list[dict[str, float]] = []
    read = read_all(pairs, settings.train.objective)
    # DeepSpeed collects garbage whenever it shards a model, which takes longer the more objects it looks at.
    gc.freeze()
    epochs = known_steps(settings, lambda epoch: steps_of(read, settings.train.batch_size))
    summary = train_round(settings, epochs, steps.append, checkpoints)
    return summary, steps


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory)


def sequence_logprob(model: Any, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
    token_logprobs = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
    return token_logprobs[len(prompt) - 1 :].gather(1, ids[len(prompt) :, None]).sum()


def ratio(policy: Any, reference: Any, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        of_reference = sequence_logprob(reference, prompt, response)
    return sequence_logprob(policy, prompt, response) - of_reference


def plain_training(model_dir: Path, reference_dir: Path, pairs: list[dict]) -> tuple[Any, list[float], list[float]]:
    """DPO as a plain loop over single sequences: the trained model, losses and gradient norms."""
    policy, reference = load(model_dir).eval(), load(reference_dir).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    # 6 steps, of which ceil(0.3 * 6) = 2 warm up; then half a cosine down to a tenth of the peak.
    rates = [0.5e-3, 1e-3] + [1e-4 + 9e-4 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(1, 5)]
    losses, norms = [], []
    for step, first in enumerate([0, 4, 8, 0, 4, 8]):
        batch = pairs[first : first + 4]
        optimizer.zero_grad()
        loss = torch.zeros(())
        for pair in batch:
            chosen = ratio(policy, reference, pair["prompt_token_ids"], pair["chosen_token_ids"])
            for response in pair["rejected_token_ids"]:
                margin = chosen - ratio(policy, reference, pair["prompt_token_ids"], response)
                loss = loss - logsigmoid(0.5 * margin) / len(batch) / len(pair["rejected_token_ids"])
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5).item())
        losses.append(loss.item())
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
    return policy, losses, norms


@pytest.fixture(scope="module")
def plain_torch(model_dir):
    return plain_training(model_dir, model_dir, pairs_with(rejected=1))


def assert_equals_plain_torch(plain: tuple, steps: list[dict[str, float]], exported: Any) -> None:
    policy, losses, norms = plain
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=1e-5, abs=1e-5)
    assert [step["gradient_norm"] for step in steps] == pytest.approx(norms, rel=1e-4)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(exported.get_parameter(name), parameter, atol=1e-5, rtol=0, msg=name)


def losses_of(steps: list[dict[str, float]]) -> list[float]:
    return [step["loss"] for step in steps]


# Against plain torch.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_every_zero_stage_and_layout_equals_a_plain_torch_loop(model_dir, plain_torch, tmp_path, zero_stage, layout):
    pairs = pairs_with(rejected=1)
    summary, steps = train_here(model_dir, tmp_path / "policy", pairs, zero_stage=zero_stage, layout=layout)
    assert [step["pairs"] for step in steps] == [4, 4, 2, 4, 4, 2]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert_equals_plain_torch(plain_torch, steps, load(tmp_path / "policy"))
    found = (summary.steps, summary.pairs, summary.first_loss, summary.last_loss)
    assert found == (6, 10, steps[0]["loss"], steps[-1]["loss"])


@pytest.mark.parametrize(
    "options",
    [
        {"zero_stage": 0, "gradient_checkpointing": True},
        {"zero_stage": 2, "reference_mode": "cached"},
        {"zero_stage": 3, "reference_mode": "cached", "gradient_checkpointing": True},
        {"zero_stage": 0, "offload_reference": True},
        {"zero_stage": 2, "offload_reference": True, "offload_optimizer": True},
        {"zero_stage": 1, "offload_optimizer": True},
        {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True, "offload_reference": True},
        {"zero_stage": 2, "micro_batch_tokens": 1},
        {"zero_stage": 3, "micro_batch_tokens": 10_000},
    ],
    ids=lambda options: ", ".join(f"{name} {value}" for name, value in options.items()),
)
def test_where_things_are_kept_changes_nothing(model_dir, plain_torch, tmp_path, options):
    _, steps = train_here(model_dir, tmp_path / "policy", pairs_with(rejected=1), **options)
    assert_equals_plain_torch(plain_torch, steps, load(tmp_path / "policy"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reference_mode", ["colocated", "cached"])
def test_another_reference_and_two_rejected_responses(model_dir, other_dir, tmp_path, layout, reference_mode):
    """`train.reference: initial`: from the second round on the policy does not start as its reference."""
    pairs = pairs_with(rejected=2)
    plain = plain_training(model_dir, other_dir, pairs)
    assert abs(plain[1][0] - math.log(2)) > 0.1
    _, steps = train_here(
        model_dir, tmp_path / "policy", pairs, reference_dir=other_dir, reference_mode=reference_mode, layout=layout
    )
    assert_equals_plain_torch(plain, steps, load(tmp_path / "policy"))


# References.


def test_first_loss_is_ln_2_in_every_combination(tmp_path):
    """Policy and reference run in the same micro-batches, so that their log-probs are the same to the bit."""
    model_dir = save_llama(tmp_path / "model", num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    pairs = pairs_with(rejected=2, count=3)
    references = [{}, {"offload_reference": True}, {"reference_mode": "cached"}]
    references += [{"reference_mode": "adapter", "lora": LORA}]
    chosen = combinations(LAYOUTS, references, (0, 1, 2, 3), (False, True))
    for number, (layout, reference, zero_stage, checkpointing) in enumerate(chosen):
        options = {"layout": layout, "zero_stage": zero_stage, "gradient_checkpointing": checkpointing, **reference}
        summary, _ = train_here(model_dir, tmp_path / str(number), pairs, epochs=1, **options)
        assert summary.first_loss == pytest.approx(math.log(2), abs=1e-6), options


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_all_references_of_adapters_give_the_same_losses(model_dir, tmp_path, zero_stage):
    runs, weights = {}, {}
    for mode, layout in [("adapter", "shared"), ("colocated", "packed"), ("cached", "shared"), ("adapter", "padded")]:
        name = f"{mode} {layout}"
        options = {"zero_stage": zero_stage, "learning_rate": 0.02, "lora": LORA}
        _, steps = train_here(
            model_dir, tmp_path / name, pairs_with(rejected=2), reference_mode=mode, layout=layout, **options
        )
        runs[name], weights[name] = losses_of(steps), load(tmp_path / name).state_dict()
    first = runs["adapter shared"]
    assert first[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first[-1] - first[2]) > 0.05  # the same two pairs, before and after: it did learn
    for name, losses in runs.items():
        assert losses == pytest.approx(first, abs=2e-5), name
        for key, tensor in weights[name].items():
            torch.testing.assert_close(tensor, weights["adapter shared"][key], atol=1e-4, rtol=0, msg=f"{name} {key}")


def test_the_cache_holds_what_plain_torch_computes_and_is_used_again(model_dir, other_dir, tmp_path, monkeypatch):
    pairs = pairs_with(rejected=2)
    _, first = train_here(model_dir, tmp_path / "a", pairs, reference_dir=other_dir, reference_mode="cached")
    stored = read_logprobs(str(tmp_path / "a cache"), len(pairs))
    reference = load(other_dir)
    with torch.no_grad():
        for pair in pairs:
            responses = [pair["chosen_token_ids"], *pair["rejected_token_ids"]]
            expected = [
                sequence_logprob(reference, pair["prompt_token_ids"], response).item() for response in responses
            ]
            assert stored[pair["pair_id"]].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)

    def no_model(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the reference is loaded though its log-probs are stored")

    monkeypatch.setattr(prepare, "reference_module", no_model)
    _, again = train_here(model_dir, tmp_path / "a", pairs, reference_dir=other_dir, reference_mode="cached")
    assert losses_of(again) == losses_of(first)


# Objectives.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("options", "first_loss"),
    [
        ({"objective": "ipo"}, 1 / (4 * 0.5**2)),
        ({"objective": "infonce"}, math.log(3)),
        ({"objective": "infonce", "length_normalized": True}, math.log(3)),
        ({"label_smoothing": 0.1}, math.log(2)),
    ],
    ids=["ipo", "infonce", "length-normalised infonce", "conservative dpo"],
)
def test_objectives_with_a_reference_start_where_their_formulas_say(model_dir, tmp_path, options, first_loss, layout):
    _, steps = train_here(model_dir, tmp_path / "policy", pairs_with(rejected=2), layout=layout, **options)
    assert steps[0]["loss"] == pytest.approx(first_loss, rel=1e-6)
    assert steps[-1]["loss"] < steps[2]["loss"]  # the same two pairs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("objective", ["sft", "sami"])
def test_objectives_without_a_reference_load_none(model_dir, tmp_path, monkeypatch, objective, layout):
    def no_model(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a reference is loaded")

    monkeypatch.setattr(prepare, "reference_module", no_model)
    pairs = pairs_with(rejected=2, count=4)
    for reference_mode in ("colocated", "cached"):
        _, (first, last) = train_here(
            model_dir,
            tmp_path / reference_mode,
            pairs,
            objective=objective,
            layout=layout,
            reference_mode=reference_mode,
        )
        policy = load(model_dir)
        with torch.no_grad():
            expected = torch.stack([plain_loss(policy, pair, objective) for pair in pairs]).mean().item()
        assert first["loss"] == pytest.approx(expected, rel=1e-5)
        assert last["loss"] < first["loss"]
        assert "reward_margin" not in first


def plain_loss(policy: Any, pair: dict[str, Any], objective: str) -> torch.Tensor:
    """sft: nats per chosen token; sami: cross-entropies of rows and columns of the log-probs per token."""
    responses = [pair["chosen_token_ids"], *pair["rejected_token_ids"]]
    prompts = [pair["prompt_token_ids"], *pair["mismatched_prompt_token_ids"]]
    if objective == "sft":
        prompts, responses = prompts[:1], responses[:1]
    per_token = torch.stack(
        [
            torch.stack([sequence_logprob(policy, prompt, response) / len(response) for response in responses])
            for prompt in prompts
        ]
    )
    if objective == "sft":
        return -per_token[0, 0]
    diagonal = torch.arange(len(prompts))
    rows, columns = (torch.nn.functional.cross_entropy(m, diagonal) for m in (per_token, per_token.T))
    return (rows + columns) / 2


# Metrics, export, precision.


def test_metrics_describe_the_trained_pairs(model_dir, tmp_path):
    pairs = pairs_with(rejected=2, count=4)
    summary, (first, last) = train_here(model_dir, tmp_path / "policy", pairs, warmup_ratio=0.0)
    policy = load(model_dir)
    with torch.no_grad():
        chosen = [sequence_logprob(policy, p["prompt_token_ids"], p["chosen_token_ids"]).item() for p in pairs]
        rejected = [
            sequence_logprob(policy, p["prompt_token_ids"], ids).item()
            for p in pairs
            for ids in p["rejected_token_ids"]
        ]
    assert first["chosen_logprob"] == pytest.approx(np.mean(chosen), abs=1e-4)
    assert first["rejected_logprob"] == pytest.approx(np.mean(rejected), abs=1e-4)
    assert (first["reward_accuracy"], first["reward_margin"]) == (0.5, 0.0)
    assert last["reward_accuracy"] > 0.5
    assert last["reward_margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"], abs=1e-6)
    assert [step["learning_rate"] for step in (first, last)] == pytest.approx([1e-3, 1e-4])
    assert summary.tokens == 2 * first["tokens"] == 2 * sum(useful_tokens(pair) for pair in pairs)


def useful_tokens(pair: dict[str, Any]) -> int:
    responses = [pair["chosen_token_ids"], *pair["rejected_token_ids"]]
    return sum(len(pair["prompt_token_ids"]) + len(response) for response in responses)


def test_forward_tokens_and_padding_are_those_of_the_layout(model_dir, tmp_path):
    pairs = pairs_with(rejected=2, count=4)
    useful = sum(useful_tokens(pair) for pair in pairs)
    found = {}
    for layout in LAYOUTS:
        options = {"layout": layout, "epochs": 1, "micro_batch_tokens": 10_000}
        _, (found[layout],) = train_here(model_dir, tmp_path / layout, pairs, **options)
        assert found[layout]["tokens"] == useful
    widest = max(
        len(p["prompt_token_ids"]) + max(len(p["chosen_token_ids"]), *(len(ids) for ids in p["rejected_token_ids"]))
        for p in pairs
    )
    assert found["padded"]["forward_tokens"] == 12 * widest
    assert found["padded"]["padding_share"] == pytest.approx(1 - useful / (12 * widest))
    assert found["packed"]["forward_tokens"] == useful - 12  # without the last token of each response
    assert found["shared"]["forward_tokens"] == useful - 12 - 2 * sum(len(p["prompt_token_ids"]) for p in pairs)
    assert found["packed"]["padding_share"] == found["shared"]["padding_share"] == 0


@pytest.mark.parametrize("options", [{}, {"lora": LORA}], ids=["all weights", "adapters"])
def test_export_is_a_whole_model_directory_with_untouched_companions(model_dir, tmp_path, options):
    train_here(model_dir, tmp_path / "policy", pairs_with(rejected=1, count=2), epochs=1, **options)
    found = {path.name for path in (tmp_path / "policy").iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert found == expected
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "policy" / name).read_bytes() == (model_dir / name).read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_bfloat16_trains_from_ln_2_and_exports_bfloat16(model_dir, plain_torch, tmp_path, zero_stage, layout):
    _, steps = train_here(
        model_dir, tmp_path / "policy", pairs_with(rejected=1), "bfloat16", zero_stage=zero_stage, layout=layout
    )
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert losses_of(steps) == pytest.approx(plain_torch[1], abs=0.1)
    assert load(tmp_path / "policy").dtype == torch.bfloat16


def test_bfloat16_keeps_float32_master_weights(model_dir, tmp_path):
    """Updates far below a bfloat16 step add up, which they would not if the weights were rounded after each."""
    pairs = pairs_with(rejected=1, count=1)
    options = {"learning_rate": 2e-5, "min_learning_rate_ratio": 1.0, "weight_decay": 0.0}
    _, steps = train_here(model_dir, tmp_path / "policy", pairs, "bfloat16", batch_size=1, epochs=30, **options)
    before, after = load(model_dir).to(torch.bfloat16), load(tmp_path / "policy")
    moved = [
        (parameter != after.get_parameter(name)).float().mean().item()
        for name, parameter in before.named_parameters()
        if "proj" in name
    ]
    assert min(moved) > 0.1
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_gradient_checkpointing_changes_nothing_though_the_model_has_dropout(tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropouts = {"dropout": 0.4, "attention_dropout": 0.4, "layerdrop": 0.4}
    config = OPTConfig(vocab_size=VOCABULARY, max_position_embeddings=64, word_embed_proj_dim=32, **sizes, **dropouts)
    OPTForCausalLM(config).save_pretrained(tmp_path / "initial")
    runs = []
    for stage, checkpointing, layout in [
        (2, False, "padded"),
        (2, True, "padded"),
        (2, True, "packed"),
        (3, True, "shared"),
    ]:
        options = {"zero_stage": stage, "gradient_checkpointing": checkpointing, "layout": layout}
        output = tmp_path / f"{stage} {checkpointing} {layout}"
        runs.append(losses_of(train_here(tmp_path / "initial", output, pairs_with(rejected=1, count=6), **options)[1]))
    assert runs[0][0] == pytest.approx(math.log(2), abs=1e-6)
    for run in runs[1:]:
        assert run == pytest.approx(runs[0], abs=1e-5)


# What goes wrong.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_divergence_stops_training_before_a_policy_is_written(model_dir, tmp_path, zero_stage, dtype):
    with pytest.raises(TrainingDiverged, match=r"step 1: the (loss|gradient norm) is (nan|inf)"):
        train_here(
            model_dir, tmp_path / "policy", pairs_with(rejected=1), dtype, learning_rate=1e30, zero_stage=zero_stage
        )
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize(
    ("streamed", "message"),
    [
        ([4], "epoch 0: expected 2 steps for this worker, found 1"),
        ([4, 4, 1], "epoch 0: expected 2 steps for this worker, found more"),
        ([4, 3], "epoch 0, step 1: expected 4 pairs over all workers, found 3"),
        ([5, 3], "epoch 0, step 0: expected 4 pairs over all workers, found 5"),
    ],
)
@pytest.mark.parametrize("reference_mode", ["colocated", "cached"])
def test_other_steps_than_promised_are_an_error(model_dir, tmp_path, streamed, message, reference_mode):
    pairs = iter(read_all(pairs_with(rejected=1, count=9)))
    steps = [list(itertools.islice(pairs, size)) for size in streamed]
    train = TrainConfig(batch_size=4, reference_mode=reference_mode)
    settings = WorkerSettings(
        policy_dir=str(model_dir),
        reference_dir=str(model_dir),
        output_dir=str(tmp_path / "policy"),
        reference_cache=str(tmp_path / "cache"),
        train=train,
        dtype="float32",
        device="cpu",
        seed=0,
        pair_count=8,
    )
    with pytest.raises(ValueError, match=message):
        train_round(settings, known_steps(settings, lambda epoch: steps), lambda metrics: None)
    assert not (tmp_path / "policy").exists()


def test_pairs_with_different_numbers_of_rejected_responses_are_an_error(model_dir, tmp_path):
    pairs = [*pairs_with(rejected=1, count=1), *pairs_with(rejected=2, count=1)]
    with pytest.raises(ValueError, match=r"equally many rejected responses in every pair, found \[1, 2\]"):
        train_here(model_dir, tmp_path / "policy", pairs)


@pytest.mark.parametrize("objective", ["dpo", "sami"])
def test_the_command_trains_a_parquet_file_and_prints_a_line_per_step(model_dir, tmp_path, capsys, objective):
    columns = pair_columns(objective)
    pairs = pairs_with(rejected=2, count=5)
    table = pyarrow.table({name: [as_lists(pair[name]) for pair in pairs] for name in columns})
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    places = {"pairs": tmp_path / "pairs.parquet", "model": model_dir, "output": tmp_path / "policy"}
    overrides = ["train.batch_size=2", "model.dtype=float32", f"train.objective={objective}"]
    named = itertools.chain(*((f"--{name}", str(path)) for name, path in places.items()))
    assert worker.main([*named, *overrides]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:3] for line in lines[:-1]] == [
        [f"step {step}", "total_steps 3", f"pairs {pairs}"] for step, pairs in enumerate([2, 2, 1])
    ]
    assert lines[-1].startswith("TrainSummary(steps=3, pairs=5")
    assert load(tmp_path / "policy").num_parameters() > 0


def as_lists(value: Any) -> Any:
    if isinstance(value, str):
        return value
    return [as_lists(one) for one in value] if isinstance(value, list) else value.tolist()


def test_raw_deepspeed_keys_are_merged_over_the_generated_ones():
    train = TrainConfig(zero_stage=3, deepspeed={"zero_optimization": {"offload_param": {"device": "cpu"}}})
    config = deepspeed_config(train, "bfloat16")
    assert config["zero_optimization"] == {"stage": 3, "offload_param": {"device": "cpu"}}
    assert config["bf16"] == {"enabled": True}
    with pytest.raises(UserError, match="found 'float16'"):
        deepspeed_config(train, "float16")


@pytest.mark.parametrize(
    ("minutes", "steps", "saved_after"),
    [(1e-9, None, [1, 2, 3, 4, 5]), (60, None, []), (1e-9, 2, [2, 4])],
    ids=["every moment", "every hour", "by steps"],
)
def test_checkpoints_come_by_minutes_or_by_steps_and_never_after_the_last(
    model_dir, tmp_path, monkeypatch, minutes, steps, saved_after
):
    monkeypatch.setattr(worker, "CHECKPOINT_MINUTES", minutes)
    saved: list[int] = []
    checkpoints = Checkpoints(publish=lambda directory, steps: saved.append(steps), latest=contextlib.nullcontext)
    train_here(model_dir, tmp_path / "policy", pairs_with(rejected=1), checkpoints=checkpoints, checkpoint_steps=steps)
    assert saved == saved_after


def test_attention_that_cannot_train_here_is_refused_before_training(model_dir, tmp_path):
    with pytest.raises(UserError, match="flex_attention trains on GPUs only"):
        train_here(model_dir, tmp_path / "a", pairs_with(1), layout="packed", attention="flex_attention")


@pytest.mark.parametrize(
    ("columns", "dropped", "overrides", "message"),
    [
        (DPO_COLUMNS[:2], "", [], "expected the columns chosen_token_ids, rejected_token_ids too, found pair_id"),
        (DPO_COLUMNS, "", ["train.objective=sami"], "sami: expected the columns mismatched_prompt_token_ids too"),
        (DPO_COLUMNS, "truncated", [], "expected at least one pair that was not dropped, found none"),
        (None, "", [], "pairs.parquet: expected a Parquet file of pairs"),
    ],
    ids=["columns", "sami", "dropped", "no Parquet"],
)
def test_the_command_refuses_files_that_it_cannot_train_on(
    model_dir, tmp_path, capsys, columns, dropped, overrides, message
):
    path = tmp_path / "pairs.parquet"
    if columns is None:
        path.write_text("pairs")
    else:
        pairs = pairs_with(rejected=1, count=2)
        table = {name: [as_lists(pair[name]) for pair in pairs] for name in columns}
        pyarrow.parquet.write_table(pyarrow.table(table | {"dropped": [dropped] * 2}), path)
    code = worker.main(["--pairs", str(path), "--model", str(model_dir), *overrides])
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.reference_mode=cached"],
        ["train.objective=sami"],
        ["train.lora.rank=2", "train.reference_mode=adapter"],
    ],
    ids=" ".join,
)
def test_a_step_is_profiled(model_dir, capsys, overrides):
    sizes = ["--prompt", "12", "--response", "5", "--pairs", "2"]
    assert profile.main(["--model", str(model_dir), *sizes, *overrides]) == 0
    shown = capsys.readouterr().out
    for name in ("policy", "backward", "optimizer", "FLOPs", "peak memory", "aten::"):
        assert name in shown
    trained_tokens = {"sami": 2 * 2 * 2 * 17}.get(overrides[0].rpartition("=")[2] if overrides else "", 2 * 2 * 17)
    assert f"tokens {trained_tokens} of all sequences" in shown


def test_a_model_that_cannot_be_trained_is_not_profiled(model_dir, capsys, tmp_path):
    shutil.copytree(model_dir, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert profile.main(["--model", str(tmp_path / "model")]) == 2
    assert "field quantization_config: expected none, found fp8" in capsys.readouterr().err
