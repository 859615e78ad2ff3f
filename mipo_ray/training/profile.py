"""Where the time of an optimizer step goes, in one plain process: phases, operators, FLOPs and peak memory.

    python -m mipo_ray.training.profile [--model embedded|DIR] [--prompt 256 --response 64 --pairs 4] [train.KEY=VALUE]

profiles one step on pairs of random token ids, on the GPU where there is one.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mipo_ray.config.schema import Config
from mipo_ray.config.train import Objective
from mipo_ray.errors import UserError
from mipo_ray.terminal import say, say_error
from mipo_ray.training.deepspeed_engine import join_process_group, policy_and_reference, quiet_libraries
from mipo_ray.training.layout import Pair, read_pair
from mipo_ray.training.step import optimizer_step

OPERATORS = 15  # lines of the table of operators


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a warm-up step, whose FLOPs are counted, and a profiled one, and prints what they took; returns the exit
    code."""
    from mipo_ray.config.recipe import load_config

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, or a model directory: policy and reference")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=64, help="tokens of a response")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of the step")
    parser.add_argument("overrides", nargs="*", help="dotted configuration overrides, for example train.layout=packed")
    options = parser.parse_args(arguments)
    try:
        say(_profile(options, load_config(None, options.overrides)))
    except UserError as error:
        say_error(f"error: {error}")
        return 2
    return 0


def _profile(options: argparse.Namespace, config: Config) -> str:
    from mipo_ray.models.source import check_policy_model, local_model_directory

    model = local_model_directory(options.model, config.model.trust_remote_code)
    check_policy_model(model, {})
    on_gpu = torch.cuda.is_available()
    return profile_step(
        model,
        config,
        random_pairs(options.pairs, options.prompt, options.response, config.train.objective),
        dtype=config.model.dtype if config.model.dtype != "auto" else ("bfloat16" if on_gpu else "float32"),
        device="cuda" if on_gpu else "cpu",
    )


def random_pairs(count: int, prompt: int, response: int, objective: Objective) -> list[Pair]:
    """Pairs of `prompt` and `response` tokens each, of ids that small vocabularies have; one rejected response each."""
    generator = np.random.default_rng(0)
    rows = [
        {
            "pair_id": f"{index:016x}",
            "prompt_token_ids": generator.integers(0, 100, prompt),
            "chosen_token_ids": generator.integers(0, 100, response),
            "rejected_token_ids": [generator.integers(0, 100, response)],
            "mismatched_prompt_token_ids": [generator.integers(0, 100, prompt)],
        }
        for index in range(count)
    ]
    return [read_pair(row, objective) for row in rows]


def profile_step(model_dir: str, config: Config, pairs: Sequence[Pair], *, dtype: str, device: str) -> str:
    """The text that says where the time of a step on `pairs` goes; joins or makes a torch process group."""
    train, trust = config.train, config.model.trust_remote_code
    quiet_libraries(device)
    join_process_group(device)
    engine, reference = policy_and_reference(
        model_dir,
        model_dir,
        train,
        dtype,
        device,
        trust_remote_code=trust,
        steps=lambda: [pairs],
        pair_count=len(pairs),
        cache=None,
    )
    flops = count_flops(lambda: optimizer_step(engine, reference, pairs, train, train.learning_rate, 0))
    phases = _Phases(device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=activities) as profiler:
        started = phases.clock()
        timed_reference = None if reference is None else phases.timed("reference", reference)
        metrics = optimizer_step(_TimedEngine(engine, phases), timed_reference, pairs, train, train.learning_rate, 1)
        seconds = phases.clock() - started
    place = "cuda" if device == "cuda" else "cpu"
    operators = profiler.key_averages().table(sort_by=f"self_{place}_time_total", row_limit=OPERATORS)
    return "\n".join(
        [
            operators,
            *(f"{name:<12} {taken:8.3f} s  {taken / seconds:6.1%}" for name, taken in phases.seconds.items()),
            f"{'other':<12} {seconds - sum(phases.seconds.values()):8.3f} s",
            f"{'step':<12} {seconds:8.3f} s  (with the profiler on)",
            f"FLOPs {flops / 1e12:.3f} T, {flops / seconds / 1e12:.3f} TFLOP/s",
            f"tokens {metrics['tokens']} of all sequences, {metrics['forward_tokens']} through the policy, "
            f"padding {metrics['padding_share']:.1%}",
            f"peak memory {peak_memory(device) / 2**30:.2f} GiB, loss {metrics['loss']:.4f}",
        ]
    )


def count_flops(step: Callable[[], Any]) -> int:
    """FLOPs of the matrix products and attention in `step`, run once; attention counts what its mask hides, too."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    # By the shapes of a kernel's arguments.
    def attention(query: Any, key: Any, value: Any, *others: Any, **options: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *others: Any, **options: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    def in_place_product(total: Any, left: Any, right: Any, **options: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    aten = torch.ops.aten
    # torch's own table lacks the attention kernels of a CPU, and products that are added up in place.
    others = {
        aten.addmm_: in_place_product,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=others) as counter:
        step()
    return counter.get_total_flops()


def peak_memory(device: str) -> int:
    """Bytes: the most that this process had, resident on the CPU, or allocated by torch on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Phases:
    """Seconds by the name of a phase, summed over calls."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def clock(self) -> float:
        if self.device == "cuda":  # kernels run on after the call that started them
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*values: Any, **options: Any) -> Any:
            started = self.clock()
            try:
                return function(*values, **options)
            finally:
                self.seconds[name] += self.clock() - started

        return run


class _TimedEngine:
    """A DeepSpeed engine whose forward, backward and step are timed."""

    def __init__(self, engine: Any, phases: _Phases) -> None:
        self._engine = engine
        self._forward = phases.timed("policy", engine)
        self.backward = phases.timed("backward", engine.backward)
        self.step = phases.timed("optimizer", engine.step)

    def __call__(self, batch: Any) -> Any:
        return self._forward(batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


if __name__ == "__main__":
    sys.exit(main())
