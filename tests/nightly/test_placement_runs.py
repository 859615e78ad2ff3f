"""Engines and training workers on their groups of nodes: real runs on a cluster of labelled nodes, CPUs only.

python -m pytest tests/nightly/test_placement_runs.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.labelled_cluster import LabelledCluster, labelled_cluster
from tests.helpers.watched_run import is_clear

ROLE = "mipo.io/role"
NODES = [{"num_cpus": 2, "labels": {ROLE: role}} for role in ("head", "generate", "train")]
ON_GROUPS = [f"generation.pool.label_selector={{{ROLE}: generate}}", f"train.label_selector={{{ROLE}: train}}"]


@pytest.fixture(scope="module")
def cluster(test_environment: None) -> Iterator[LabelledCluster]:
    with labelled_cluster(NODES) as started:
        yield started


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, cluster: LabelledCluster) -> list[str]:
    """Arguments of a short run of one round on the cluster."""
    directory = tmp_path_factory.mktemp("placement")
    rows = [{"prompt": f"Question {index}?", "context": f"I am user {index}."} for index in range(16)]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "recipe.yaml").write_text("{}")  # the defaults, not the demo
    return [
        str(directory / "recipe.yaml"),
        f"ray.address={cluster.address}",
        f"run_dir={directory}/run",
        "rounds=1",
        f"model.path={tiny_model}",
        "model.max_model_len=256",
        f"prompts.path={directory}/train.jsonl",
        "evaluate.enabled=false",
        "generation.sampling.max_tokens=8",
        "train.num_workers=2",
    ]


def run(cluster: LabelledCluster, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        env=cluster.environment,
    )


def actors_by_role(cluster: LabelledCluster) -> dict[str, set[str]]:
    """What the state API knows of the cluster's actors, the ended ones too: class name -> roles of their nodes."""
    from ray.util.state import list_actors, list_nodes

    roles = {node.node_id: node.labels[ROLE] for node in list_nodes(address=cluster.dashboard, detail=True)}
    found: dict[str, set[str]] = {}
    for actor in list_actors(address=cluster.dashboard, limit=10_000):
        if actor.node_id in roles:
            found.setdefault(actor.class_name, set()).add(roles[actor.node_id])
    return found


def test_engines_that_no_node_fits_are_waited_for_no_longer_than_allowed(cluster, options):
    nowhere = [f"generation.pool.label_selector={{{ROLE}: nowhere}}", "ray.autoscaling=true"]
    refused = run(cluster, "mipo_ray.run", *options, *nowhere, "ray.wait_timeout_minutes=0.3")
    assert refused.returncode == 2, refused.stdout
    assert "waiting for 1 engine actors, each on a node with 1 CPUs, 0 GPUs and labels mipo.io/role=nowhere, " in (
        refused.stdout
    )
    assert "(ray.wait_timeout_minutes 0.3) for 1 engine actors, each on a node with 1 CPUs" in refused.stdout
    assert "no autoscaler of this cluster says what it does" in refused.stdout
    assert "Traceback" not in refused.stdout


def test_phases_run_on_their_groups_and_give_everything_back(cluster, options, tmp_path):
    # Training that no node fits: generation is done by then, and stays done.
    seen_before = tmp_path / "before.jsonl"
    nowhere = [*ON_GROUPS, f"train.label_selector={{{ROLE}: nowhere}}", "ray.autoscaling=true"]
    refused = run(
        cluster, "tests.helpers.watched_run", str(seen_before), *options, *nowhere, "ray.wait_timeout_minutes=0.3"
    )
    assert refused.returncode == 2, refused.stdout
    assert "waiting for 2 training workers, each on a node with 1 CPUs, 0 GPUs and labels" in refused.stdout
    assert "training: waited " in refused.stdout
    assert "RayTrainWorker" not in actors_by_role(cluster)

    seen_after = tmp_path / "after.jsonl"
    done = run(cluster, "tests.helpers.watched_run", str(seen_after), *options, *ON_GROUPS)
    assert done.returncode == 0, done.stdout
    assert "round 0  generate  finished before" in done.stdout
    assert "waiting for" not in done.stdout

    roles = actors_by_role(cluster)
    assert roles["MapWorker(MapBatches(Sampler))"] == {"generate"}
    assert roles["RayTrainWorker"] == {"train"}

    boundaries = [json.loads(line) for file in (seen_before, seen_after) for line in file.read_text().splitlines()]
    assert [seen["stage"] for seen in boundaries] == 2 * ["generate", "train"]
    for seen in boundaries:
        assert is_clear(seen), seen
