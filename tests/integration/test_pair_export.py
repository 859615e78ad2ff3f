"""Exported pairs in TRL itself: its DPOTrainer reads the file, trains a step, and comes to this project's loss.

python -m pytest tests/integration/test_pair_export.py
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import pytest
import torch

from mipo_ray.config.recipe import load_config
from mipo_ray.config.train import TrainConfig
from mipo_ray.generation.given_pairs import token_pairs
from mipo_ray.pairs.__main__ import main
from mipo_ray.pairs.formats import FORMATS
from mipo_ray.pairs.given import check_pairs, given_tables
from mipo_ray.pairs.schema import kept_pairs
from mipo_ray.training.attention import use_attention
from mipo_ray.training.layout import lay_out, read_pairs
from mipo_ray.training.logprobs import response_logprobs
from mipo_ray.training.loss import PairLogprobs, pair_losses
from tests.helpers.golden_run import GoldenRun
from tests.helpers.paired_runs import make_pair, make_run
from tests.helpers.runs import read_pairs as read_pairs_of_run
from tests.helpers.tiny_model import CHAT_TEMPLATE, END

BETA = 0.3
# Turns end with the end token, and the prompt says a day that the run fixed: as Llama 3's template does.
DATED = (
    "{{ '<|im_start|>system\n' + date_string + '<|im_end|>' }}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ANSWERS = [
    ("The violin, in the evening.", "Another town."),
    ("Dinner for a friend who lives in the mountains.", "The weather is simple."),
    ("No.", "Water the plants in the garden, and write a letter to Ada when there is no time."),
]


@pytest.fixture(params=[DATED, CHAT_TEMPLATE], ids=["turns end with the end token", "and a line end behind it"])
def tokenizer(request: pytest.FixtureRequest, tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = request.param
    return tokenizer


@pytest.fixture
def export(tokenizer: Any, tmp_path: Path) -> Path:
    """A run's pairs, with the ids that an engine would have sampled, handed to TRL by the command."""
    pairs = []
    for number, (chosen, rejected) in enumerate(ANSWERS):
        messages = [{"role": "user", "content": f"Question {number}?"}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024"
        )
        ids = [tokenizer(text + END, add_special_tokens=False)["input_ids"] for text in (chosen, rejected)]
        columns: dict[str, Any] = {"messages": messages, "prompt_token_ids": prompt, "chosen": chosen}
        columns |= {"chosen_token_ids": ids[0], "rejected_token_ids": [ids[1]]}
        pairs.append(make_pair(number, [rejected], **columns))
    pairs.append(make_pair(9, dropped="truncated"))
    make_run(tmp_path / "run", [pairs])
    assert main(["export", str(tmp_path / "run"), "--format", "trl", "--output", str(tmp_path / "trl")]) == 0
    return tmp_path


def test_a_step_of_trl_has_the_loss_of_ours(tokenizer: Any, export: Path, tiny_model: Path) -> None:
    """The policy is moved off its reference first: as equals, any pairs would give ln 2.

    TRL tokenises the texts anew. It comes to the sampled ids where a turn ends with the end token; a template that
    writes more behind it makes that a part of the response, and then the ids differ by that alone.
    """
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    policy = moved(reference)
    rows = load_dataset(
        "json", data_files=str(export / "trl/round_0.jsonl"), split="train", cache_dir=str(export / "cache")
    )
    trainer = DPOTrainer(
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(reference),
        args=DPOConfig(
            output_dir=str(export / "trained"),
            beta=BETA,
            max_steps=1,
            logging_steps=1,
            per_device_train_batch_size=len(ANSWERS),
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    by_trl = trainer.state.log_history[0]["loss"]

    files = sorted((export / "run/rounds/000/generate").glob("*.parquet"))
    pairs = [pair for file in files for pair in kept_pairs(pyarrow.parquet.read_table(file)).to_pylist()]
    own = {tuple(pair["prompt_token_ids"]): pair for pair in pairs}
    behind = [] if tokenizer.chat_template == DATED else tokenizer("\n", add_special_tokens=False)["input_ids"]
    for row in trainer.train_dataset:
        pair = own.pop(tuple(row["prompt_ids"]))
        pair["chosen_token_ids"] += behind
        pair["rejected_token_ids"] = [pair["rejected_token_ids"][0] + behind]
        assert [row["chosen_ids"], row["rejected_ids"]] == [pair["chosen_token_ids"], *pair["rejected_token_ids"]]
    assert own == {}

    ours = dpo_loss(policy, reference, pa.Table.from_pylist(pairs))
    assert abs(ours - 0.6931) > 0.05
    assert ours == pytest.approx(by_trl, abs=1e-4)


def test_exported_pairs_come_back_with_the_ids_they_left_with(tokenizer: Any, export: Path, tiny_model: Path) -> None:
    """And so with the loss above: what TRL is given and what `pairs.path` reads are the pairs of the run."""
    model = export / "model"
    shutil.copytree(tiny_model, model)
    tokenizer.save_pretrained(model)
    own = ["rounds=1", "evaluate.enabled=false", f"pairs.path={export}/trl/round_0.jsonl", f"model.path={model}"]
    config = load_config(None, own)
    summary = check_pairs(config.pairs)
    (block,) = given_tables(config.pairs, summary.format, summary.files)
    imported = token_pairs(block, config=config, policy=str(model), rejected=summary.rejected)
    files = sorted((export / "run/rounds/000/generate").glob("*.parquet"))
    left = pa.concat_tables([pyarrow.parquet.read_table(file) for file in files])
    columns = ["messages", "chosen", "rejected", "prompt_token_ids", "chosen_token_ids", "rejected_token_ids"]
    assert imported.select(columns).to_pylist() == kept_version_1(left).select(columns).to_pylist()


def kept_version_1(table: pa.Table) -> pa.Table:
    return table.filter(pc.equal(table["dropped"], ""))


def moved(model: Any) -> Any:
    """A copy whose weights are some way off."""
    policy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return policy


def dpo_loss(policy: Any, reference: Any, table: Any) -> float:
    """The mean loss of these pairs, as a training worker computes it."""
    train = TrainConfig(beta=BETA, layout="packed")
    trees = [tree for pair in read_pairs(table, "dpo") for tree in pair.trees]
    batch = lay_out(trees, train.layout)
    for model in (policy, reference):
        use_attention(model, train.attention, train.layout)
    with torch.no_grad():
        scores = [response_logprobs(model, batch).view(len(trees), 1, 2) for model in (policy, reference)]
    tokens = torch.tensor([[len(response) for response in tree.responses] for tree in trees])
    return pair_losses(PairLogprobs(policy=scores[0], reference=scores[1], tokens=tokens), train).mean().item()


def test_a_runs_own_pairs_leave_in_every_form(golden_run: GoldenRun, tmp_path: Path) -> None:
    """Of a run that was really made: two rejected responses each, in a directory whose name has everything in it."""
    pairs = [pair for number in (0, 1) for pair in read_pairs_of_run(golden_run.directory, number)]
    kept = [pair for pair in pairs if not pair["dropped"]]
    assert kept
    for name, form in FORMATS.items():
        output = tmp_path / name
        assert main(["export", str(golden_run.directory), "--format", name, "--output", str(output)]) == 0
        if form.row is None:
            tables = [pyarrow.parquet.read_table(output / f"round_{number}.parquet") for number in (0, 1)]
            found = [pair["pair_id"] for table in tables for pair in table.to_pylist()]
            assert sorted(found) == sorted(pair["pair_id"] for pair in kept)
        else:
            lines = [line for number in (0, 1) for line in (output / f"round_{number}.jsonl").read_text().splitlines()]
            assert len(lines) == sum(len(as_list(pair["rejected"])) for pair in kept)
        assert golden_run.directory.name not in (output / "README.md").read_text()


def as_list(rejected: str | list[str]) -> list[str]:
    """The rejected responses of a pair of either version."""
    return [rejected] if isinstance(rejected, str) else rejected
