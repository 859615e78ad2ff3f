"""Nodes come for each phase and go after it: real runs under Ray's own autoscaler, on a cluster that starts empty.

python -m pytest tests/nightly/test_autoscaling.py

The cluster and the runs are processes of namespaces of their own (`autoscaling_cluster`), so that no other
cluster of this machine is touched. Only the making of machines is fake: Ray's fake provider starts raylets here.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from benchmarks.simulated import VARIABLE, Speeds, as_text
from tests.helpers.autoscaling_cluster import ROLE, run_apart, why_not_apart
from tests.helpers.runs import has_traceback

ENGINE = "MapWorker(MapBatches(Sampler))"
SIMULATED = "MapWorker(MapBatches(SimulatedSampler))"
LIVING = "LivingEngine"
WORKER = "RayTrainWorker"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """What four runs left behind: `run`, of one round, `kept`, whose engines outlive their stage, `nowhere`, whose
    engines no node type fits, and `gpus`, whose pool grows over nodes with pretended GPUs, where engines and workers
    are simulated."""
    if (reason := why_not_apart()) is not None:
        pytest.skip(f"the cluster cannot run apart from this machine's other processes: {reason}")
    directory = tmp_path_factory.mktemp("autoscaling")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, as_text(Speeds(train_tokens_per_second=1000.0)))
        make_runs(directory, tiny_model)
    return directory


def make_runs(directory: Path, model: Path) -> None:
    rows = [{"prompt": f"Question {index}?", "context": f"I am user {index}."} for index in range(16)]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "recipe.yaml").write_text("{}")  # the defaults, not the demo
    options = [
        "mipo_ray.run",
        str(directory / "recipe.yaml"),
        "rounds=1",
        f"model.path={model}",
        "model.max_model_len=256",
        f"prompts.path={directory}/train.jsonl",
        "evaluate.enabled=false",
        "conditioning.block_size=8",  # one block for each engine
        "generation.sampling.max_tokens=8",
        "generation.pool.min_size=2",
        "generation.pool.max_size=2",
        "generation.pool.cpus_per_engine=2",
        "train.num_workers=2",
        f"train.label_selector={{{ROLE}: train}}",
    ]
    run_apart(
        directory,
        {
            # Its training takes longer than the autoscaler leaves an idle node alone.
            "run": [*options, f"run_dir={directory}/run_directory", on("generate"), "train.epochs=10"],
            "kept": [*options, f"run_dir={directory}/kept", on("generate"), "generation.pool.lifetime=run"],
            "nowhere": [*options, f"run_dir={directory}/other", on("nowhere"), "ray.wait_timeout_minutes=0.5"],
            "gpus": [*simulated(directory, options), f"run_dir={directory}/gpus", on("gpu")],
        },
        timeout=1500,
    )


def simulated(directory: Path, options: list[str]) -> list[str]:
    """The same with engines of a GPU each, of which there is work for four: some 80 seconds for one of them."""
    rows = [{"prompt": f"Question {index}?", "context": f"I am user {index}."} for index in range(800)]
    (directory / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "benchmarks.simulated",
        *options[1:],
        f"prompts.path={directory}/many.jsonl",
        "generation.sampling.max_tokens=200",
        "generation.pool.min_size=1",
        "generation.pool.max_size=4",
        "generation.pool.cpus_per_engine=1",
        "generation.pool.gpus_per_engine=1",
        "train.gpus_per_worker=0",
        "train.batch_size=32",
        "model.dtype=float32",
    ]


def on(role: str) -> str:
    """Engines on nodes of this role."""
    return f"generation.pool.label_selector={{{ROLE}: {role}}}"


def samples(cluster: Path, name: str) -> list[dict[str, Any]]:
    """What the watcher saw during a run, and until the nodes were gone again."""
    seen = [json.loads(line) for line in (cluster / f"{name}.jsonl").read_text().splitlines()]
    return [sample for sample in seen if "error" not in sample]


def counts(seen: list[dict[str, Any]], source: str, kind: str) -> list[int]:
    """How many nodes there were of this kind, each number once."""
    return [count for count, _ in groupby(sample[source].get(kind, 0) for sample in seen)]


def output(cluster: Path, name: str) -> str:
    return (cluster / f"{name}.log").read_text()


def test_the_run_finishes(cluster):
    assert (cluster / "run.exit").read_text() == "0", output(cluster, "run")
    for stage in ("generate", "train"):
        assert (cluster / "run_directory" / "rounds" / "000" / stage / "manifest.json").exists()
    assert not (cluster / "run_directory" / "lock.json").exists()


# By the autoscaler's status, which counts by node type, and by the state API, which knows labels.
@pytest.mark.parametrize("source", ["nodes", "alive"])
def test_each_phase_gets_its_nodes_and_gives_them_back(cluster, source):
    # A group may come and go more than once: Ray Data asks for nodes of any group for its reading and writing.
    seen = samples(cluster, "run")
    for role, most in (("generate", 2), ("train", 1)):
        found = counts(seen, source, role)
        assert (found[0], max(found), found[-1]) == (0, most, 0), found


@pytest.mark.parametrize("source", ["nodes", "alive"])
def test_the_engines_nodes_are_gone_before_training_ends(cluster, source):
    seen = samples(cluster, "run")
    last_engine = max(index for index, sample in enumerate(seen) if ENGINE in sample["actors"])
    last_worker = max(index for index, sample in enumerate(seen) if WORKER in sample["actors"])
    assert 0 in [sample[source].get("generate", 0) for sample in seen[last_engine:last_worker]]


@pytest.mark.parametrize("source", ["nodes", "alive"])
def test_engines_of_the_run_keep_their_nodes_until_it_ends(cluster, source):
    assert (cluster / "kept.exit").read_text() == "0", output(cluster, "kept")
    seen = samples(cluster, "kept")
    first, last = (
        next(index for index in order if WORKER in seen[index]["actors"])
        for order in (range(len(seen)), reversed(range(len(seen))))
    )
    training = seen[first : last + 1]
    assert {sample[source].get("generate", 0) for sample in training} == {2}
    assert all(LIVING in sample["actors"] for sample in training)
    assert seen[-1][source].get("generate", 0) == 0


def test_engines_and_workers_run_on_their_groups(cluster):
    seen = samples(cluster, "run")
    for actor, role in ((ENGINE, "generate"), (WORKER, "train")):
        at_work = [sample for sample in seen if actor in sample["actors"]]
        assert at_work
        assert all(sample["actors"][actor] == [role] for sample in at_work)
        assert all(sample["nodes"].get(role, 0) for sample in at_work)
    both = [sample for sample in seen if ENGINE in sample["actors"] and WORKER in sample["actors"]]
    assert both == []


@pytest.mark.parametrize("source", ["nodes", "alive"])
def test_a_pool_over_gpu_nodes_grows_to_its_size_and_leaves_none_behind(cluster, source):
    """Ray Data's budget begins at one engine (ray-project/ray#59144), and its pools keep the last (#66196): here the
    first must grow, and the last node be gone while training still works. It grows once and shrinks once: no reading of
    training brings a node back (`ray_cluster/growth.py`)."""
    assert (cluster / "gpus.exit").read_text() == "0", output(cluster, "gpus")
    seen = samples(cluster, "gpus")
    found = counts(seen, source, "gpu")
    assert (found[0], max(found), found[-1]) == (0, 4, 0), found
    top = found.index(4)
    assert found[: top + 1] == sorted(found[: top + 1]), found
    assert found[top:] == sorted(found[top:], reverse=True), found
    last_worker = max(index for index, sample in enumerate(seen) if WORKER in sample["actors"])
    last_engine = max(index for index, sample in enumerate(seen) if SIMULATED in sample["actors"])
    assert 0 in [sample[source].get("gpu", 0) for sample in seen[last_engine:last_worker]]


def test_engines_that_no_node_type_fits_are_waited_for_no_longer_than_allowed(cluster):
    printed = output(cluster, "nowhere")
    assert (cluster / "nowhere.exit").read_text() == "2", printed
    assert (
        "waiting for 2 engine actors, each on a node with 2 CPUs, 0 GPUs and labels mipo.io/role=nowhere, "
    ) in printed
    assert "(ray.wait_timeout_minutes 0.5) for 2 engine actors" in printed
    assert "the autoscaler has no node type that fits, or may add none" in printed
    assert not has_traceback(printed)
    assert counts(samples(cluster, "nowhere"), "nodes", "generate")[-1] == 0
