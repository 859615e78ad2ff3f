"""Tiny random models of many families, as directories, and their log-probs by vLLM: the zoo.

python -m tests.helpers.model_zoo OUTPUT.jsonl DIRECTORY...     log-probs of the zoo's sequences by vLLM, a line each
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 128
WINDOW = 64
"""Tokens; no sequence of the zoo is longer."""


@dataclass(frozen=True)
class Member:
    """A family, or a setting of one that decides about positions, attention or the output head.

    refused: what the check before sampling says where the two libraries are known to differ; None: they agree.
    """

    family: str
    options: Mapping[str, Any] = field(default_factory=dict)
    refused: str | None = None


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


def _long_rope(original: int) -> dict[str, Any]:
    """Phi 3 says the original window beside its rotary settings; the factors are of half a head, 16 numbers each."""
    factors = {"short_factor": [1.0 + n / 8 for n in range(16)], "long_factor": [4.0 + n for n in range(16)]}
    sizes = {"max_position_embeddings": 256, "original_max_position_embeddings": original}
    return _rope("longrope", **factors) | sizes


_FULL_ABOVE = ["sliding_attention", "full_attention"]
_EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}

ZOO: dict[str, Member] = {
    "Llama": Member("Llama"),
    "Llama, tied": Member("Llama", {"tie_word_embeddings": True}),
    "Llama, biases": Member("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama, base of 500,000": Member("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "Llama 3.1": Member(
        "Llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "Llama, linear": Member("Llama", _rope("linear", factor=4.0)),
    "Llama, YaRN": Member("Llama", _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "Llama, YaRN with a scale": Member(
        "Llama",
        _rope("yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=2.0),
        refused="attention_factor",
    ),
    "Llama, dynamic": Member("Llama", _rope("dynamic", factor=4.0)),
    "Llama, dynamic beyond": Member(
        "Llama", _rope("dynamic", factor=4.0) | {"max_position_embeddings": 32}, refused="rope_type dynamic"
    ),
    "Qwen2": Member("Qwen2"),
    "Qwen2, sliding above": Member(
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        refused="field max_window_layers",
    ),
    "Qwen3": Member("Qwen3"),
    "Qwen3, YaRN": Member("Qwen3", _rope("yarn", factor=2.0, original_max_position_embeddings=64)),
    "Mistral": Member("Mistral", {"sliding_window": None}),
    "Mistral, sliding": Member("Mistral", {"sliding_window": 16}),
    "Ministral": Member("Ministral", {"sliding_window": 16}),
    "Phi3": Member("Phi3"),
    "Phi3, half rotary": Member("Phi3", {"partial_rotary_factor": 0.5}),
    "Phi3, LongRoPE": Member("Phi3", _long_rope(original=64)),
    "Phi3, LongRoPE beyond": Member("Phi3", _long_rope(original=32), refused="rope_type longrope"),
    # vLLM knows of this family one width of its inner layers only: four times the hidden size.
    "Phi": Member("Phi", {"partial_rotary_factor": 0.5, "intermediate_size": 512, "num_key_value_heads": 4}),
    "Phi, shared keys": Member("Phi", {"intermediate_size": 512}, refused="field num_key_value_heads"),
    "StableLm": Member("StableLm", {"partial_rotary_factor": 0.25}),
    "Persimmon": Member("Persimmon", {"num_key_value_heads": 4}),
    "Granite": Member(
        "Granite",
        {"logits_scaling": 7.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.1},
    ),
    "Cohere": Member("Cohere", {"logit_scale": 0.3}),
    "Cohere2": Member("Cohere2", {"logit_scale": 0.3, "sliding_window": WINDOW, "layer_types": _FULL_ABOVE}),
    "Cohere2 beyond": Member("Cohere2", {"logit_scale": 0.3, "sliding_window": 16}, refused="field sliding_window"),
    "Gemma": Member("Gemma"),
    "Gemma2": Member("Gemma2", {"sliding_window": 16, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 32}),
    "Gemma3": Member("Gemma3Text", {"sliding_window": 16, "query_pre_attn_scalar": 32, "num_hidden_layers": 6}),
    "GPT2": Member("GPT2", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 128}),
    "GPTNeoX": Member("GPTNeoX"),
    "GPTJ": Member("GPTJ", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 16}),
    "OPT": Member("OPT", {"ffn_dim": 128, "word_embed_proj_dim": 128}),
    "Bloom": Member("Bloom", {"n_layer": 2, "n_head": 4}),
    "Falcon": Member("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": "own"}),
    "Starcoder2": Member("Starcoder2", {"sliding_window": None}),
    "Olmo": Member("Olmo", {"clip_qkv": 0.5}),
    "Olmo2": Member("Olmo2"),
    "Olmo3": Member("Olmo3", {"sliding_window": 16}),
    "Nemotron": Member("Nemotron"),
    "Glm": Member("Glm", {"partial_rotary_factor": 0.5}),
    "Glm4": Member("Glm4", {"partial_rotary_factor": 0.5}),
    "SmolLM3": Member("SmolLM3", {"no_rope_layers": [1, 0]}),
    "Exaone4": Member("Exaone4", {"sliding_window": 16, "sliding_window_pattern": 2}),
    "SeedOss": Member("SeedOss"),
    "Ernie 4.5": Member("Ernie4_5"),
    "Arcee": Member("Arcee"),
    "HunYuan": Member("HunYuanDenseV1", _rope("dynamic", alpha=1000.0, factor=1.0)),
    "Mixtral": Member("Mixtral", {"sliding_window": None, "num_local_experts": 4}),
    "Qwen2 of experts": Member("Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 64}),
    "Qwen3 of experts": Member("Qwen3Moe", _EXPERTS),
    "Olmo of experts": Member("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "Granite of experts": Member("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}

QUICK = ("Qwen3, YaRN", "Gemma3", "Mixtral")
"""The members whose engines `make test` starts."""


def sequences() -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of random ids: short, of one token, and longer than every sliding window of the zoo."""
    generator = np.random.default_rng(0)
    return [
        (generator.integers(3, VOCABULARY, prompt).tolist(), generator.integers(3, VOCABULARY, response).tolist())
        for prompt, response in ((5, 9), (1, 1), (20, 12), (38, 24))
    ]


def make_member(name: str, directory: Path) -> Any:
    """Writes a member as a model directory in float32; returns the model."""
    import torch
    import transformers

    member = ZOO[name]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    values = {key: value for key, value in (sizes | dict(member.options)).items() if value != "own"}
    config = getattr(transformers, f"{member.family}Config")(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:  # far from uniform attention: a wrong mask or position must show
                    parameter.normal_(0.0, 0.15)
                else:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return model


def engine_logprobs(directories: Sequence[Path], output: Path) -> dict[Path, list[float] | str]:
    """By directory the log-probs that vLLM gives `sequences()`, or its error. One process makes the engines one after
    another; where one of them takes the process down, another goes on."""
    found: dict[Path, list[float] | str] = {}
    while waiting := [directory for directory in directories if directory not in found]:
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }
        command = [sys.executable, "-m", "tests.helpers.model_zoo", str(output), *map(str, waiting)]
        process = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        before = len(found)
        for line in output.read_text().splitlines() if output.exists() else []:
            directory, result = json.loads(line)
            found[Path(directory)] = result
        if process.returncode and (left := [one for one in waiting if one not in found]):
            found[left[0]] = f"the process ended with {process.returncode}: {process.stderr[-2000:]}"
        assert len(found) > before, process.stderr[-2000:]
    return found


def _score(directory: str) -> list[float]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = LLM(
        model=directory,
        dtype="float32",
        max_model_len=WINDOW,
        max_num_seqs=8,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        max_num_batched_tokens=2048,
        disable_log_stats=True,
        distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",
    )
    asked = sequences()
    prompts = [TokensPrompt(prompt_token_ids=[*prompt, *response]) for prompt, response in asked]
    parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = engine.generate(prompts, parameters, use_tqdm=False)
    sums = []
    for (prompt, response), output in zip(asked, outputs, strict=True):
        entries = output.prompt_logprobs[len(prompt) :]
        sums.append(sum(entry[token].logprob for token, entry in zip(response, entries, strict=True)))
    engine.llm_engine.engine_core.shutdown()
    return sums


def _lines(directories: Sequence[str]) -> Iterator[str]:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    for directory in directories:
        try:
            result: Any = _score(directory)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        cleanup_dist_env_and_memory()
        yield json.dumps([directory, result])


if __name__ == "__main__":
    with open(sys.argv[1], "a", encoding="utf-8") as file:
        for line in _lines(sys.argv[2:]):
            print(line, file=file, flush=True)
