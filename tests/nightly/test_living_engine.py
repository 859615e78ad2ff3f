"""Engines that outlive a stage: they take each policy's weights, prove it, are replaced, and go with the run.

python -m pytest tests/nightly/test_living_engine.py
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import ray.data
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mipo_ray.config.generation import SamplingConfig
from mipo_ray.config.recipe import load_config
from mipo_ray.config.train import LoraConfig
from mipo_ray.generation.engine import DEFAULT_SAMPLING, REQUESTS, Engine, Sampling
from mipo_ray.generation.living_engine import LivingEngine
from mipo_ray.generation.sampler import policy_engines
from mipo_ray.generation.vllm_arguments import EngineSettings
from mipo_ray.models.probes import probes
from mipo_ray.monitoring.events import Events, recording
from mipo_ray.ray_cluster.resources import Resources
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import open_run
from mipo_ray.training.adapters import plain_weights, with_adapters
from mipo_ray.training.export import export_policy
from tests.helpers.runs import events
from tests.helpers.tiny_model import make_tiny_model

pytestmark = pytest.mark.usefixtures("ray_cluster")

WINDOW = 128
GREEDY = Sampling({DEFAULT_SAMPLING: SamplingConfig(temperature=0.0, max_tokens=24)})


@pytest.fixture(scope="module")
def policies(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[EngineSettings]:
    """Two policies of one architecture, with the log-probs of the probes as plain transformers gives them."""
    other = make_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=1)
    return [settings_of(tiny_model), settings_of(other)]


def settings_of(model: Path, trained: Any = None) -> EngineSettings:
    """Of the policy in a directory, to be proven by that model itself, or by what it was exported from."""
    loaded = trained or AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = load_config(None, [f"model.path={model}", f"model.max_model_len={WINDOW}"])
    resources = Resources(on_gpu=False, dtype="float32", gpus_per_engine=0.0, gpus_per_worker=0.0)
    engines = policy_engines(config, str(model), resources)
    return replace(engines.settings, probe_logprobs=tuple(plain_probe_logprobs(loaded.eval())))


def plain_probe_logprobs(model: Any) -> Iterator[float]:
    """By plain transformers: log softmax of the logits, at the tokens of the response."""
    for probe in probes(model.config.vocab_size):
        ids = torch.tensor([*probe.prompt, *probe.response])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids[None]).logits[0], dim=-1)
        yield float(sum(logprobs[place - 1, ids[place]] for place in range(len(probe.prompt), len(ids))))


def lora_round(source: Path, output: Path, *, seed: int) -> EngineSettings:
    """The policy of a round with LoRA, as a run exports it; proven by the model with its adapters still beside it."""
    torch.manual_seed(seed)
    model = with_adapters(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), LoraConfig(rank=4))
    for weight in plain_weights(model):
        if weight.adapter is not None:
            torch.nn.init.normal_(weight.adapter.b, std=0.02)
    export_policy(model, source, output)
    return settings_of(output, model)


def requests(count: int = 6) -> pa.ChunkedArray:
    asked = [[{"prompt_token_ids": list(range(20 + row, 60 + row)), "seed": row}] for row in range(count)]
    return pa.chunked_array([pa.array(asked, REQUESTS)])


@pytest.fixture
def heard(tmp_path: Path) -> Iterator[Events]:
    with recording(open_run(str(tmp_path / "run"))) as writer:
        yield writer.at(Round(0), "generate")


def count(directory: Path, kind: str) -> int:
    return sum(event["event"] == kind for event in events(directory))


class MixtureLoader(Engine):
    """The fault: what vLLM's own reload leaves on a CPU (0.29), embeddings and norms of the new policy and all else of
    the old one, which lies ready as a model of its own."""

    async def load(self, model_path: str) -> None:
        await super().load(f"{model_path}-mixture")


class FaultyLivingEngine(LivingEngine):
    """A living engine with that fault."""

    async def _start(self, wanted: EngineSettings) -> None:
        await super()._start(wanted)
        assert self._engine is not None
        self._engine.__class__ = MixtureLoader


def write_mixture(old: str, new: str, of_old: str | None = None) -> None:
    """Beside the policy `new` its mixture with `old`, of which come the weights that are named so; None: that fault."""
    shutil.copytree(new, f"{new}-mixture")
    weights = load_file(f"{new}/model.safetensors")
    before = load_file(f"{old}/model.safetensors")
    is_old = {name: of_old in name if of_old else "norm" not in name and "embed" not in name for name in weights}
    weights |= {name: before[name] for name in weights if is_old[name]}
    save_file(weights, f"{new}-mixture/model.safetensors", metadata={"format": "pt"})


def test_a_swapped_engine_answers_as_a_fresh_one_and_a_broken_swap_is_noticed(policies, heard, tmp_path):
    first, second = policies
    swapped = ray.remote(LivingEngine).options(num_cpus=0).remote(WINDOW)
    answers = []
    for settings in (first, second, first, first):
        ray.get(swapped.hold.remote(settings, heard))
        answers.append(ray.get(swapped.respond.remote(requests(), GREEDY)).to_pylist())
    ray.get(swapped.close.remote())
    heard.flush()
    # Four times told what to hold, two of which were another policy than before.
    assert count(tmp_path / "run", "engine_start") == 1
    assert count(tmp_path / "run", "weight_swap") == 2
    assert answers[0] != answers[1]
    assert answers[0] == answers[2] == answers[3]  # nothing of a cache that another stage filled

    write_mixture(first.model_path, second.model_path)
    faulty = ray.remote(FaultyLivingEngine).options(num_cpus=0).remote(WINDOW)
    ray.get(faulty.hold.remote(first, heard))
    ray.get(faulty.hold.remote(second, heard))
    heard.flush()
    (failure,) = [event for event in events(tmp_path / "run") if event["event"] == "weight_swap_failure"]
    assert "an engine gives the probe sequences log-probs of" in failure["error"]
    assert count(tmp_path / "run", "engine_start") == 3
    assert count(tmp_path / "run", "weight_swap") == 2
    # It was started anew, and is the fresh engine that the swapped one is compared with.
    assert answers[1] == ray.get(faulty.respond.remote(requests(), GREEDY)).to_pylist()

    with pytest.raises(ray.exceptions.RayTaskError, match=r"WrongWeights.*the trainer gave"):
        ray.get(faulty.hold.remote(replace(second, probe_logprobs=first.probe_logprobs), heard))
    ray.get(faulty.close.remote())


def test_lora_policies_are_swapped_round_by_round_and_a_forgotten_adapter_is_noticed(policies, heard, tmp_path):
    """Each is proven by what was trained, adapters beside the weights, and not by the merged model that is loaded."""
    initial = policies[0]
    first = lora_round(Path(initial.model_path), tmp_path / "first", seed=1)
    second = lora_round(Path(first.model_path), tmp_path / "second", seed=2)
    swapped = ray.remote(LivingEngine).options(num_cpus=0).remote(WINDOW)
    answers = []
    for settings in (initial, first, second):
        ray.get(swapped.hold.remote(settings, heard))
        answers.append(ray.get(swapped.respond.remote(requests(), GREEDY)).to_pylist())
    ray.get(swapped.close.remote())
    heard.flush()
    assert count(tmp_path / "run", "engine_start") == 1
    assert count(tmp_path / "run", "weight_swap") == 2
    assert answers[0] != answers[1] != answers[2]

    write_mixture(first.model_path, second.model_path, of_old="layers.1.mlp.down_proj")
    faulty = ray.remote(FaultyLivingEngine).options(num_cpus=0).remote(WINDOW)
    ray.get(faulty.hold.remote(first, heard))
    ray.get(faulty.hold.remote(second, heard))
    heard.flush()
    assert count(tmp_path / "run", "weight_swap_failure") == 1
    assert count(tmp_path / "run", "engine_start") == 3
    # It was started anew: a fresh engine of the second round's policy.
    assert answers[2] == ray.get(faulty.respond.remote(requests(), GREEDY)).to_pylist()
    ray.get(faulty.close.remote())
