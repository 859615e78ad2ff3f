"""Engines that outlive a stage: they take each policy's weights, prove it, are replaced, and go with the run.

python -m pytest tests/integration/test_living_engine.py
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import ray.data
import torch
from ray.util.state import list_actors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mipo_ray.config.generation import SamplingConfig
from mipo_ray.config.recipe import load_config
from mipo_ray.generation.engine import DEFAULT_SAMPLING, REQUESTS, Engine
from mipo_ray.generation.living_engine import LivingEngine, engines_of_run
from mipo_ray.generation.sampler import Engines, policy_engines, sample_responses
from mipo_ray.generation.vllm_arguments import EngineSettings
from mipo_ray.models.probes import probes
from mipo_ray.monitoring.events import Events, recording
from mipo_ray.ray_cluster.resources import Resources
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import open_run
from tests.helpers.runs import arguments, events, start, wait_until, write_prompts
from tests.helpers.tiny_model import make_tiny_model

pytestmark = pytest.mark.usefixtures("ray_cluster")

WINDOW = 128
GREEDY = {DEFAULT_SAMPLING: SamplingConfig(temperature=0.0, max_tokens=24)}


@pytest.fixture(scope="module")
def policies(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[EngineSettings]:
    """Two policies of one architecture, with the log-probs of the probes as plain transformers gives them."""
    other = make_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=1)
    return [settings_of(tiny_model), settings_of(other)]


def settings_of(model: Path) -> EngineSettings:
    config = load_config(None, [f"model.path={model}", f"model.max_model_len={WINDOW}"])
    resources = Resources(on_gpu=False, dtype="float32", gpus_per_engine=0.0, gpus_per_worker=0.0)
    engines = policy_engines(config, str(model), resources)
    return replace(engines.settings, probe_logprobs=tuple(plain_probe_logprobs(model)))


def plain_probe_logprobs(model: Path) -> Iterator[float]:
    """By plain transformers: log softmax of the logits, at the tokens of the response."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for probe in probes(loaded.config.vocab_size):
        ids = torch.tensor([*probe.prompt, *probe.response])
        with torch.no_grad():
            logprobs = torch.log_softmax(loaded(ids[None]).logits[0], dim=-1)
        yield float(sum(logprobs[place - 1, ids[place]] for place in range(len(probe.prompt), len(ids))))


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


def write_mixture(old: str, new: str) -> None:
    shutil.copytree(new, f"{new}-mixture")
    weights = load_file(f"{old}/model.safetensors")
    changed = load_file(f"{new}/model.safetensors")
    weights |= {name: changed[name] for name in changed if "norm" in name or "embed" in name}
    save_file(weights, f"{new}-mixture/model.safetensors", metadata={"format": "pt"})


def test_a_swapped_engine_answers_as_a_fresh_one(policies, heard, tmp_path):
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

    fresh = ray.remote(LivingEngine).options(num_cpus=0).remote(WINDOW)
    ray.get(fresh.hold.remote(second, heard))
    assert answers[1] == ray.get(fresh.respond.remote(requests(), GREEDY)).to_pylist()
    ray.get(fresh.close.remote())
    assert answers[0] != answers[1]
    assert answers[0] == answers[2] == answers[3]  # nothing of a cache that another stage filled


def test_a_reload_that_changes_too_little_is_noticed_and_the_engine_started_anew(policies, heard, tmp_path):
    first, second = policies
    write_mixture(first.model_path, second.model_path)
    faulty = ray.remote(FaultyLivingEngine).options(num_cpus=0).remote(WINDOW)
    ray.get(faulty.hold.remote(first, heard))
    ray.get(faulty.hold.remote(second, heard))
    answers = ray.get(faulty.respond.remote(requests(), GREEDY)).to_pylist()
    ray.get(faulty.close.remote())
    heard.flush()
    (failure,) = [event for event in events(tmp_path / "run") if event["event"] == "weight_swap_failure"]
    assert "an engine gives the probe sequences log-probs of" in failure["error"]
    assert count(tmp_path / "run", "engine_start") == 2
    assert count(tmp_path / "run", "weight_swap") == 0

    fresh = ray.remote(LivingEngine).options(num_cpus=0).remote(WINDOW)
    ray.get(fresh.hold.remote(second, heard))
    assert answers == ray.get(fresh.respond.remote(requests(), GREEDY)).to_pylist()
    ray.get(fresh.close.remote())


def test_an_engine_that_cannot_prove_its_policy_is_refused(policies, heard):
    first, second = policies
    engine = ray.remote(LivingEngine).options(num_cpus=0).remote(WINDOW)
    with pytest.raises(ray.exceptions.RayTaskError, match=r"WrongWeights.*the trainer gave"):
        ray.get(engine.hold.remote(replace(first, probe_logprobs=second.probe_logprobs), heard))
    ray.get(engine.close.remote())


def engine_processes() -> set[int]:
    """Process ids of the vLLM engines on this machine that this user's tests may have started."""
    found = set()
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"EngineCore" in cmdline.read_bytes() and cmdline.stat().st_uid == os.getuid():
                found.add(int(cmdline.parent.name))
        except OSError:  # gone meanwhile
            continue
    return found


def living_actors() -> list[Any]:
    address = ray.get_runtime_context().gcs_address
    found = list_actors(address=address, filters=[("class_name", "=", "LivingEngine")])
    return [actor for actor in found if actor.state != "DEAD"]


def wait_until_nothing_is_left(before: set[int]) -> None:
    deadline = time.monotonic() + 30
    while (left := engine_processes() - before) or living_actors():
        assert time.monotonic() < deadline, (left, living_actors())
        time.sleep(0.5)


def test_engines_that_die_are_replaced_and_their_rows_sampled_again(policies, heard, tmp_path):
    config = load_config(None, [f"model.path={policies[0].model_path}", f"model.max_model_len={WINDOW}"])
    resources = Resources(on_gpu=False, dtype="float32", gpus_per_engine=0.0, gpus_per_worker=0.0)
    before = engine_processes()
    table = pa.table({"row": list(range(12)), "requests": requests(12)})
    rows = ray.data.from_arrow([table.slice(row, 2) for row in range(0, 12, 2)])

    def kill_once(block: pa.Table) -> pa.Table:
        """Behind the engines: the first block that comes out takes the engine with it."""
        marker = tmp_path / "killed"
        if not marker.exists():
            marker.write_text("")
            for process in engine_processes() - before:
                os.kill(process, signal.SIGKILL)
        return block

    with engines_of_run(config, resources, most=1) as living:
        assert living is not None
        one = policy_engines(config, policies[0].model_path, resources)
        engines = Engines(policies[0], one.request, one.pool, one.wait_minutes, living)
        sampled = sample_responses(rows, engines, GREEDY, heard)
        found = sampled.map_batches(kill_once, batch_format="pyarrow", batch_size=None).take_all()
        assert sorted(row["row"] for row in found) == list(range(12))
        assert all(row["responses"] for row in found)
        again = sample_responses(rows, engines, GREEDY, heard).take_all()
    heard.flush()
    answers = {row["row"]: list(row["responses"][0]["token_ids"]) for row in found}
    assert answers == {row["row"]: list(row["responses"][0]["token_ids"]) for row in again}
    assert count(tmp_path / "run", "engine_start") == 2
    wait_until_nothing_is_left(before)


@pytest.mark.parametrize("end", [None, signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=str)
def test_nothing_outlives_the_run(end, ray_address, tiny_model, tmp_path):
    (tmp_path / "recipe.yaml").write_text("{}")
    write_prompts(tmp_path / "train.jsonl", "train", 8)
    write_prompts(tmp_path / "held_out.jsonl", "held-out", 6)
    options = arguments(tmp_path / "run", tiny_model, tmp_path, f"ray.address={ray_address}", "evaluate.enabled=false")
    before = engine_processes()
    process = start(ray_address, *options, "filters.max_dropped_share=1", "generation.pool.lifetime=run")
    wait_until(process, lambda: bool(count(tmp_path / "run", "generated")))
    assert living_actors()
    if end is not None:
        process.send_signal(end)
    process.communicate(timeout=120)
    wait_until_nothing_is_left(before)
    shutil.rmtree(tmp_path / "run")
