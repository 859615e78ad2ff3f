"""Whether an engine should take a round's LoRA adapter as it is, or the policy that it is merged into.

    python -m benchmarks.lora_swap                                        the embedded model
    python -m benchmarks.lora_swap --model tiny --rank 4 --output OUTPUT  a tiny model of random weights

Two rounds' adapters are made, merged as a run merges them, and added up to the one adapter of the initial model that
they are together. Bare vLLM, in a process for each engine, takes the policy both ways: through `swap_weights`, as
living engines do, and as an adapter under a new name. Compared are greedy tokens, log-probs of given sequences, the
seconds of the swap, and speed, the two ways in turns. Writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import describe_machine

WAYS = ("merged", "adapter")
ROUNDS = 2
SCALING = 2.0  # alpha / rank
MOVED = 0.05  # standard deviation of B, so that the policy says other things than the initial model
PROMPT_TOKENS = 48
SCORED_TOKENS = 32
WINDOW = 256
FIGURES = {
    "swap_seconds": "seconds until the engine has the policy",
    "tokens_per_second": "tokens sampled per second",
    "tokens_per_cpu_second": "tokens sampled per second of CPU time",
    "prompt_tokens_per_second": "tokens of given sequences scored per second",
}
AGREEMENT = {
    "greedy_equal": "share of requests with equal greedy tokens",
    "greedy_unmoved": "share of requests whose greedy tokens are also the initial model's",
    "largest_logprob_difference": "largest difference of a sequence's log-prob, nats",
    "smallest_logprob_move": "smallest distance of a sequence's log-prob from the initial model's, nats",
    "base_equal": "share of requests without the adapter, in batches of their own, that the initial model answers",
    "base_equal_in_mixed_batch": "the same in a batch with requests to the adapter",
    "adapter_equal_in_mixed_batch": "share of the others there with the policy's greedy tokens",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="A LoRA policy in a living engine: merged weights, or the adapter.")
    parser.add_argument("--model", default="embedded", help="tiny, embedded, or a model directory")
    parser.add_argument("--rank", type=int, default=16, help="of each adapter; vLLM must allow twice as much")
    parser.add_argument("--requests", type=int, default=16, help="under way at once")
    parser.add_argument("--tokens", type=int, default=32, help="of each response")
    parser.add_argument("--repeats", type=int, default=2, help="engines of each way, in turns")
    parser.add_argument("--output", default="benchmarks/results/lora_swap", help="without suffix")
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)  # a process of its own for each engine
    options = parser.parse_args()
    if options.way:
        way, directory = options.way
        found = measure(way, Path(directory), options.requests, options.tokens)
        Path(directory, f"{way}.json").write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as scratch:
        make_policies(_initial(options.model, Path(scratch)), options.rank, Path(scratch))
        measured: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for repeat in range(options.repeats):
            for way in WAYS if repeat % 2 == 0 else reversed(WAYS):
                measured[way].append(_in_process(way, scratch, options))
                print(repeat, way, {name: measured[way][-1][name] for name in FIGURES}, flush=True)
    report = {
        "machine": describe_machine(),
        "model": options.model,
        "rank": options.rank,
        "requests": options.requests,
        "tokens": options.tokens,
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "agreement": compare(measured["merged"][0], measured["adapter"][0]),
        "measured": {way: [{name: one[name] for name in FIGURES} for one in runs] for way, runs in measured.items()},
    }
    output = Path(options.output)
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    output.with_suffix(".md").write_text(as_table(report))
    print(as_table(report))


def _initial(model: str, scratch: Path) -> Path:
    from mipo_ray.models.embedded import prepare_embedded_model
    from tests.helpers.tiny_model import make_tiny_model

    if model == "tiny":
        return make_tiny_model(scratch / "tiny")
    return prepare_embedded_model() if model == "embedded" else Path(model).absolute()


def make_policies(source: Path, rank: int, scratch: Path) -> None:
    """Into `scratch`: initial, which is `source`; merged, a policy after ROUNDS of adapters; and adapter, all of them
    as one of the initial model."""
    import torch
    from transformers import AutoModelForCausalLM

    from mipo_ray.config.train import LoraConfig
    from mipo_ray.training.adapters import merged_weight, plain_weights, with_adapters

    (scratch / "initial").symlink_to(source, target_is_directory=True)
    factors: dict[str, list[tuple[Any, Any]]] = {}
    policy = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for number in range(ROUNDS):
        torch.manual_seed(number)
        merged = {}
        for weight in plain_weights(with_adapters(policy, LoraConfig(rank=rank, alpha=SCALING * rank))):
            merged[weight.name] = weight.tensor.detach()
            if weight.adapter is not None:
                torch.nn.init.normal_(weight.adapter.b, std=MOVED)
                merged[weight.name] = merged_weight(weight.tensor, weight.adapter)
                scaled = weight.adapter.scaling * weight.adapter.b.detach()
                factors.setdefault(weight.name, []).append((weight.adapter.a.detach(), scaled))
        policy = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        policy.load_state_dict(merged)
    policy.save_pretrained(scratch / "merged")
    _write_adapter(factors, rank * ROUNDS, scratch / "adapter")


def _write_adapter(factors: dict[str, list[tuple[Any, Any]]], rank: int, directory: Path) -> None:
    """The sum of adapters is one adapter: every A [rank, in] upon the other, every scaled B [out, rank] beside it."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, parts in factors.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{layer}.lora_A.weight"] = torch.cat([a for a, _ in parts])
        tensors[f"{layer}.lora_B.weight"] = torch.cat([b for _, b in parts], dim=1).contiguous()
    targets = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in factors})
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(facts))


def _in_process(way: str, scratch: str, options: argparse.Namespace) -> dict[str, Any]:
    """What `measure` says, from a process that holds nothing but the engine."""
    arguments = ["--rank", options.rank, "--requests", options.requests, "--tokens", options.tokens]
    command = [sys.executable, "-m", "benchmarks.lora_swap", "--way", way, scratch, *map(str, arguments)]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return dict(json.loads(Path(scratch, f"{way}.json").read_text()))


def measure(way: str, scratch: Path, requests: int, tokens: int) -> dict[str, Any]:
    """One engine of the initial model, which takes the policy and is asked."""
    from mipo_ray.generation.vllm_arguments import set_environment
    from mipo_ray.generation.weight_swap import EXTENSION

    threads = os.environ.get("OMP_NUM_THREADS")
    set_environment(on_gpu=False)
    if threads:
        os.environ["OMP_NUM_THREADS"] = threads
    import numpy as np
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    adapter = json.loads((scratch / "adapter/adapter_config.json").read_text())
    lora = {}
    if way == "adapter":
        # Its layers alone: with the output head among them vLLM 0.29 dies of the first prompt that is to be scored.
        targets = adapter["target_modules"]
        lora = {"enable_lora": True, "max_lora_rank": adapter["r"], "max_loras": 1, "lora_target_modules": targets}
    engine = LLM(
        model=str(scratch / "initial"),
        dtype="float32",
        max_model_len=WINDOW,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_chunked_prefill=False,
        enable_prefix_caching=True,
        max_num_batched_tokens=2048,
        disable_log_stats=True,
        distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",
        worker_extension_cls=EXTENSION,
        **lora,
    )
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    ids = np.random.default_rng(0).integers(3, vocabulary, (requests, PROMPT_TOKENS + SCORED_TOKENS)).tolist()
    asked = [TokensPrompt(prompt_token_ids=row[:PROMPT_TOKENS]) for row in ids]
    scored = [TokensPrompt(prompt_token_ids=row) for row in ids]
    greedy = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    sampled = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False)
        for seed in range(requests)
    ]
    score = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)

    def ask(prompts: list[Any], parameters: Any, policy: Any) -> list[Any]:
        engine.reset_prefix_cache()
        return engine.generate(prompts, parameters, use_tqdm=False, lora_request=policy)

    def greedy_tokens(policy: Any) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in ask(asked, greedy, policy)]

    def logprobs(policy: Any) -> list[float]:
        found = []
        for row, output in zip(ids, ask(scored, score, policy), strict=True):
            steps = list(zip(row, output.prompt_logprobs, strict=True))[PROMPT_TOKENS:]
            found.append(sum(step[token].logprob for token, step in steps))
        return found

    policy = LoRARequest("round_001", 2, str(scratch / "adapter")) if way == "adapter" else None

    def swap() -> None:
        if policy is not None:
            engine.llm_engine.add_lora(policy)
        else:
            engine.collective_rpc("swap_weights", args=(str(scratch / "merged"),))
        engine.reset_prefix_cache()

    found: dict[str, Any] = {"initial_tokens": greedy_tokens(None)}
    if policy is None:
        found["initial_logprobs"] = logprobs(None)
    found["swap_seconds"], _, _ = _timed(swap)
    found["tokens"] = greedy_tokens(policy)
    seconds, cpu_seconds, _ = _timed(lambda: ask(asked, sampled, policy))
    score_seconds, _, found["logprobs"] = _timed(lambda: logprobs(policy))
    found["tokens_per_second"] = requests * tokens / seconds
    found["tokens_per_cpu_second"] = requests * tokens / cpu_seconds
    found["prompt_tokens_per_second"] = sum(map(len, ids)) / score_seconds
    if policy is not None:
        found["beside_adapter"] = greedy_tokens(None)
        found["mixed"] = greedy_tokens([policy if index % 2 else None for index in range(requests)])
    return found


def _timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, seconds of CPU time, and what came out."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def compare(merged: dict[str, Any], adapter: dict[str, Any]) -> dict[str, float]:
    """AGREEMENT of what `measure` found in an engine of each way."""
    of_both = list(zip(merged["logprobs"], adapter["logprobs"], strict=True))
    moves = zip(merged["logprobs"], merged["initial_logprobs"], strict=True)
    return {
        "greedy_equal": _share(merged["tokens"], adapter["tokens"]),
        "greedy_unmoved": _share(merged["tokens"], merged["initial_tokens"]),
        "largest_logprob_difference": max(abs(one - other) for one, other in of_both),
        "smallest_logprob_move": min(abs(one - other) for one, other in moves),
        "base_equal": _share(merged["initial_tokens"], adapter["beside_adapter"]),
        "base_equal_in_mixed_batch": _share(merged["initial_tokens"][0::2], adapter["mixed"][0::2]),
        "adapter_equal_in_mixed_batch": _share(merged["tokens"][1::2], adapter["mixed"][1::2]),
    }


def _share(one: Sequence[Any], other: Sequence[Any]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def as_table(report: dict[str, Any]) -> str:
    """Medians of both ways, and AGREEMENT."""
    lines = [
        f"{report['model']}, {ROUNDS} adapters of rank {report['rank']} on every linear layer, float32; "
        f"{report['requests']} requests at once, {PROMPT_TOKENS} + {report['tokens']} tokens; "
        f"{report['threads']} threads; medians of {len(report['measured']['merged'])}.",
        "",
        report["machine"],
        "",
        "| | merged weights | adapter | ratio |",
        "|---|---|---|---|",
    ]
    for name, title in FIGURES.items():
        merged, adapter = (median(one[name] for one in report["measured"][way]) for way in WAYS)
        lines.append(f"| {title} | {merged:.3g} | {adapter:.3g} | {adapter / merged:.2f} |")
    lines += ["", "| the two beside each other | |", "|---|---|"]
    lines += [f"| {title} | {report['agreement'][name]:.3g} |" for name, title in AGREEMENT.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
