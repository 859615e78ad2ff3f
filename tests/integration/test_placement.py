"""Requests for groups of nodes, on a cluster of labelled nodes; runs there: tests/nightly/test_placement_runs.py.

python -m pytest tests/integration/test_placement.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mipo_ray.config.label_selectors import check_selector
from mipo_ray.ray_cluster.resources import Request
from mipo_ray.ray_cluster.waiting import Autoscaling
from tests.helpers.labelled_cluster import LabelledCluster, labelled_cluster
from tests.helpers.placement import NODES, ON_GROUPS, ROLE, actors_by_role, run, short_run


@pytest.fixture(scope="module")
def cluster(test_environment: None) -> Iterator[LabelledCluster]:
    with labelled_cluster(NODES) as started:
        yield started


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, cluster: LabelledCluster) -> list[str]:
    return short_run(tmp_path_factory.mktemp("placement"), tiny_model, cluster)


def test_what_is_read_of_an_autoscalers_status():
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    from mipo_ray.ray_cluster.nodes import read_status

    request = Request("training", "worker", "train.num_workers", 2, 2, 1.0, 1.0, {ROLE: "train"})
    status = GetClusterStatusReply()
    assert read_status(status, request) is None  # no autoscaler
    state = status.autoscaling_state
    state.autoscaler_state_version = 7
    assert read_status(status, request) == Autoscaling()
    state.pending_instance_requests.add(ray_node_type_name="train", count=2)
    state.pending_instances.add(ray_node_type_name="train")
    state.failed_instance_requests.add(ray_node_type_name="spot", reason="no capacity", failed_ts=9)
    state.failed_instance_requests.add(ray_node_type_name="spot", reason="quota", failed_ts=3)
    found = read_status(status, request)
    assert found == Autoscaling({"train": 3}, ("spot: quota", "spot: no capacity"))

    # The demand of a placement group, as the autoscaler gives it back; that of others is not this request's.
    bundle = state.infeasible_gang_resource_requests.add().requests.add()
    bundle.resources_bundle.update({"CPU": 1.0, "GPU": 2.0})
    bundle.label_selectors.add().label_constraints.add(label_key=ROLE, label_values=["train"])
    assert not read_status(status, request).infeasible
    bundle.resources_bundle["GPU"] = 1.0
    assert read_status(status, request).infeasible
    bundle.label_selectors[0].label_constraints.add(label_key="zone", label_values=["a"])
    assert not read_status(status, request).infeasible
    actor = state.infeasible_resource_requests.add()
    actor.resources_bundle.update({"CPU": 1.0, "GPU": 1.0, "memory": 1e9})
    actor.label_selectors.add().label_constraints.add(label_key=ROLE, label_values=["train"])
    assert read_status(status, request).infeasible


def test_ray_takes_the_selectors_that_the_configuration_takes():
    from ray._private.label_utils import validate_label_selector

    for condition in ("a", "!a", "in(a,b)", "in(a, b-1.c_d)", "!in(a, b)"):
        selector = check_selector({ROLE: condition, "zone": "a", "ray.io/market-type": "spot"})
        assert validate_label_selector(selector) is None, condition


def test_a_request_that_no_node_fits_is_an_error_at_once_where_the_cluster_does_not_grow(cluster, options):
    nowhere = [*ON_GROUPS, f"train.label_selector={{{ROLE}: nowhere}}"]
    for mode in ([], ["--dry-run"]):
        refused = run(cluster, "mipo_ray.run", *mode, *options, *nowhere)
        assert refused.returncode == 2, refused.stdout
        assert (
            f"error: training: the 0 of 3 nodes that match the labels {ROLE}=nowhere have room for 0 of the 2 that "
            "train.num_workers asks for, with 1 CPUs and 0 GPUs on one node each"
        ) in refused.stdout
    assert not any(name.startswith("MapWorker") for name in actors_by_role(cluster))


@pytest.mark.parametrize(("role", "other"), [("generate", "train"), ("train", "generate")])
def test_the_actors_of_a_phase_run_on_its_group_and_its_reading_off_the_other(cluster, role, other):
    done = run(cluster, "tests.helpers.placed_actors", cluster.address, role)
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["role"] == 64 * [role]
    assert other not in found["read"]


def test_training_workers_ask_for_their_group_and_its_spread():
    from mipo_ray.config.train import TrainConfig
    from mipo_ray.training.trainer import _scaling

    request = Request("training", "worker", "train.num_workers", 2, 2, 3.0, 0.0, {ROLE: "train"}, "SPREAD")
    scaling = _scaling(TrainConfig(num_workers=2), request)
    assert scaling.label_selector == {ROLE: "train"}
    assert scaling.placement_strategy == "SPREAD"
    assert scaling.resources_per_worker == {"CPU": 3.0}
    assert _scaling(TrainConfig(num_workers=4, min_workers=2), request).num_workers == (2, 4)
