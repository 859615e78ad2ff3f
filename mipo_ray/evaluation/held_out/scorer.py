"""What the scoring actors do: log-probs of given responses under given conditionings, by one or more models.

It computes them with the trainer's own function and layout `shared`, in which a prompt stands once for all responses
under it; a model that cannot honour that layout is scored in `padded`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mipo_ray.config.train import Layout
from mipo_ray.errors import UserError, brief
from mipo_ray.evaluation.held_out.passes import ScoredTree, scoring_passes
from mipo_ray.monitoring.events import Events
from mipo_ray.monitoring.idle import IdleClock
from mipo_ray.pairs.schema import TOKEN_IDS, innermost_lists, lists_as_arrays
from mipo_ray.ray_cluster.gpus import check_torch_gpu

# One row per response: `conditionings` are prompts (token ids) that the response is scored under, `models` the names of
# the models that score it. The actor adds a column `logprobs_<name>` (list<double>, nats, one per conditioning and in
# their order, so that the row's `conditioning_ids` name these too; empty for a model that the row does not name). Of a
# model that scores by token there is also `token_logprobs_<name>` (list<list<float>>): the log-probs of the response's
# tokens, for each of these sums.
SCORING_COLUMNS = (
    ("conditionings", pa.list_(TOKEN_IDS)),
    ("response_token_ids", TOKEN_IDS),
    ("models", pa.list_(pa.string())),
)
# What the engine said of its own answer, nats: compared with the log-prob under the first conditioning by the last of
# the row's models, which are what the answer was sampled under, and by. Null where it was sampled otherwise.
SAMPLER_LOGPROB = ("sampler_logprob", pa.float64())
TOKEN_LOGPROBS = pa.list_(pa.list_(pa.float32()))
_NO_TOKENS = np.empty(0, np.float32)


@dataclass(frozen=True)
class ScorerSettings:
    """`models`: name -> model path, all loaded beside each other; `batch_size`: responses per forward pass. `by_token`:
    names of those whose log-probs of single tokens are kept too."""

    models: Mapping[str, str]
    dtype: str
    batch_size: int
    on_gpu: bool
    trust_remote_code: bool
    by_token: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """The log-probs of rows by one model, nats, by row and conditioning: sums over a response's tokens, and of each of
    its tokens [tokens] float32."""

    sums: list[list[float]]
    tokens: list[list[np.ndarray]]


class Scorer:
    """Scores blocks of rows (SCORING_COLUMNS); a Ray Data actor, or in one that outlives the stage. `gpus` are those
    that the actor reserves."""

    def __init__(self, settings: ScorerSettings, events: Events, gpus: float = 0.0):
        self._idle = IdleClock(gpus)
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()
        if settings.on_gpu:
            check_torch_gpu(settings.dtype)
        else:
            torch.set_num_threads(os.cpu_count() or 1)  # Ray set it from the actor's logical CPUs
        self._loaded: dict[str, tuple[Any, Layout]] = {}
        self.hold(settings, events)

    def hold(self, settings: ScorerSettings, events: Events) -> None:
        """Loads the models that are not here yet, in the place of those that are no longer asked for."""
        self._settings = settings
        self._events = events
        wanted = settings.models.values()
        self._loaded = {path: loaded for path, loaded in self._loaded.items() if path in wanted}
        for path in wanted:
            if path not in self._loaded:
                self._loaded[path] = self._load(path)
        self._models = {name: self._loaded[path][0] for name, path in settings.models.items()}
        self._layouts = {name: self._loaded[path][1] for name, path in settings.models.items()}
        events.tell({"event": "ready"})

    def _load(self, path: str) -> tuple[Any, Layout]:
        import torch
        from transformers import AutoModelForCausalLM

        from mipo_ray.models.source import local_model_directory

        settings = self._settings
        directory = local_model_directory(path, trust_remote_code=settings.trust_remote_code)
        # A model that needs several GPUs for its engine is spread over as many here, layer by layer.
        several = settings.on_gpu and torch.cuda.device_count() > 1
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, settings.dtype),
            device_map="auto" if several else None,
            use_safetensors=True,
            trust_remote_code=settings.trust_remote_code,
        ).eval()
        if settings.on_gpu and not several:
            model = model.to("cuda")
        return model, "padded" if several else layout_for(model)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Adds the `logprobs_<name>` columns; drops the token ids, which are large."""
        self._idle.work_begins()
        ids = innermost_lists(block, ["conditionings"], lists_as_arrays)
        responses = lists_as_arrays(block["response_token_ids"].combine_chunks())
        judges = block["models"].to_pylist()
        rows = [
            {**of_row, "response_token_ids": response, "models": models}
            for of_row, response, models in zip(ids, responses, judges, strict=True)
        ]
        told = 0
        for number, name in enumerate(self._models):
            scored = [row if name in row["models"] else {**row, "conditionings": []} for row in rows]
            passes = scoring_passes(scored, self._settings.batch_size)
            counts = [len(row["conditionings"]) for row in scored]
            scores = Scores([[0.0] * count for count in counts], [[_NO_TOKENS] * count for count in counts])
            for done, trees in enumerate(passes, start=1):
                self._score(name, trees, scores)
                # Rows are done together at the end; their number follows the passes, so that one sees it move.
                share = (number + done / len(passes)) / len(self._models)
                told += self._tell(int(share * len(rows)) - told)
            block = block.append_column(f"logprobs_{name}", pa.array(scores.sums, pa.list_(pa.float64())))
            if name in self._settings.by_token:
                block = block.append_column(f"token_logprobs_{name}", pa.array(scores.tokens, TOKEN_LOGPROBS))
        if SAMPLER_LOGPROB[0] in block.column_names:
            self._compare_with_sampler(block, rows)
        self._idle.work_ends()
        self._tell(len(rows) - told)
        return block.drop_columns([name for name, _ in SCORING_COLUMNS])

    def _tell(self, responses: int) -> int:
        if responses:
            self._events.emit({"event": "scored", "scored_responses": responses, **self._idle.take()})
        return responses

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

    def _score(self, name: str, trees: list[ScoredTree], scores: Scores) -> None:
        """One forward pass, whose log-probs are put into their places in `scores`."""
        import torch

        from mipo_ray.training.layout import lay_out
        from mipo_ray.training.logprobs import sum_by_response, token_logprobs

        model = self._models[name]
        batch = lay_out([scored.tree for scored in trees], self._layouts[name]).to(model.device)
        with torch.inference_mode():
            of_tokens = token_logprobs(model, batch)
            sums = sum_by_response(of_tokens, batch).tolist()
        lengths = [len(response) for scored in trees for response in scored.tree.responses]
        by_response = np.split(of_tokens.cpu().numpy(), np.cumsum(lengths)[:-1])
        places = [places for scored in trees for places in scored.places]
        for of_response, value, tokens in zip(places, sums, by_response, strict=True):
            for row, position in of_response:
                scores.sums[row][position] = value
                scores.tokens[row][position] = tokens


def layout_for(model: Any) -> Layout:
    """`shared`, for which it sets the model up, where the model can honour it; a few tokens find that out."""
    from mipo_ray.training.attention import use_attention
    from mipo_ray.training.logprobs import check_logprobs

    own = model.config._attn_implementation
    try:
        use_attention(model, "sdpa", "shared")
        check_logprobs(model, "shared", model.device)
    except UserError:
        model.set_attn_implementation(own)
        return "padded"
    return "shared"
