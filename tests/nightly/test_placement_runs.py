"""Engines and training workers on their groups of nodes: real runs on a cluster of labelled nodes, CPUs only.

python -m pytest tests/nightly/test_placement_runs.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.labelled_cluster import LabelledCluster, labelled_cluster
from tests.helpers.placement import NODES, ON_GROUPS, ROLE, actors_by_role, run, short_run
from tests.helpers.runs import has_traceback
from tests.helpers.watched_run import is_clear


@pytest.fixture(scope="module")
def cluster(test_environment: None) -> Iterator[LabelledCluster]:
    with labelled_cluster(NODES) as started:
        yield started


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, cluster: LabelledCluster) -> list[str]:
    return short_run(tmp_path_factory.mktemp("placement"), tiny_model, cluster)


def test_engines_that_no_node_fits_are_waited_for_no_longer_than_allowed(cluster, options):
    nowhere = [f"generation.pool.label_selector={{{ROLE}: nowhere}}", "ray.autoscaling=true"]
    refused = run(cluster, "mipo_ray.run", *options, *nowhere, "ray.wait_timeout_minutes=0.3")
    assert refused.returncode == 2, refused.stdout
    assert "waiting for 1 engine actors, each on a node with 1 CPUs, 0 GPUs and labels mipo.io/role=nowhere, " in (
        refused.stdout
    )
    assert "(ray.wait_timeout_minutes 0.3) for 1 engine actors, each on a node with 1 CPUs" in refused.stdout
    assert "no autoscaler of this cluster says what it does" in refused.stdout
    assert not has_traceback(refused.stdout)


def test_phases_run_on_their_groups_and_give_everything_back(cluster, options, tmp_path):
    options = [*options, "generation.pool.lifetime=stage"]
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
