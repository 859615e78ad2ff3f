"""Embeddings of prompts through vLLM, compared with a forward pass of transformers."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray.data
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from mipo_ray.config.conditioning import ConditioningConfig, SimilarConfig
from mipo_ray.config.schema import Config, ModelConfig
from mipo_ray.errors import UserError
from mipo_ray.generation.embedder import EMBEDDING, check_window, embed_rows
from mipo_ray.ray_cluster.resources import Resources

pytestmark = pytest.mark.usefixtures("ray_cluster")

ON_CPU = Resources(on_gpu=False, dtype="float32", gpus_per_engine=0.0, gpus_per_worker=0.0)
BLOCK_SIZES = [3, 1, 5]
WINDOW = 32  # tokens
TWINS = (2, 7)  # the same conversation, in different blocks
PROMPTS = [
    "What should I cook?",
    "Write a letter to a friend who lives in another town, and tell the friend about the mountains.",
    "My name is Ada and I like to play the violin.",
    "How do I water plants?",
    "A question",
    "The weather in the evening is a simple question about the mountains and the garden.",
    "What is there to do in the evening?",
    "My name is Ada and I like to play the violin.",
    "Explain the system.",
]


def conversations() -> list[list[dict[str, str]]]:
    found = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    found[3] = [{"role": "system", "content": "Be short."}, *found[3]]
    return found


def prompt_blocks(messages: list[list[dict[str, str]]]) -> ray.data.Dataset:
    table = pa.table({"prompt_id": [f"p{i}" for i in range(len(messages))], "messages": messages})
    starts = np.cumsum([0, *BLOCK_SIZES[:-1]])
    return ray.data.from_arrow([table.slice(start, size) for start, size in zip(starts, BLOCK_SIZES, strict=True)])


def engines() -> list[int]:
    """Process ids of the vLLM engines on this machine that this user's tests may have started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"EngineCore" in status.read_bytes() and status.stat().st_uid == os.getuid():
                found.append(int(status.parent.name))
        except OSError:  # gone meanwhile
            continue
    return found


def test_the_policy_embeds_as_the_mean_of_its_last_hidden_states(tiny_model: Path) -> None:
    before = set(engines())
    messages = conversations()
    messages[4][0]["content"] *= 100  # longer than the window: its first tokens count
    config = Config(model=ModelConfig(max_model_len=128))
    embedded = embed_rows(prompt_blocks(messages), config, policy=str(tiny_model), resources=ON_CPU).materialize()

    blocks = [ray.get(block) for block in embedded.to_arrow_refs()]
    assert [block.num_rows for block in blocks] == BLOCK_SIZES
    table = pa.concat_tables(blocks)
    assert table["prompt_id"].to_pylist() == [f"p{i}" for i in range(len(messages))]
    assert table.schema.field("embedding").type == EMBEDDING
    found = np.array(table["embedding"].to_pylist(), dtype=np.float32)

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModel.from_pretrained(tiny_model, dtype=torch.float32).eval()
    expected = []
    for conversation in messages:
        text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        with torch.no_grad():
            token_ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :128]
            states = model(token_ids).last_hidden_state[0]
        expected.append(torch.nn.functional.normalize(states.mean(dim=0), dim=0).numpy())
    np.testing.assert_allclose(found, np.array(expected), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)

    np.testing.assert_allclose(found[TWINS[0]], found[TWINS[1]], atol=1e-6)
    similarities = found @ found.T
    others = [similarities[i, j] for i in range(len(found)) for j in range(i) if (j, i) != TWINS]
    assert max(others) < 0.9999, "different prompts must have different embeddings"

    deadline = time.monotonic() + 30
    while set(engines()) - before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not set(engines()) - before, "the engine must go away with its actor pool"


def make_bert(directory: Path) -> Path:
    """A random BERT of one layer and 32 positions, as embedding models are: no chat template, CLS pooling."""
    words = sorted({word for prompt in PROMPTS for word in prompt.lower().replace(",", "").split()})
    directory.mkdir()
    (directory / "words.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", *words]))
    tokenizer = BertTokenizer(str(directory / "words.txt"))
    tokenizer.save_pretrained(directory)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=WINDOW,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(directory)
    return directory


def test_an_embedding_model_reads_plain_text_with_its_own_pooling(tmp_path: Path, tiny_model: Path) -> None:
    directory = make_bert(tmp_path / "bert")
    config = Config(conditioning=ConditioningConfig(similar=SimilarConfig(model=str(directory))))
    rows = prompt_blocks(conversations())
    embedded = embed_rows(rows, config, policy=str(tiny_model), resources=ON_CPU).take_all()

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = BertModel.from_pretrained(directory, dtype=torch.float32).eval()
    for row, prompt in zip(embedded, PROMPTS, strict=True):  # without the system message that one of them has
        with torch.no_grad():
            states = model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]
        expected = torch.nn.functional.normalize(states[0], dim=0).numpy()
        np.testing.assert_allclose(row["embedding"], expected, atol=1e-4, err_msg=row["prompt_id"])


def test_a_prompt_longer_than_the_embedding_model_is_refused_by_name() -> None:
    check_window("p1", [1] * WINDOW, WINDOW, "org/embedder")
    with pytest.raises(
        UserError, match=rf"prompt 'p1': {WINDOW + 1} tokens .*'org/embedder': expected at most {WINDOW}"
    ):
        check_window("p1", [1] * (WINDOW + 1), WINDOW, "org/embedder")
