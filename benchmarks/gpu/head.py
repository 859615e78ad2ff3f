"""The output head alone: log-probs of response tokens, forward and backward, beside the bare matrix products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadSize:
    """Response tokens, vocabulary, and width of the hidden states."""

    tokens: int
    vocabulary: int
    hidden: int


def measure(size: HeadSize, dtype: str, device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of what was run, its seconds (median of `repeats`), and the bytes that its peak lies above its inputs."""
    from mipo_ray.training.logprobs import head_logprobs

    torch.manual_seed(0)
    place: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
    states = torch.randn(size.tokens, size.hidden, **place).requires_grad_()
    head = nn.Linear(size.hidden, size.vocabulary, bias=False, **place)
    targets = torch.randint(size.vocabulary, (size.tokens,), device=device)
    slopes = torch.randn(size.tokens, device=device)

    def products() -> None:
        """The three that cannot be left out: logits, and the gradients of states and weight."""
        with torch.no_grad():
            logits = states @ head.weight.T
            _ = logits @ head.weight
            _ = logits.T @ states

    def ours() -> Tensor:
        return head_logprobs(head, states, targets)

    def plain() -> Tensor:
        return -nn.functional.cross_entropy(head(states).float(), targets, reduction="none")

    def step(logprobs: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            states.grad = head.weight.grad = None
            (logprobs() * slopes).sum().backward()

        return run

    for name, run in {"bare products": products, "ours": step(ours), "plain torch": step(plain)}.items():
        yield {"what": name, **_timed(run, device, repeats)}


def _timed(run: Callable[[], None], device: str, repeats: int) -> dict[str, Any]:
    for _ in range(2):
        run()
    on_gpu = device == "cuda"
    held = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    grown = torch.cuda.max_memory_allocated() - held if on_gpu else None
    return {"median_seconds": statistics.median(seconds), "seconds": seconds, "grown_bytes": grown}
