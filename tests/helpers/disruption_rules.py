"""What keeps a run of days alive in a cluster whose nodes come and go: rules over the built manifests, as sentences.

A part of `cluster_rules.broken_rules`; tests/unit/cluster/test_rules.py breaks each rule once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.helpers.cluster_manifests import Manifest, operator_labels, pod_templates, ray_cluster_spec, ray_objects
from tests.helpers.network_policies import selects

SAFE_TO_EVICT = "cluster-autoscaler.kubernetes.io/safe-to-evict"
DO_NOT_DISRUPT = "karpenter.sh/do-not-disrupt"
ARCHITECTURE = "kubernetes.io/arch"
ZONE = "topology.kubernetes.io/zone"
SUBMITTER_BACKOFF, JOB_BACKOFF = 20, 10
FOR_KUBERAYS_SUBMITTER = {
    *("runtimeEnvYAML", "metadata", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources"),
}


def disruptions(objects: Sequence[Manifest]) -> Iterator[str]:
    """Sentences about what a drain, an upgrade, another kind of node or a lost pod would end."""
    for item in ray_objects(objects):
        if item["kind"] == "RayJob":
            yield from (f"RayJob {item['metadata']['name']}: {sentence}" for sentence in _retries(item["spec"]))
    budgets = [item for item in objects if item["kind"] == "PodDisruptionBudget"]
    sizes = _sizes(objects)
    for where, template in pod_templates(objects):
        annotations = template["metadata"].get("annotations", {})
        if "group generate" in where:
            if annotations.get(SAFE_TO_EVICT) != "true" or DO_NOT_DISRUPT in annotations:
                yield f"{where}: engines may go: {SAFE_TO_EVICT} is true, {DO_NOT_DISRUPT} is not there"
        elif where.startswith(("Ray", "StatefulSet")):
            if annotations.get(SAFE_TO_EVICT) != "false" or annotations.get(DO_NOT_DISRUPT) != "true":
                yield f"{where}: stays while it runs: {SAFE_TO_EVICT} is false, {DO_NOT_DISRUPT} is true"
            labels = operator_labels(where, template)
            least = [one["spec"].get("minAvailable", 0) for one in budgets if selects(one["spec"]["selector"], labels)]
            # Of two budgets for one pod Kubernetes makes an error of every eviction.
            if len(least) != 1 or least[0] < sizes.get(where, 1):
                yield f"{where}: a PodDisruptionBudget keeps all of them, and only one"
        if "StatefulSet" not in where and template["spec"].get("nodeSelector", {}).get(ARCHITECTURE) != "amd64":
            yield f"{where}: {ARCHITECTURE} is amd64, as the image is"
        if "group train" in where and ZONE not in _preferred_topologies(template["spec"]):
            yield f"{where}: training pods prefer one zone"


def _retries(spec: Manifest) -> Iterator[str]:
    if spec.get("submitterConfig", {}).get("backoffLimit", 0) < SUBMITTER_BACKOFF:
        yield f"submitterConfig.backoffLimit is at least {SUBMITTER_BACKOFF}: submitter pods are lost in days"
    if spec.get("backoffLimit", 0) < JOB_BACKOFF:
        yield f"backoffLimit is at least {JOB_BACKOFF}: clusters are lost in days"
    (container,) = spec["submitterPodTemplate"]["spec"]["containers"]
    if container.get("command", [])[-1:] != ["/etc/mipo-ray-submit/submit.py"]:
        yield "the submitter runs submit.py: KubeRay's own command takes the end of a log stream for the job's"
    if container.get("args") != [spec["entrypoint"]]:
        yield "the submitter's only argument is the entrypoint"
    for key in sorted(spec.keys() & FOR_KUBERAYS_SUBMITTER):
        yield f"no {key}: it reaches KubeRay's own submitter alone"


def _sizes(objects: Sequence[Manifest]) -> dict[str, int]:
    """How many pods a group may have, by the name of its template."""
    sizes = {}
    for item in ray_objects(objects):
        for group in ray_cluster_spec(item)["workerGroupSpecs"]:
            name = f"{item['kind']} {item['metadata']['name']}, group {group['groupName']}"
            sizes[name] = group.get("maxReplicas", 1)
    return sizes


def _preferred_topologies(spec: Manifest) -> list[str]:
    pods = spec.get("affinity", {}).get("podAffinity", {})
    preferred = pods.get("preferredDuringSchedulingIgnoredDuringExecution", [])
    return [term["podAffinityTerm"]["topologyKey"] for term in preferred]
