"""How far apart the log-probs of one response are by vLLM and by transformers, where both are the same model.

    python -m benchmarks.agreement [--answers 96] [--zoo "Llama" "Gemma3" ...]

The embedded model answers prompts, in float32 and in bfloat16, and members of the model zoo score random ids; both
through vLLM as a run configures it, and then through transformers in the trainer's layouts. "tf32" is float32 by vLLM
beside transformers with the factors of its linear layers rounded to TF32's 10 bits, as a GPU may do. No GPU is used and
none was measured. Writes benchmarks/results/agreement.json, where other models keep what was measured before; by it the
bounds in `mipo_ray/training/agreement.py` are chosen.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe_machine
from mipo_ray.models.embedded import prepare_embedded_model
from mipo_ray.training.agreement import Comparison, bound_for
from mipo_ray.training.attention import use_attention
from mipo_ray.training.layout import Tree, lay_out, sequence_trees
from mipo_ray.training.logprobs import response_logprobs
from tests.helpers.model_zoo import VOCABULARY, WINDOW, make_member

RESULT = Path("benchmarks/results/agreement.json")
MEMBERS = ("Llama", "Qwen3, YaRN", "Phi3", "Gemma2", "Gemma3", "GPT2", "Olmo2", "Mixtral", "Qwen3 of experts")
EMBEDDED = "embedded"
MICRO_BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description="Differences of log-probs between vLLM and transformers.")
    parser.add_argument("--answers", type=int, default=96, help="answers of the embedded model; 0: none")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of such an answer")
    parser.add_argument("--zoo", nargs="*", default=list(MEMBERS), help="members of the zoo")
    parser.add_argument("--engine", nargs=4, help=argparse.SUPPRESS)  # a process of its own for each engine
    options = parser.parse_args()
    if options.engine:
        directory, dtype, asked, said = options.engine
        Path(said).write_text(json.dumps(_by_engine(directory, dtype, json.loads(Path(asked).read_text()))))
        return
    measured = json.loads(RESULT.read_text())["results"] if RESULT.exists() else []
    with tempfile.TemporaryDirectory() as scratch:
        for name, directory, asked in _models(Path(scratch), options):
            results = []
            for dtype in ("float32", "bfloat16"):
                answers = _in_process(directory, dtype, asked)
                for trained in ("float32", "tf32") if dtype == "float32" else ("bfloat16",):
                    results += [{"model": name, **found} for found in _compared(directory, trained, answers)]
            print(*results, sep="\n", flush=True)
            measured = [one for one in measured if one["model"] != name] + results
            RESULT.write_text(json.dumps({"machine": describe_machine(), "results": measured}, indent=2) + "\n")


def _models(scratch: Path, options: argparse.Namespace) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, directory, what its engine is asked) of each model."""
    generator = np.random.default_rng(0)
    lengths = [(int(p), int(r)) for p, r in generator.integers((1, 1), (30, 33), (64, 2))]
    ids = [[generator.integers(3, VOCABULARY, n).tolist() for n in both] for both in lengths]
    for number, name in enumerate(options.zoo):
        directory = scratch / str(number)
        directory.mkdir()
        make_member(name, directory)
        yield name, str(directory), {"sequences": ids, "window": WINDOW}
    if options.answers:
        yield EMBEDDED, str(prepare_embedded_model()), {"prompts": _prompts(options.answers), "tokens": options.tokens}


def _prompts(count: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepare_embedded_model())
    lines = Path("mipo_ray/examples/instructions.jsonl").read_text().splitlines()
    asked = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]
    rendered = [tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"] for one in asked]
    return [rendered[index % len(rendered)] for index in range(count)]


def _in_process(directory: str, dtype: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """What `_by_engine` says, from a process that holds nothing but the engine."""
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch, "asked.json"), Path(scratch, "said.json")]
        files[0].write_text(json.dumps(asked))
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        command = [sys.executable, "-m", "benchmarks.agreement", "--engine", directory, dtype, *map(str, files)]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads(files[1].read_text())


def _by_engine(directory: str, dtype: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Prompt, response and vLLM's log-prob of each of its tokens: of answers of its own, or of given ids."""
    from mipo_ray.generation.vllm_arguments import set_environment

    set_environment(on_gpu=False)
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = LLM(
        model=directory,
        dtype=dtype,
        max_model_len=asked.get("window", 1024),
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_chunked_prefill=False,
        enable_prefix_caching="prompts" in asked,
        max_num_batched_tokens=2048,
        disable_log_stats=True,
        distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",
    )
    if "prompts" in asked:
        several = [
            SamplingParams(temperature=1.0, seed=seed, max_tokens=asked["tokens"], logprobs=0, detokenize=False)
            for seed in range(len(asked["prompts"]))
        ]
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in asked["prompts"]]
        found = []
        for ids, output in zip(asked["prompts"], engine.generate(prompts, several, use_tqdm=False), strict=True):
            answer = list(output.outputs[0].token_ids)
            steps = zip(answer, output.outputs[0].logprobs, strict=True)
            found.append(
                {"prompt": ids, "response": answer, "logprobs": [step[token].logprob for token, step in steps]}
            )
        return found
    one = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=[*prompt, *response]) for prompt, response in asked["sequences"]]
    found = []
    for (prompt, response), output in zip(
        asked["sequences"], engine.generate(prompts, one, use_tqdm=False), strict=True
    ):
        steps = zip(response, output.prompt_logprobs[len(prompt) :], strict=True)
        logprobs = [step[token].logprob for token, step in steps]
        found.append({"prompt": prompt, "response": response, "logprobs": logprobs})
    return found


def _compared(directory: str, dtype: str, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The differences over all answers, in each layout that the model can honour."""
    from transformers import AutoModelForCausalLM

    torch_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    trees = sequence_trees([(answer["prompt"], answer["response"]) for answer in answers])
    found = []
    for layout in ("padded", "packed"):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch_dtype).eval()
        if dtype == "tf32":
            _round_products(model)
        try:
            use_attention(model, "sdpa", layout)  # type: ignore[arg-type]
            batches = [trees[start : start + MICRO_BATCH] for start in range(0, len(trees), MICRO_BATCH)]
            with torch.no_grad():
                sums = torch.cat([response_logprobs(model, lay_out(batch, layout)) for batch in batches])  # type: ignore[arg-type]
        except Exception as error:
            print(f"{directory} {layout}: {error}", file=sys.stderr)
            continue
        compared = [
            Comparison("", len(answer["response"]), sum(answer["logprobs"]), scored)
            for answer, scored in zip(answers, sums.tolist(), strict=True)
        ]
        facts = {"dtype": dtype, "layout": layout, "answers": len(answers)}
        facts |= {"tokens": sum(one.tokens for one in compared)}
        facts |= _distribution("answer", np.array([abs(one.sampler - one.trainer) for one in compared]))
        facts |= _distribution(
            "mean_token", np.array([abs(one.sampler - one.trainer) / one.tokens for one in compared])
        )
        bound = bound_for(model, torch.device("cuda" if dtype == "tf32" else "cpu"))
        excess = sorted(bound.excess(one) for one in compared)
        facts |= {
            "share_of_bound_max": round(excess[-1], 4),
            "share_of_bound_median": round(excess[len(excess) // 2], 4),
        }
        if layout == "padded":
            facts |= _distribution("token", _of_tokens(model, trees, answers))
        found.append(facts)
    return found


def _round_products(model: Any) -> None:
    """Rounds both factors of every linear layer to TF32."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(_tf32(module.weight))
                module.register_forward_pre_hook(lambda _, inputs: (_tf32(inputs[0]), *inputs[1:]))


def _tf32(values: torch.Tensor) -> torch.Tensor:
    """float32 rounded to a mantissa of 10 bits."""
    return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _of_tokens(model: Any, trees: list[Tree], answers: list[dict[str, Any]]) -> np.ndarray:
    """|difference| of every token."""
    differences = []
    for tree, answer in zip(trees, answers, strict=True):
        ids = torch.from_numpy(np.concatenate([tree.prompt, tree.responses[0]]))[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(tree.prompt) - 1 : -1].float()
        own = logits.log_softmax(-1).gather(1, torch.from_numpy(tree.responses[0])[:, None])[:, 0]
        differences.append((own - torch.tensor(answer["logprobs"])).abs().numpy())
    return np.concatenate(differences)


def _distribution(name: str, values: np.ndarray) -> dict[str, float]:
    """Mean, median, 99th percentile and maximum, in nats."""
    quantiles = {
        "mean": values.mean(),
        "median": np.median(values),
        "p99": np.quantile(values, 0.99),
        "max": values.max(),
    }
    return {f"{name}_{key}": float(f"{value:.3g}") for key, value in quantiles.items()}


if __name__ == "__main__":
    main()
