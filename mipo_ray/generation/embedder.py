"""Embeddings of prompts, for the strategy that looks for similar ones: a vLLM actor, and the Ray Data step over it.

    prompts -> messages -> token ids -> vLLM pool (pooling) -> prompts with `embedding`

The policy itself embeds a prompt as the mean of its last hidden states over the prompt's tokens, or a given embedding
model does with the pooling it was trained with.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.generation.rendering import load_tokenizer, plain_token_ids, render_prompts
from mipo_ray.generation.vllm_arguments import EngineSettings, engine_arguments, engine_settings, set_environment
from mipo_ray.models.source import embedding_model, local_model_directory
from mipo_ray.paths import plain_path
from mipo_ray.ray_cluster.blocks import engine_pool, map_actors
from mipo_ray.ray_cluster.gpus import check_engine_gpus
from mipo_ray.ray_cluster.resources import Resources, engine_request

EMBEDDING = pa.list_(pa.float32())


class Embedder:
    """A Ray Data actor: adds `embedding` (list<float32> [dimensions], Euclidean length 1) to blocks of prompt rows.

    What is embedded is the conversation `messages`. The policy gets the tokens of its chat template, up to the point
    where its answer begins; the last hidden states, behind the final norm, are averaged over all of them in float32. An
    embedding model gets the contents of all messages but the system's, joined by newlines, because it was trained on
    plain text even where its tokenizer inherited a chat template; the pooling is its own.

    Of a prompt longer than the policy's window the first tokens are embedded: such a row is refused or dropped later,
    when its length is checked together with the answer's. One longer than an embedding model's is a UserError.
    """

    def __init__(self, settings: EngineSettings, is_policy: bool):
        set_environment(settings.on_gpu)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        if settings.on_gpu:
            check_engine_gpus(settings.dtype, settings.tensor_parallel_size)
        model = (
            local_model_directory(settings.model_path, trust_remote_code=settings.trust_remote_code)
            if is_policy
            else embedding_model(settings.model_path, settings.trust_remote_code)
        )
        self._settings = settings
        self._is_policy = is_policy
        self._tokenizer = (
            load_tokenizer(settings.model_path, settings.trust_remote_code)
            if is_policy
            else _plain_tokenizer(model, settings.trust_remote_code)
        )
        self._request_count = 0
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**_pooling_arguments(model, settings, is_policy)))
        self._window = int(self._engine.model_config.max_model_len)

    async def __call__(self, block: pa.Table) -> AsyncIterator[pa.Table]:
        """Embeds every row of the block; yields the block once, with its `embedding`.

        Raises UserError for a prompt that does not fit an embedding model.
        """
        prompts = self._tokenise(block)
        embeddings = await asyncio.gather(*(self._embed(token_ids) for token_ids in prompts))
        yield block.append_column("embedding", pa.array(embeddings, type=EMBEDDING))

    def _tokenise(self, block: pa.Table) -> list[list[int]]:
        conversations = block["messages"].to_pylist()
        if self._is_policy:
            rendered = render_prompts(self._tokenizer, conversations, self._settings.chat)
            return [token_ids[: self._window] for token_ids in rendered]
        prompts = plain_prompts(self._tokenizer, conversations)
        for prompt_id, token_ids in zip(block["prompt_id"].to_pylist(), prompts, strict=True):
            check_window(prompt_id, token_ids, self._window, self._settings.model_path)
        return prompts

    async def _embed(self, token_ids: list[int]) -> np.ndarray:
        from vllm import PoolingParams
        from vllm.inputs import TokensPrompt

        self._request_count += 1
        # use_activation: unit length, also of a model whose configuration does not ask for it.
        parameters = PoolingParams(task="embed", use_activation=True)
        prompt = TokensPrompt(prompt_token_ids=token_ids)
        async for output in self._engine.encode(prompt, parameters, str(self._request_count)):
            final = output.outputs.data
        return final.float().numpy()

    def __del__(self) -> None:
        # Without it the engine's process outlives the pool and reports that its client died.
        if (engine := getattr(self, "_engine", None)) is not None:
            engine.shutdown()


def embed_rows(rows: ray.data.Dataset, config: Config, *, policy: str, resources: Resources) -> ray.data.Dataset:
    """Adds `embedding` to prompt rows through a pool of embedding actors; blocks and their order stay as they are.

    The model is `conditioning.similar.model`, or without one `policy`, in the sampler's places: generation.pool says
    how many actors there are and what they reserve. An embedding model is not sharded: it takes one GPU where the
    policy takes tensor_parallel_size. Lazy; the engines are gone when the dataset's execution ends.
    """
    pool = config.generation.pool
    own = config.conditioning.similar.model
    shards = pool.tensor_parallel_size if own is None else 1
    settings = engine_settings(config, policy if own is None else own, resources)
    if own is not None:
        settings = replace(settings, tensor_parallel_size=1)
    rows.context.execution_options.preserve_order = True
    gpus = resources.gpus_per_engine * shards / pool.tensor_parallel_size
    request = replace(engine_request(config, resources), gpus=gpus)
    return map_actors(
        rows,
        Embedder,
        (settings, own is None),
        request=request,
        pool=engine_pool(pool, request),
        wait_minutes=config.ray.wait_timeout_minutes,
    )


def plain_prompts(tokenizer: Any, conversations: Sequence[list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of each conversation as an embedding model reads it: all contents but the system's, by lines."""
    texts = ["\n".join(one["content"] for one in messages if one["role"] != "system") for messages in conversations]
    return [plain_token_ids(tokenizer, text) for text in texts]


def check_window(prompt_id: str, token_ids: Sequence[int], window: int, model: str) -> None:
    """Raises UserError when a prompt is longer than an embedding model's window (in tokens)."""
    if len(token_ids) > window:
        raise UserError(
            f"prompt {prompt_id!r}: {len(token_ids)} tokens do not fit the embedding model {model!r}: expected at most "
            f"{window} (the smaller of its own window and model.max_model_len). Shorten it, or set "
            "conditioning.similar.model to a model with a larger window, or to null for the policy itself."
        )


def _pooling_arguments(model: str, settings: EngineSettings, is_policy: bool) -> dict[str, Any]:
    from vllm.config import PoolerConfig

    arguments = engine_arguments(model, settings) | settings.engine_args
    # A mean needs all of a prompt's hidden states in one step: no chunks, and no prefix that is read from a cache.
    arguments |= {
        "runner": "pooling",
        "load_format": "safetensors",
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
    }
    if is_policy:
        arguments |= {"convert": "embed", "pooler_config": PoolerConfig(seq_pooling_type="MEAN")}
    else:
        arguments["max_model_len"] = min(settings.max_model_len, _own_window(model, settings))
    if "max_num_batched_tokens" in arguments:
        arguments["max_num_batched_tokens"] = max(arguments["max_num_batched_tokens"], arguments["max_model_len"])
    return arguments


def _own_window(model: str, settings: EngineSettings) -> int:
    """The longest prompt that an embedding model was made for, as vLLM reads it from its files, in tokens."""
    from vllm.engine.arg_utils import EngineArgs

    arguments: dict[str, Any] = {
        "model": plain_path(model),
        "dtype": settings.dtype,
        "trust_remote_code": settings.trust_remote_code,
    }
    return int(EngineArgs(**arguments, runner="pooling").create_model_config().max_model_len)


def _plain_tokenizer(model: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
