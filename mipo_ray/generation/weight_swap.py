"""New weights in a living engine: the part that runs inside vLLM's worker, where the weights are.

On a GPU it is vLLM's own reload, which puts them where the old ones were. On a CPU that reload is wrong without a word
(vLLM 0.29: linear layers keep weights that oneDNN packed, and go on with those, so that only embeddings and norms
change): there the model is made anew in place of the old one, from the new files. It takes a fraction of a second for
135M parameters, where a new process takes 10. Whoever calls this proves the outcome (`LivingEngine`).
"""

from __future__ import annotations

from typing import Any

EXTENSION = "mipo_ray.generation.weight_swap.WeightSwap"


class WeightSwap:
    """What vLLM adds to its worker (`worker_extension_cls`): a method for `collective_rpc`."""

    # Of the worker.
    model_runner: Any
    vllm_config: Any

    def swap_weights(self, directory: str) -> None:
        """Loads the weights of a model directory of the same architecture; caches and adapters are the caller's."""
        if self.model_runner.device.type == "cpu":
            self._make_model_anew(directory)
        else:
            self.reload_weights(weights_path=directory)  # type: ignore[attr-defined]  # the worker's

    def _make_model_anew(self, directory: str) -> None:
        from vllm.config import set_current_vllm_config

        runner = self.model_runner
        runner.model_config.model, runner.model_config.revision = directory, None
        # Attention layers by name; a layer that is made refuses a name that is taken.
        layers: dict[str, Any] = self.vllm_config.compilation_config.static_forward_context
        before = dict(layers)
        layers.clear()
        runner.model = None  # the old weights go before the new ones come
        with set_current_vllm_config(self.vllm_config):
            runner.load_model()
        for name, layer in layers.items():
            # What the engine gave its layers after they were made: the instruction set of its kernels, its cache.
            given = {key: value for key, value in vars(before[name]).items() if key not in vars(layer)}
            vars(layer).update(given)
            layer.kv_cache = before[name].kv_cache
