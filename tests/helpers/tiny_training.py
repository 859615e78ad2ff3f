"""What tests of training share: pairs of random ids, and a Llama small enough to train in a moment."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mipo_ray.config.train import Objective
from mipo_ray.storage.rounds import Round
from mipo_ray.training.layout import Pair, read_pair

VOCABULARY = 128


def ragged_pairs(count: int, seed: int = 0) -> list[dict]:
    """Rows of pairs of random lengths, in the form of version 2, with one rejected response each."""
    generator = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return generator.integers(0, VOCABULARY, generator.integers(low, high)).astype(np.int32)

    return [
        {
            "pair_id": f"{index:016x}",
            "prompt_token_ids": ids(2, 9),
            "chosen_token_ids": ids(1, 9),
            "rejected_token_ids": [ids(1, 9)],
        }
        for index in range(count)
    ]


def read_all(rows: list[dict[str, Any]], objective: Objective = "dpo") -> list[Pair]:
    """The pairs of these rows, as a worker reads them."""
    return [read_pair(row, objective) for row in rows]


def save_tied_llama(directory: Path) -> Path:
    """A random Llama of 2 layers with tied embeddings, in float32, beside a tokenizer in name; returns `directory`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@dataclass(frozen=True)
class KillsItsWorker:
    """Fault injection: events whose sender, a training worker, kills its own process where a step would be reported.

    It does so once: `flag` is a file that says that it was done. All other events go to `events`.
    """

    events: Any
    step: int
    flag: Path

    def at(self, round: Round, stage: str) -> KillsItsWorker:
        return replace(self, events=self.events.at(round, stage))

    def emit(self, event: dict[str, Any]) -> None:
        if event.get("step") == self.step and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        self.events.emit_and_wait(event)

    def tell(self, event: dict[str, Any]) -> None:
        self.events.tell(event)
