"""Nodes of GKE and EKS as the manifests see them: machines, the labels of their nodes, and which pods may land there.

Machines and labels are the clouds' own; nothing here asks a cloud.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.helpers.cluster_manifests import Manifest

FIRST_WITH_BFLOAT16 = 8.0


@dataclass(frozen=True)
class Machine:
    """What a cloud's list of machines says of one: vCPUs, GiB of memory, GPUs and their compute capability."""

    cpus: int
    memory: int
    gpus: int = 0
    capability: float = 0.0
    accelerator: str = ""


# Sources: docs.cloud.google.com/compute/docs/gpus and /compute/docs/general-purpose-machines;
# aws.amazon.com/ec2/instance-types (g4, g5, g6, p4, m6i); developer.nvidia.com/cuda-gpus for compute capabilities.
MACHINES = {
    "e2-standard-8": Machine(8, 32),
    "g2-standard-16": Machine(16, 64, 1, 8.9, "nvidia-l4"),
    "a2-highgpu-8g": Machine(96, 680, 8, 8.0, "nvidia-tesla-a100"),
    "n1-standard-16": Machine(16, 60, 1, 7.5, "nvidia-tesla-t4"),
    "m6i.2xlarge": Machine(8, 32),
    "g6.4xlarge": Machine(16, 64, 1, 8.9),
    "g6.8xlarge": Machine(32, 128, 1, 8.9),
    "g5.4xlarge": Machine(16, 64, 1, 8.6),
    "g5.8xlarge": Machine(32, 128, 1, 8.6),
    "p4d.24xlarge": Machine(96, 1152, 8, 8.0),
    "p4de.24xlarge": Machine(96, 1152, 8, 8.0),
    "g4dn.4xlarge": Machine(16, 64, 1, 7.5),
    "g4dn.metal": Machine(96, 384, 8, 7.5),
}
ENGINES = {"overlays/gke": {"g2-standard-16"}, "overlays/eks": {"g6.4xlarge", "g6.8xlarge", "g5.4xlarge", "g5.8xlarge"}}
TRAINING = {"overlays/gke": {"a2-highgpu-8g"}, "overlays/eks": {"p4d.24xlarge", "p4de.24xlarge"}}
WITHOUT_GPU = {"overlays/gke": "e2-standard-8", "overlays/eks": "m6i.2xlarge"}


def nodes(cloud: str, name: str, spot: bool) -> list[dict[str, str]]:
    """The labels that nodes of this machine have: on EKS those that Karpenter makes, and those of managed groups."""
    machine, architecture = MACHINES[name], {"kubernetes.io/arch": "amd64"}
    if cloud == "overlays/gke":
        gpu = {"cloud.google.com/gke-accelerator": machine.accelerator} if machine.gpus else {}
        return [{**architecture, **gpu, **({"cloud.google.com/gke-spot": "true"} if spot else {})}]
    labels = {**architecture, "node.kubernetes.io/instance-type": name}
    return [
        {**labels, "karpenter.sh/capacity-type": "spot" if spot else "on-demand"},
        {**labels, "eks.amazonaws.com/capacityType": "SPOT" if spot else "ON_DEMAND"},
    ]


def may_land(pod: Manifest, labels: dict[str, str]) -> bool:
    """Whether a pod's node selector and required node affinity let it onto a node with these labels."""
    affinity = pod.get("affinity", {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution")
    terms = [term["matchExpressions"] for term in affinity["nodeSelectorTerms"]] if affinity else [[]]
    fits = {"In": lambda value, values: value in values, "NotIn": lambda value, values: value not in values}
    return pod.get("nodeSelector", {}).items() <= labels.items() and any(
        all(fits[one["operator"]](labels.get(one["key"]), one["values"]) for one in term) for term in terms
    )


def requests(pod: Manifest) -> tuple[float, float, int]:
    """CPUs, bytes of memory and GPUs that a pod asks for."""
    from ray.autoscaler._private.kuberay.utils import parse_quantity

    asked = [container["resources"]["requests"] for container in pod["containers"]]
    gpus = sum(int(one.get("nvidia.com/gpu", 0)) for one in asked)
    return (
        sum(float(parse_quantity(one["cpu"])) for one in asked),
        sum(float(parse_quantity(one["memory"])) for one in asked),
        gpus,
    )


def tolerated(pod: Manifest, taints: list[dict[str, str]]) -> bool:
    """Whether the pod tolerates every taint, by key: its tolerations ask for no value of them."""
    keys = {one["key"] for one in pod.get("tolerations", []) if one["operator"] == "Exists"}
    return {taint["key"] for taint in taints} <= keys
