"""The overlays of GKE and EKS: which nodes pods may land on, what comes where there are none, what the pages make.

python -m pytest tests/unit/cluster/test_clouds.py
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.helpers.cloud_nodes import (
    ENGINES,
    FIRST_WITH_BFLOAT16,
    MACHINES,
    TRAINING,
    WITHOUT_GPU,
    may_land,
    nodes,
    requests,
    tolerated,
)
from tests.helpers.cluster_manifests import (
    CLOUDS,
    CLUSTER,
    RAY_JOBS,
    Manifest,
    build,
    only,
    pod_templates,
    ray_cluster_spec,
)

GIB = 2**30
# What the node's own processes take of it, and a little for the pods of kube-system.
USABLE_CPUS, USABLE_MEMORY = 0.9, 0.85


def pods(cloud: str) -> dict[str, Manifest]:
    """The pod specs of an overlay by the last word of their names."""
    return {where.rsplit(" ", 1)[-1]: template["spec"] for where, template in pod_templates(build(cloud))}


def machines_of(cloud: str) -> list[str]:
    """The machines of the table that this cloud has."""
    return [name for name in MACHINES if ("." in name) == (cloud == "overlays/eks")]


def landing(cloud: str, pod: Manifest) -> set[tuple[str, bool]]:
    """(machine, whether it is a spot node) of every kind of node with GPUs that the pod may land on."""
    found = set()
    for name in machines_of(cloud):
        for spot in (True, False) if MACHINES[name].gpus else ():
            answers = {may_land(pod, labels) for labels in nodes(cloud, name, spot)}
            assert len(answers) == 1, f"{name}: Karpenter's nodes and those of managed groups differ"
            found |= {(name, spot)} if answers == {True} else set()
    return found


@pytest.mark.parametrize("cloud", CLOUDS)
def test_each_group_lands_on_its_own_kind_of_node(cloud: str) -> None:
    """A T4, which has no bfloat16, takes no pod; training never lands on a node that may be taken."""
    found = pods(cloud)
    assert landing(cloud, found["generate"]) == {(name, True) for name in ENGINES[cloud]}
    assert landing(cloud, found["generate-on-demand"]) == {(name, False) for name in ENGINES[cloud]}
    assert landing(cloud, found["train"]) == {(name, False) for name in TRAINING[cloud]}
    for name in ENGINES[cloud] | TRAINING[cloud]:
        assert MACHINES[name].capability >= FIRST_WITH_BFLOAT16


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("pod", ["head", "submitter"])
def test_the_head_and_the_submitter_are_on_no_spot_node(cloud: str, pod: str) -> None:
    for labels in nodes(cloud, WITHOUT_GPU[cloud], False):
        assert may_land(pods(cloud)[pod], labels)
    for labels in nodes(cloud, WITHOUT_GPU[cloud], True):
        assert not may_land(pods(cloud)[pod], labels)
    arm = {**nodes(cloud, WITHOUT_GPU[cloud], False)[0], "kubernetes.io/arch": "arm64"}
    assert not may_land(pods(cloud)[pod], arm)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_pods_fit_the_machines(cloud: str) -> None:
    found = pods(cloud)
    homes = {"generate": ENGINES[cloud], "generate-on-demand": ENGINES[cloud], "train": TRAINING[cloud]}
    for group, names in homes.items():
        cpus, memory, gpus = requests(found[group])
        for name in names:
            machine = MACHINES[name]
            assert cpus <= USABLE_CPUS * machine.cpus, (group, name)
            assert memory <= USABLE_MEMORY * machine.memory * GIB, (group, name)
            assert gpus == machine.gpus, (group, name)
    # One machine without GPUs holds the head with its autoscaler, and the submitter.
    options = ray_cluster_spec(only(build(cloud), "RayJob"))["autoscalerOptions"]
    head, submitter, autoscaler = (
        requests(pod) for pod in (found["head"], found["submitter"], {"containers": [options]})
    )
    machine = MACHINES[WITHOUT_GPU[cloud]]
    assert head[0] + submitter[0] + autoscaler[0] <= USABLE_CPUS * machine.cpus
    assert head[1] + submitter[1] + autoscaler[1] <= USABLE_MEMORY * machine.memory * GIB


def test_the_neutral_overlays_name_no_cloud() -> None:
    """No pod of theirs waits for a label that only one cloud's nodes have."""
    for overlay in RAY_JOBS:
        text = "".join(yaml.safe_dump(pod.get("affinity", {})) for pod in pods(overlay).values())
        keys = {key for pod in pods(overlay).values() for key in pod.get("nodeSelector", {})}
        assert keys == {"kubernetes.io/arch"}
        assert ("nodeAffinity" in text) == (overlay in CLOUDS)


def started(cloud: str, unavailable: dict[str, float]) -> dict[str, int]:
    """How many nodes of each group Ray's autoscaler starts for two engines, by its own scheduler.

    `unavailable`: groups whose pods got no node in time, with the score that the autoscaler gives them: 0 at first, 1
    again after 10 minutes.
    """
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount
    from ray.core.generated.common_pb2 import LabelSelectorOperator

    item = only(build(cloud), "RayJob")
    read = _derive_autoscaling_config_from_ray_cr(
        {"metadata": item["metadata"], "spec": item["spec"]["rayClusterSpec"]}
    )
    types: dict[str, Any] = {}
    for name, node in read["available_node_types"].items():
        types[name] = NodeTypeConfig(
            name=name,
            min_worker_nodes=node["min_workers"],
            max_worker_nodes=node["max_workers"],
            resources=node["resources"],
            labels=node["labels"],
            priority=node.get("priority", 0),
        )
    del types["headgroup"]
    role = ("mipo.io/role", LabelSelectorOperator.LABEL_OPERATOR_IN, ["generate"])
    engine = ResourceRequestUtil.make({"GPU": 1, "CPU": 1}, label_selectors=[[role]])
    reply = ResourceDemandScheduler(None).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=types,
            resource_requests=[ResourceRequestByCount(request=engine, count=2)],
            recoverable_resource_availabilities=unavailable,
        )
    )
    return {launch.instance_type: launch.count for launch in reply.to_launch}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_engines_fall_back_to_on_demand_nodes_and_come_back(cloud: str) -> None:
    """Spot nodes first; while their pods get none, on-demand ones; spot nodes again once they may be there again."""
    from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

    monitor = CloudResourceMonitor()
    assert started(cloud, monitor.get_recoverable_resource_availabilities()) == {"generate": 2}
    monitor.notify([InstanceUpdateEvent(new_instance_status=Instance.ALLOCATION_TIMEOUT, instance_type="generate")])
    assert started(cloud, monitor.get_recoverable_resource_availabilities()) == {"generate-on-demand": 2}
    assert started(cloud, {"generate": 1.0}) == {"generate": 2}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_pod_without_a_node_is_given_up_before_the_run_is(cloud: str) -> None:
    objects = build(cloud)
    options = ray_cluster_spec(only(objects, "RayJob"))["autoscalerOptions"]
    variables = {variable["name"]: variable["value"] for variable in options["env"]}
    recipe = yaml.safe_load(only(objects, "ConfigMap", "mipo-recipe")["data"]["recipe.yaml"])
    minutes = recipe["ray"]["wait_timeout_minutes"]
    assert minutes == 12 * 60
    given_up = int(variables["RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"])
    assert 10 * 60 < given_up < minutes * 60 / 2


def test_ray_still_reads_the_variable() -> None:
    import ray.autoscaler.v2.instance_manager.config as config

    assert config.__file__ is not None
    with open(config.__file__, encoding="utf-8") as source:
        assert "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S" in source.read()


@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_claim_has_a_class_that_several_nodes_mount(cloud: str) -> None:
    claims = [item["spec"] for item in build(cloud) if item["kind"] == "PersistentVolumeClaim"]
    assert len(claims) == 2
    for claim in claims:
        assert claim["accessModes"] == ["ReadWriteMany"]
        assert claim["storageClassName"] == {"overlays/gke": "standard-rwx", "overlays/eks": "mipo-efs"}[cloud]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_page_makes_the_nodes_that_the_pods_ask_for(cloud: str) -> None:
    """The commands, and the files that they apply, make every machine that the manifests name, and no other one."""
    page = (CLUSTER / cloud / "README.md").read_text()
    commands = "\n".join(re.findall(r"^```\w+\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL))
    files = {CLUSTER.parent / name for name in re.findall(rf"cluster/{cloud}/\S+\.yaml", commands)}
    made = commands + "".join(path.read_text() for path in sorted(files))
    wanted = ENGINES[cloud] | TRAINING[cloud] | {WITHOUT_GPU[cloud]}
    assert {name for name in machines_of(cloud) if re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", made)} == wanted
    assert f"kubectl apply -k cluster/{cloud}" in commands
    assert "--values cluster/kuberay-values.yaml" in commands
    assert "by estimate" in page
    assert ("name: mipo-efs" in commands) == (cloud == "overlays/eks")


def test_karpenters_pools_hold_the_groups() -> None:
    """Nodes of each pool fit the pods' affinity; their taint is tolerated by pods with GPUs and by no other one."""
    found = pods("overlays/eks")
    homes = {"mipo-engines": ("generate", "generate-on-demand"), "mipo-train": ("train",)}
    documents = list(yaml.safe_load_all((CLUSTER / "overlays/eks/karpenter.yaml").read_text()))
    pools = {item["metadata"]["name"]: item["spec"] for item in documents if item["kind"] == "NodePool"}
    assert set(pools) == set(homes)
    for name, groups in homes.items():
        spec = pools[name]["template"]["spec"]
        asked = {one["key"]: one["values"] for one in spec["requirements"]}
        most = 0
        for group in groups:
            landed = {
                capacity
                for capacity in asked["karpenter.sh/capacity-type"]
                for machine in asked["node.kubernetes.io/instance-type"]
                if may_land(found[group], nodes("overlays/eks", machine, capacity == "spot")[0])
            }
            assert landed == {"spot" if group == "generate" else "on-demand"}
            assert tolerated(found[group], spec["taints"])
            sizes = {one["groupName"]: one["maxReplicas"] for one in _groups("overlays/eks")}
            most = max(most, sizes[group] * requests(found[group])[2])
        assert pools[name]["limits"]["nvidia.com/gpu"] >= most
        assert not tolerated(found["head"], spec["taints"])


def test_managed_node_groups_hold_the_groups() -> None:
    found = pods("overlays/eks")
    config = yaml.safe_load((CLUSTER / "overlays/eks/cluster.yaml").read_text())
    homes = {"engines": "generate", "engines-on-demand": "generate-on-demand", "train": "train"}
    made = {group["name"]: group for group in config["managedNodeGroups"]}
    assert set(made) == {"system", *homes}
    sizes = {one["groupName"]: one["maxReplicas"] for one in _groups("overlays/eks")}
    for name, group in homes.items():
        for machine in made[name]["instanceTypes"]:
            assert may_land(found[group], nodes("overlays/eks", machine, made[name].get("spot", False))[1])
        assert tolerated(found[group], made[name]["taints"])
        assert (made[name]["minSize"], made[name]["maxSize"]) == (0, sizes[group])
    assert {addon["name"] for addon in config["addons"]} >= {"vpc-cni", "eks-pod-identity-agent", "aws-efs-csi-driver"}


def _groups(overlay: str) -> list[Manifest]:
    return list(ray_cluster_spec(only(build(overlay), "RayJob"))["workerGroupSpecs"])
