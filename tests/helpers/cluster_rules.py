"""What the manifests in cluster/ must keep to and no schema says: what the KubeRay operator checks, and what we want.

`broken_rules` is pure: objects in, sentences out. tests/unit/cluster/test_rules.py breaks each rule once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tests.helpers.cluster_manifests import Manifest, pod_templates, ray_cluster_spec, ray_objects
from tests.helpers.disruption_rules import disruptions

ROLE = "mipo.io/role"
ROLES = {"generate", "train"}
WRITABLE = {"/tmp", "/tmp/ray", "/home/mipo", "/dev/shm"}
# KubeRay appends to these names what makes a service's name of at most 63 characters.
LONGEST_NAME = {"RayJob": 47, "RayCluster": 63 - 10}


def broken_rules(objects: Sequence[Manifest], ray_version: str) -> list[str]:
    """One sentence for each rule that the objects of one overlay break, with the place; none: all is well."""
    broken = [*_namespace(objects), *_references(objects), *_secrets(objects), *_network(objects)]
    broken += disruptions(objects)
    for item in ray_objects(objects):
        where = f"{item['kind']} {item['metadata']['name']}"
        checks = [*_cluster(ray_cluster_spec(item), ray_version), *_name(item)]
        checks += [*_job(item), *_queue(item)] if item["kind"] == "RayJob" else [*_fault_tolerance(item["spec"])]
        broken += [f"{where}: {sentence}" for sentence in checks]
    for where, template in pod_templates(objects):
        broken += [f"{where}: {sentence}" for sentence in _pod(template["spec"])]
    for where, template in pod_templates(ray_objects(objects)):
        checks = [*_ray_pod(template["spec"])] if "submitter" not in where else []
        broken += [f"{where}: {sentence}" for sentence in checks]
    return broken


def _name(item: Manifest) -> Iterator[str]:
    if len(item["metadata"]["name"]) > LONGEST_NAME[item["kind"]]:
        yield f"a name has at most {LONGEST_NAME[item['kind']]} characters"


def _cluster(spec: Manifest, ray_version: str) -> Iterator[str]:
    """Ray's own settings: what the operator refuses, or what would start and then not work."""
    if spec.get("rayVersion") != ray_version:
        yield f"rayVersion is the locked one, {ray_version}"
    if spec.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode is token: without it anyone who reaches the dashboard runs code"
    if not spec.get("authOptions", {}).get("secretName"):
        yield "authOptions.secretName names the token's Secret"
    head = spec["headGroupSpec"]
    if head["rayStartParams"].get("num-cpus") != "0":
        yield 'the head has num-cpus "0"'
    names = {variable["name"] for variable in head["template"]["spec"]["containers"][0].get("env", [])}
    for name in sorted(names & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "RAY_enable_autoscaler_v2"}):
        yield f"the operator sets {name} itself"
    for group in [head, *spec["workerGroupSpecs"]]:
        if "labels" in group["rayStartParams"]:
            yield "labels stand in the group's own field, not in rayStartParams"
        if group.get("resources") and group["rayStartParams"].keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
            yield "resources stand in one place: rayStartParams or the group's resources"
        if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield "restartPolicy of Ray pods is Never or unset: autoscaler v2 replaces pods"
    yield from _groups(spec)


def _fault_tolerance(spec: Manifest) -> Iterator[str]:
    """GCS fault tolerance of a cluster that stays."""
    options = spec.get("gcsFaultToleranceOptions", {})
    if not options.get("redisAddress"):
        yield "gcsFaultToleranceOptions.redisAddress is set"
    if "secretKeyRef" not in options.get("redisPassword", {}).get("valueFrom", {}):
        yield "the Redis password comes from a Secret"


def _groups(spec: Manifest) -> Iterator[str]:
    """Autoscaling: either autoscaler v2 with all that it needs, or groups of fixed size."""
    autoscaling = spec.get("enableInTreeAutoscaling", False)
    options = spec.get("autoscalerOptions", {})
    if autoscaling and options.get("version") != "v2":
        yield "autoscalerOptions.version is v2"
    if autoscaling and "idleTimeoutSeconds" not in options:
        yield "autoscalerOptions.idleTimeoutSeconds is set"
    roles = [(group.get("labels", {}).get(ROLE), group.get("priority", 0)) for group in spec["workerGroupSpecs"]]
    if not {role for role, _ in roles} <= ROLES:
        yield f"every group has a label {ROLE}, one of {sorted(ROLES)}"
    if len(roles) != len(set(roles)):
        yield f"groups with the same {ROLE} differ in priority: the lower one is for when the higher has no nodes"
    for group in spec["workerGroupSpecs"]:
        name = group["groupName"]
        least, now, most = (group.get(key) for key in ("minReplicas", "replicas", "maxReplicas"))
        if least is None or now is None or most is None:
            yield f"group {name}: minReplicas, replicas and maxReplicas are all written"
        elif not least <= now <= most:
            yield f"group {name}: minReplicas <= replicas <= maxReplicas"
        elif autoscaling and least != 0:
            yield f"group {name}: an autoscaled group starts from zero"
        elif not autoscaling and least != most:
            yield f"group {name}: without an autoscaler minReplicas is maxReplicas"
        if autoscaling and "idleTimeoutSeconds" not in group:
            yield f"group {name}: idleTimeoutSeconds is set"
        if not autoscaling and ("idleTimeoutSeconds" in group or group.get("priority")):
            yield f"group {name}: idleTimeoutSeconds and priority need autoscaler v2"
        if autoscaling and group.get("scaleStrategy", {}).get("workersToDelete") != []:
            yield f"group {name}: scaleStrategy.workersToDelete is there, or the autoscaler cannot scale down"


def _job(item: Manifest) -> Iterator[str]:
    """The RayJob's own settings, most of which no schema and no API server checks."""
    spec = item["spec"]
    if "gcsFaultToleranceOptions" in spec["rayClusterSpec"]:
        yield "no gcsFaultToleranceOptions: the driver dies with the head, and Redis could only be lost as well"
    if spec.get("submissionMode") != "K8sJobMode":
        yield "submissionMode is K8sJobMode"
    if "python -m mipo_ray.run" not in spec.get("entrypoint", ""):
        yield "the entrypoint runs mipo_ray.run"
    ends_cluster = spec.get("shutdownAfterJobFinishes", False)
    if not ends_cluster and "deletionStrategy" not in spec:
        yield "the job tears its cluster down"
    if spec.get("ttlSecondsAfterFinished") and not ends_cluster:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if "deletionRules" in spec.get("deletionStrategy", {}) and (ends_cluster or spec.get("ttlSecondsAfterFinished")):
        yield "deletionRules exclude shutdownAfterJobFinishes and ttlSecondsAfterFinished"
    if not spec.get("activeDeadlineSeconds", 0) > 0:
        yield "activeDeadlineSeconds is a positive number"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit is not negative"
    if spec.get("suspend") and not ends_cluster:
        yield "a suspended job needs shutdownAfterJobFinishes"


def _queue(item: Manifest) -> Iterator[str]:
    """Gang scheduling by Kueue."""
    queued = "kueue.x-k8s.io/queue-name" in item["metadata"].get("labels", {})
    if queued != bool(item["spec"].get("suspend")):
        yield "a job in a Kueue queue starts suspended, and only such a job"
    if queued and item["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling"):
        yield "Kueue admits a fixed number of pods: no autoscaler"


def _pod(spec: Manifest) -> Iterator[str]:
    """Security and resources of any pod."""
    security = spec.get("securityContext", {})
    if not security.get("runAsNonRoot") or not security.get("runAsUser"):
        yield "pods do not run as root (runAsNonRoot, runAsUser)"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "seccompProfile is RuntimeDefault"
    if "terminationGracePeriodSeconds" not in spec:
        yield "terminationGracePeriodSeconds is written"
    for forbidden in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(forbidden):
            yield f"no {forbidden}"
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    for name, volume in volumes.items():
        if "hostPath" in volume:
            yield f"volume {name}: no hostPath"
    yield from _disk(spec)
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        yield from (f"container {container['name']}: {sentence}" for sentence in _container(container))


def _container(container: Manifest) -> Iterator[str]:
    security = container.get("securityContext", {})
    if security.get("privileged") or security.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is false"
    if not security.get("readOnlyRootFilesystem"):
        yield "the root file system is read-only"
    if security.get("capabilities", {}).get("drop") != ["ALL"] or security["capabilities"].get("add"):
        yield "every capability is dropped"
    tag = container["image"].rsplit("/", 1)[-1].partition("@")[0].partition(":")[2]
    if "@sha256:" not in container["image"] and tag in ("", "latest"):
        yield f"the image has a fixed tag or a digest: {container['image']}"
    resources = container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    if not {"cpu", "memory"} <= limits.keys() or _but_disk(requests) != _but_disk(limits):
        yield "requests and limits are given and equal"
    if not {"ephemeral-storage"} <= requests.keys() & limits.keys():
        yield "requests and limits say how much of the node's disk"
    elif quantity(requests["ephemeral-storage"]) > quantity(limits["ephemeral-storage"]):
        yield "no more of the node's disk is requested than allowed"
    for probe in ("livenessProbe", "readinessProbe"):
        if container["name"].startswith("ray-") and probe in container:
            yield f"{probe} is the operator's to set"


def _but_disk(amounts: Manifest) -> Manifest:
    """Of a node's disk a pod may be allowed more than it asks for: it is taken for a short time, if ever."""
    return {kind: amount for kind, amount in amounts.items() if kind != "ephemeral-storage"}


def _disk(spec: Manifest) -> Iterator[str]:
    """A pod that fills its node's disk takes others with it: each directory has an end, and the limit holds all."""
    sizes = []
    for volume in spec.get("volumes", []):
        if "emptyDir" in volume and volume["emptyDir"].get("medium") != "Memory":
            if "sizeLimit" not in volume["emptyDir"]:
                yield f"volume {volume['name']}: an emptyDir has a sizeLimit"
            else:
                sizes.append(quantity(volume["emptyDir"]["sizeLimit"]))
    limits = [container.get("resources", {}).get("limits", {}) for container in spec["containers"]]
    if sum(sizes) > sum(quantity(limit.get("ephemeral-storage", "0")) for limit in limits):
        yield "the emptyDirs together fit into the limit of ephemeral-storage"


def quantity(text: str) -> float:
    """A Kubernetes quantity of bytes: 8Gi, 512Mi, 1000."""
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    number, unit = (text[:-2], text[-2:]) if text[-2:] in units else (text, "")
    return float(number) * units.get(unit, 1)


def _ray_pod(spec: Manifest) -> Iterator[str]:
    """Places to write: Ray, vLLM and Triton write to these, and the root file system is read-only."""
    container = spec["containers"][0]
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    if missing := WRITABLE - mounted.keys():
        yield f"a volume is mounted at {', '.join(sorted(missing))}"
    volumes: dict[str, dict[str, Any]] = {volume["name"]: volume for volume in spec["volumes"]}
    shared = volumes.get(mounted.get("/dev/shm", ""), {}).get("emptyDir", {})
    if shared.get("medium") != "Memory" or "sizeLimit" not in shared:
        yield "/dev/shm is an emptyDir in memory with a sizeLimit"
    if unknown := set(mounted.values()) - volumes.keys():
        yield f"mounts name volumes that there are: {', '.join(sorted(unknown))}"


def _namespace(objects: Sequence[Manifest]) -> Iterator[str]:
    (namespace,) = (item["metadata"]["name"] for item in objects if item["kind"] == "Namespace")
    for item in objects:
        if item["kind"] != "Namespace" and item["metadata"].get("namespace") != namespace:
            yield f"{item['kind']} {item['metadata']['name']}: is in the namespace {namespace}"


def _references(objects: Sequence[Manifest]) -> Iterator[str]:
    """ConfigMaps and claims that pods name are among the objects."""
    there = {(item["kind"], item["metadata"]["name"]) for item in objects}
    for where, template in pod_templates(objects):
        named = set()
        for volume in template["spec"].get("volumes", []):
            if "configMap" in volume:
                named.add(("ConfigMap", volume["configMap"]["name"]))
            if "persistentVolumeClaim" in volume:
                named.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
        for container in template["spec"]["containers"]:
            named |= {("ConfigMap", source["configMapRef"]["name"]) for source in container.get("envFrom", [])}
        for kind, name in sorted(named - there):
            yield f"{where}: {kind} {name} is among the objects"


def _secrets(objects: Sequence[Manifest]) -> Iterator[str]:
    """No secret is committed, nor written into an environment."""
    for item in objects:
        if item["kind"] == "Secret":
            yield f"Secret {item['metadata']['name']}: secrets are made by hand, not committed"
    for where, template in pod_templates(objects):
        for container in template["spec"]["containers"]:
            for variable in container.get("env", []):
                if "value" in variable and any(word in variable["name"] for word in ("PASSWORD", "TOKEN", "SECRET")):
                    yield f"{where}: {variable['name']} comes from a Secret"


def _network(objects: Sequence[Manifest]) -> Iterator[str]:
    """Everything is closed first; what is opened names a port or a peer."""
    policies = {item["metadata"]["name"]: item["spec"] for item in objects if item["kind"] == "NetworkPolicy"}
    closed = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    if closed not in policies.values():
        yield "a NetworkPolicy closes every pod in both directions"
    for name, spec in policies.items():
        for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
            if not rule:
                yield f"NetworkPolicy {name}: no rule opens everything"
