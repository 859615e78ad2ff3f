"""Whether a model can be trained as configured, found out before anything is sampled and without its weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mipo_ray.config.train import Layout, TrainConfig
from mipo_ray.errors import UserError, cut
from mipo_ray.training.adapters import targeted_layers
from mipo_ray.training.attention import use_attention
from mipo_ray.training.layout import Tree, lay_out
from mipo_ray.training.logprobs import response_logprobs


def check_trainable(model_dir: str, train: TrainConfig, *, trust_remote_code: bool) -> None:
    """Finds out what of `train` the model in `model_dir` cannot honour, and which weights it lacks.

    Reads config.json and the headers of the weights. What shows only in numbers is for
    `deepspeed_engine.policy_engine` to find. Raises UserError as that does, for the layout, the attention and
    LoRA's target layers, and for a model that transformers cannot make, or only with weights out of nowhere.
    """
    model = _without_weights(model_dir, trust_remote_code)
    use_attention(model, train.attention, train.layout)
    if train.attention == "sdpa":
        _try_a_forward_pass(model, train.layout)
    if train.lora.rank:
        targeted_layers(model, train.lora.target_modules)


def _without_weights(model_dir: str, trust_remote_code: bool) -> Any:
    """The model on torch's meta device, where tensors have shapes and no data; raises UserError for missing weights."""
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_dir,
            use_safetensors=True,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # of a config.json with other values than it expects, transformers raises anything
        raise UserError(
            f"{model_dir}: transformers cannot make a language model of it: {cut(' '.join(str(error).split()), 1000)}"
        ) from error
    model, facts = loaded
    for kind, meaning in (("missing_keys", "are not in its weights"), ("mismatched_keys", "have other shapes in them")):
        if names := sorted(str(key[0] if isinstance(key, tuple) else key) for key in facts[kind]):
            raise UserError(
                f"{model_dir}: {', '.join(names[:3])}, which {type(model).__name__} needs, {meaning}: transformers "
                "would make random ones up, and vLLM others"
            )
    return model


def _try_a_forward_pass(model: Any, layout: Layout) -> None:
    """Raises UserError for a model that does not take what the trainer hands to it, whatever its weights are."""
    ids = np.zeros(3, dtype=np.int64)
    try:
        with torch.no_grad():
            response_logprobs(model, lay_out([Tree(ids, (ids, ids))], layout).to("meta"))
    except (TypeError, ValueError) as error:
        raise UserError(f"train.layout: {layout} does not fit {type(model).__name__}: {error}") from error
    except (NotImplementedError, RuntimeError):
        return  # routers look at numbers, which are not there
