"""The scoring actor: log-probs of given responses under given conditionings, by one or more models.

It computes them with the trainer's own function, so that a policy equal to the initial model scores exactly as it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mipo_ray.errors import brief
from mipo_ray.monitoring.events import Events
from mipo_ray.monitoring.idle import IdleClock
from mipo_ray.pairs.schema import TOKEN_IDS

# One row per response: `conditionings` are prompts (token ids) that the response is scored under, `models` the names of
# the models that score it. The actor adds a column `logprobs_<name>` (list<double>, nats, one per conditioning and in
# their order, so that the row's `conditioning_ids` name these too; empty for a model that the row does not name).
SCORING_COLUMNS = (
    ("conditionings", pa.list_(TOKEN_IDS)),
    ("response_token_ids", TOKEN_IDS),
    ("models", pa.list_(pa.string())),
)
# What the engine said of its own answer, nats: compared with the log-prob under the first conditioning by the last of
# the row's models, which are what the answer was sampled under, and by. Null where it was sampled otherwise.
SAMPLER_LOGPROB = ("sampler_logprob", pa.float64())


@dataclass(frozen=True)
class ScorerSettings:
    """`models`: name -> model path, all loaded beside each other; `batch_size`: sequences per forward pass."""

    models: Mapping[str, str]
    dtype: str
    batch_size: int
    on_gpu: bool
    trust_remote_code: bool


class Scorer:
    """A Ray Data actor that scores blocks of rows (SCORING_COLUMNS); `gpus` are those that it reserves."""

    def __init__(self, settings: ScorerSettings, events: Events, gpus: float = 0.0):
        self._idle = IdleClock(gpus)
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from mipo_ray.models.source import local_model_directory

        logging.disable_progress_bar()
        if not settings.on_gpu:
            torch.set_num_threads(os.cpu_count() or 1)  # Ray set it from the actor's logical CPUs
        self._settings = settings
        self._events = events
        self._models: dict[str, Any] = {}
        for name, path in settings.models.items():
            directory = local_model_directory(path, trust_remote_code=settings.trust_remote_code)
            # A model that needs several GPUs for its engine is spread over as many here, layer by layer.
            several = settings.on_gpu and torch.cuda.device_count() > 1
            model = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=getattr(torch, settings.dtype),
                device_map="auto" if several else None,
                trust_remote_code=settings.trust_remote_code,
            ).eval()
            self._models[name] = model.to("cuda") if settings.on_gpu and not several else model

    def __call__(self, block: pa.Table) -> pa.Table:
        """Adds the `logprobs_<name>` columns; drops the token ids, which are large."""
        self._idle.work_begins()
        rows = block.select([name for name, _ in SCORING_COLUMNS]).to_pylist()
        for name in self._models:
            scored = [row if name in row["models"] else {**row, "conditionings": []} for row in rows]
            values = self._score(name, scored)
            block = block.append_column(f"logprobs_{name}", pa.array(values, pa.list_(pa.float64())))
        if SAMPLER_LOGPROB[0] in block.column_names:
            self._compare_with_sampler(block, rows)
        self._idle.work_ends()
        self._events.emit({"event": "scored", "scored_responses": len(rows), **self._idle.take()})
        return block.drop_columns([name for name, _ in SCORING_COLUMNS])

    def _compare_with_sampler(self, block: pa.Table, rows: list[dict[str, Any]]) -> None:
        """Raises SamplerDisagrees where an answer was sampled by another model than the one that scored it."""
        from mipo_ray.training.agreement import Comparison, bound_for, check_agreement

        sampled = block[SAMPLER_LOGPROB[0]].to_pylist()
        for name, model in self._models.items():
            scores = block[f"logprobs_{name}"].to_pylist()
            compared = [
                Comparison(f"held-out answer to {brief(prompt_id)}", len(row["response_token_ids"]), logprob, own[0])
                for prompt_id, row, logprob, own in zip(
                    block["prompt_id"].to_pylist(), rows, sampled, scores, strict=True
                )
                if logprob is not None and name == row["models"][-1]
            ]
            check_agreement(compared, bound_for(model, model.device))

    def _score(self, name: str, rows: list[dict[str, Any]]) -> list[list[float]]:
        import torch

        from mipo_ray.training.layout import lay_out, sequence_trees
        from mipo_ray.training.logprobs import response_logprobs

        model = self._models[name]
        sequences = [
            (row_index, position, conditioning, row["response_token_ids"])
            for row_index, row in enumerate(rows)
            for position, conditioning in enumerate(row["conditionings"])
        ]
        sequences.sort(key=lambda item: len(item[2]) + len(item[3]))  # alike lengths together: little padding
        scores = [[0.0] * len(row["conditionings"]) for row in rows]
        for start in range(0, len(sequences), self._settings.batch_size):
            chunk = sequences[start : start + self._settings.batch_size]
            batch = lay_out(
                sequence_trees([(conditioning, response) for _, _, conditioning, response in chunk]), "padded"
            )
            with torch.inference_mode():
                logprobs = response_logprobs(model, batch.to(model.device))
            for (row_index, position, _, _), value in zip(chunk, logprobs.tolist(), strict=True):
                scores[row_index][position] = value
        return scores
