"""A run with one trained round whose policy is another tiny model: made without an engine and without training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mipo_ray.config.recipe import load_config
from mipo_ray.models.probes import probes
from mipo_ray.storage.configuration import record_config
from mipo_ray.storage.run_directory import RunDirectory, open_run
from tests.helpers.stages import SUMMARY, commit
from tests.helpers.tiny_model import make_tiny_model


def make_two_policies(initial: Path, directory: Path) -> RunDirectory:
    """A run whose base is the model at `initial`, and whose round 0 ended with other weights, with their probes."""
    options = [f"run_dir={directory}", "rounds=1", f"model.path={initial}", "model.max_model_len=256"]
    config = load_config(None, options)
    run = open_run(str(directory))
    record_config(run, config)
    policy = make_tiny_model(directory / "rounds/000/train/policy", seed=1)
    commit(run, "rounds/000/train", config, summary=replace(SUMMARY, probe_logprobs=list(plain_probe_logprobs(policy))))
    return run


def plain_probe_logprobs(model: Path) -> Iterator[float]:
    """What the probe sequences get by plain transformers, nats: log softmax of the logits, at the response's tokens."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for probe in probes(loaded.config.vocab_size):
        yield plain_logprob(loaded, [int(one) for one in probe.prompt], [int(one) for one in probe.response])


def plain_logprob(model: torch.nn.Module, prompt: list[int], response: list[int]) -> float:
    """log p(response | prompt) by plain transformers, nats."""
    ids = torch.tensor([*prompt, *response])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids[None]).logits[0], dim=-1)
    return float(sum(logprobs[place - 1, ids[place]] for place in range(len(prompt), len(ids))))
