"""The trained policy's log-probs of the probe sequences, by which an engine proves later that it holds this policy."""

from __future__ import annotations

from typing import Any

import torch

from mipo_ray.config.train import Layout
from mipo_ray.models.probes import probes
from mipo_ray.training.layout import Tree, lay_out


def policy_probe_logprobs(engine: Any, layout: Layout) -> list[float]:
    """The log-prob of each probe's response, in nats, by the policy in a DeepSpeed engine around `ResponseLogprobs`.

    Every worker must call this together, as ZeRO stage 3 gathers the parameters layer by layer.
    """
    model = engine.module.model
    trees = [Tree(probe.prompt, (probe.response,)) for probe in probes(model.config.get_text_config().vocab_size)]
    with torch.no_grad():
        return [float(value) for value in engine.module(lay_out(trees, layout).to(engine.device))]
