"""Reads the manifests in cluster/: builds an overlay with kubectl, and finds the Ray clusters and pods in it."""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"
CRDS = CLUSTER.parents[1] / "shared" / "kuberay"

CLOUDS = ("overlays/gke", "overlays/eks")
RAY_JOBS = ("overlays/cpu-demo", "overlays/gpu-single-node", "overlays/gpu-multi-node", "overlays/gpu-gang", *CLOUDS)
RAY_CLUSTERS = ("long-lived/cpu-demo", "long-lived/gpu-single-node", "long-lived/gpu-multi-node")
ALL = RAY_JOBS + RAY_CLUSTERS

Manifest = dict[str, Any]


def build(overlay: str) -> list[Manifest]:
    """The objects of an overlay, a folder in cluster/; the caller may change them. Skips where kubectl is absent."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    return copy.deepcopy(_build(overlay))


@functools.cache
def _build(overlay: str) -> list[Manifest]:
    done = subprocess.run(["kubectl", "kustomize", str(CLUSTER / overlay)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def only(objects: Sequence[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The one object of this kind (and name)."""
    (found,) = (item for item in objects if item["kind"] == kind and name in (None, item["metadata"]["name"]))
    return found


def ray_objects(objects: Sequence[Manifest]) -> list[Manifest]:
    """The RayJobs and RayClusters."""
    return [item for item in objects if item["apiVersion"].startswith("ray.io/")]


def ray_cluster_spec(item: Manifest) -> Manifest:
    """The description of the Ray cluster that a RayJob or RayCluster holds."""
    spec = item["spec"]
    return spec["rayClusterSpec"] if item["kind"] == "RayJob" else spec


def pod_templates(objects: Sequence[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Every pod template, with a name that says where it is."""
    for item in objects:
        where = f"{item['kind']} {item['metadata']['name']}"
        if item["apiVersion"].startswith("ray.io/"):
            spec = ray_cluster_spec(item)
            yield f"{where}, head", spec["headGroupSpec"]["template"]
            for group in spec["workerGroupSpecs"]:
                yield f"{where}, group {group['groupName']}", group["template"]
            if "submitterPodTemplate" in item["spec"]:
                yield f"{where}, submitter", item["spec"]["submitterPodTemplate"]
        elif "template" in item.get("spec", {}):
            yield where, item["spec"]["template"]


def as_pods(objects: Sequence[Manifest]) -> list[Manifest]:
    """The pods of the Ray objects as plain Pod objects, which tools know that do not know Ray's kinds."""
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": where.rsplit(" ", 1)[-1],
                "namespace": ray_objects(objects)[0]["metadata"]["namespace"],
                **template["metadata"],
            },
            "spec": template["spec"],
        }
        for where, template in pod_templates(ray_objects(objects))
    ]


def operator_labels(where: str, template: Manifest) -> dict[str, str]:
    """The labels of a pod as it runs, named as `pod_templates` names it: KubeRay adds some to Ray's nodes."""
    labels = dict(template["metadata"]["labels"])
    if where.endswith(", head"):
        return {**labels, "ray.io/is-ray-node": "yes", "ray.io/node-type": "head"}
    if ", group " in where:
        return {**labels, "ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"}
    return labels
