"""Each rule of tests/helpers/cluster_rules.py notices its mistake, made in the real manifests.

python -m pytest tests/unit/cluster/test_rules.py
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.cluster_manifests import ALL, Manifest, build, only, ray_cluster_spec
from tests.helpers.cluster_rules import broken_rules

RAY_VERSION = importlib.metadata.version("ray")


@pytest.mark.parametrize("overlay", ALL)
def test_the_manifests_keep_every_rule(overlay: str) -> None:
    assert broken_rules(build(overlay), RAY_VERSION) == []


def _spec(objects: list[Manifest]) -> Manifest:
    return ray_cluster_spec(only(objects, "RayJob"))


def _head(objects: list[Manifest]) -> Manifest:
    return _spec(objects)["headGroupSpec"]["template"]["spec"]


def _group(objects: list[Manifest]) -> Manifest:
    return _spec(objects)["workerGroupSpecs"][0]


def _worker(objects: list[Manifest]) -> Manifest:
    return _group(objects)["template"]["spec"]["containers"][0]


def _head_security(objects: list[Manifest]) -> Manifest:
    return _head(objects)["securityContext"]


def _worker_security(objects: list[Manifest]) -> Manifest:
    return _worker(objects)["securityContext"]


def _job_metadata(objects: list[Manifest]) -> Manifest:
    return only(objects, "RayJob")["metadata"]


def _job(objects: list[Manifest]) -> Manifest:
    return only(objects, "RayJob")["spec"]


def _submitter(objects: list[Manifest]) -> Manifest:
    return _job(objects)["submitterPodTemplate"]["spec"]["containers"][0]


def _metadata(group: int) -> Callable[[list[Manifest]], Manifest]:
    return lambda objects: _spec(objects)["workerGroupSpecs"][group]["template"]["metadata"]


def _budget(name: str) -> Callable[[list[Manifest]], Manifest]:
    return lambda objects: only(objects, "PodDisruptionBudget", name)["spec"]


def _train(objects: list[Manifest]) -> Manifest:
    return _spec(objects)["workerGroupSpecs"][1]["template"]["spec"]


def _set(find: Callable[[list[Manifest]], Manifest], **values: Any) -> Callable[[list[Manifest]], None]:
    """A mistake: these fields of what `find` finds are changed, or removed where the value is None."""

    def mistake(objects: list[Manifest]) -> None:
        found = find(objects)
        for key, value in values.items():
            if value is None:
                del found[key]
            else:
                found[key] = value

    return mistake


def _start(**parameters: str) -> Callable[[list[Manifest]], None]:
    return lambda objects: _group(objects)["rayStartParams"].update(parameters)


def _add_environment(find: Callable[[list[Manifest]], Manifest], name: str) -> Callable[[list[Manifest]], None]:
    return lambda objects: find(objects)["containers"][0]["env"].append({"name": name, "value": "1"})


def _policies(objects: list[Manifest]) -> None:
    objects[:] = [item for item in objects if item["metadata"]["name"] != "deny-all"]


def _open_policy(objects: list[Manifest]) -> None:
    only(objects, "NetworkPolicy", "submitter")["spec"]["egress"].append({})


def _mount(path: str) -> Callable[[list[Manifest]], Manifest]:
    return lambda objects: next(mount for mount in _worker(objects)["volumeMounts"] if mount["mountPath"] == path)


def _disk_for_shared_memory(objects: list[Manifest]) -> None:
    (volume,) = (v for v in _group(objects)["template"]["spec"]["volumes"] if v["name"] == "shared-memory")
    volume["emptyDir"] = {}


def _no_size_limit(objects: list[Manifest]) -> None:
    (volume,) = (v for v in _group(objects)["template"]["spec"]["volumes"] if v["name"] == "home")
    volume["emptyDir"] = {}


NO_AUTOSCALER = _set(_spec, enableInTreeAutoscaling=False)
MISTAKES: dict[str, tuple[str, Callable[[list[Manifest]], None]]] = {
    "name too long": (
        "a name has at most 47",
        lambda objects: only(objects, "RayJob")["metadata"].update(name="m" * 48),
    ),
    "other Ray": ("rayVersion is the locked one", _set(_spec, rayVersion="2.59.0")),
    "no Ray version": ("rayVersion is the locked one", _set(_spec, rayVersion=None)),
    "no authentication": (
        "authOptions.mode is token",
        _set(_spec, authOptions={"mode": "disabled", "secretName": "x"}),
    ),
    "no token secret": ("authOptions.secretName", _set(_spec, authOptions={"mode": "token"})),
    "Redis for a job": (
        "no gcsFaultToleranceOptions",
        _set(_spec, gcsFaultToleranceOptions={"redisAddress": "r:6379"}),
    ),
    "tasks on the head": (
        'the head has num-cpus "0"',
        lambda objects: _spec(objects)["headGroupSpec"]["rayStartParams"].pop("num-cpus"),
    ),
    "operator's variable": ("the operator sets RAY_REDIS_ADDRESS", _add_environment(_head, "RAY_REDIS_ADDRESS")),
    "labels in rayStartParams": ("labels stand in the group's own field", _start(labels="mipo.io/role=generate")),
    "resources twice": ("resources stand in one place", _set(_group, resources={"CPU": "4"})),
    "restarted pods": (
        "restartPolicy of Ray pods",
        lambda objects: _group(objects)["template"]["spec"].update(restartPolicy="Always"),
    ),
    "autoscaler v1": ("autoscalerOptions.version is v2", lambda o: _spec(o)["autoscalerOptions"].update(version="v1")),
    "no idle timeout": (
        "autoscalerOptions.idleTimeoutSeconds",
        lambda objects: _spec(objects)["autoscalerOptions"].pop("idleTimeoutSeconds"),
    ),
    "no role": ("has a label mipo.io/role", _set(_group, labels=None)),
    "same role twice": (
        "groups with the same mipo.io/role differ in priority",
        _set(_group, labels={"mipo.io/role": "train"}, priority=0),
    ),
    "no maximum": ("maxReplicas are all written", _set(_group, maxReplicas=None)),
    "minimum above maximum": ("minReplicas <= replicas <= maxReplicas", _set(_group, minReplicas=9, replicas=9)),
    "never down to zero": ("starts from zero", _set(_group, minReplicas=1, replicas=1)),
    "half a gang": ("without an autoscaler minReplicas is maxReplicas", NO_AUTOSCALER),
    "no group idle timeout": ("group generate: idleTimeoutSeconds is set", _set(_group, idleTimeoutSeconds=None)),
    "idle timeout without autoscaler": ("idleTimeoutSeconds and priority need autoscaler v2", NO_AUTOSCALER),
    "no scale strategy": ("scaleStrategy.workersToDelete", _set(_group, scaleStrategy=None)),
    "sidecar": ("submissionMode is K8sJobMode", _set(_job, submissionMode="SidecarMode")),
    "misspelt mode": ("submissionMode is K8sJobMode", _set(_job, submissionMode="K8sJob")),
    "other program": ("the entrypoint runs mipo_ray.run", _set(_job, entrypoint="python train.py")),
    "cluster stays": ("tears its cluster down", _set(_job, shutdownAfterJobFinishes=False)),
    "time to live without shutdown": ("ttlSecondsAfterFinished needs", _set(_job, shutdownAfterJobFinishes=None)),
    "two ways to delete": (
        "deletionRules exclude",
        _set(
            _job, deletionStrategy={"deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}]}
        ),
    ),
    "no deadline": ("activeDeadlineSeconds is a positive", _set(_job, activeDeadlineSeconds=None)),
    "negative retries": ("backoffLimit is not negative", _set(_job, backoffLimit=-1)),
    "suspended without shutdown": (
        "a suspended job needs",
        _set(_job, suspend=True, shutdownAfterJobFinishes=False),
    ),
    "suspended without queue": ("starts suspended, and only such a job", _set(_job, suspend=True)),
    "queued with autoscaler": (
        "Kueue admits a fixed number of pods",
        lambda objects: _job_metadata(objects)["labels"].update({"kueue.x-k8s.io/queue-name": "mipo-queue"}),
    ),
    "root": ("pods do not run as root", _set(_head_security, runAsNonRoot=False)),
    "root by number": (
        "pods do not run as root",
        lambda objects: _head(objects)["securityContext"].update(runAsUser=0),
    ),
    "no seccomp": ("seccompProfile", _set(_head_security, seccompProfile=None)),
    "no grace period": ("terminationGracePeriodSeconds", _set(_head, terminationGracePeriodSeconds=None)),
    "host network": ("no hostNetwork", _set(_head, hostNetwork=True)),
    "host path": ("no hostPath", lambda o: _head(o)["volumes"].append({"name": "disk", "hostPath": {"path": "/"}})),
    "escalation": (
        "allowPrivilegeEscalation is false",
        _set(_worker_security, allowPrivilegeEscalation=True),
    ),
    "privileged": (
        "allowPrivilegeEscalation is false",
        lambda objects: _worker(objects)["securityContext"].update(privileged=True),
    ),
    "writable root": (
        "the root file system is read-only",
        _set(_worker_security, readOnlyRootFilesystem=False),
    ),
    "capabilities": (
        "every capability is dropped",
        lambda objects: _worker(objects)["securityContext"].update(
            capabilities={"drop": ["ALL"], "add": ["SYS_ADMIN"]}
        ),
    ),
    "latest": ("the image has a fixed tag", _set(_worker, image="registry.example.com:5000/mipo-ray:latest")),
    "no tag": ("the image has a fixed tag", _set(_worker, image="registry.example.com:5000/mipo-ray")),
    "no limits": (
        "requests and limits are given and equal",
        _set(_worker, resources={"requests": {"cpu": "2"}}),
    ),
    "burst": (
        "requests and limits are given and equal",
        lambda objects: _worker(objects)["resources"]["requests"].update(cpu="1"),
    ),
    "disk without end": (
        "how much of the node's disk",
        lambda objects: _worker(objects)["resources"]["limits"].pop("ephemeral-storage"),
    ),
    "more disk asked for than allowed": (
        "no more of the node's disk is requested",
        lambda objects: _worker(objects)["resources"]["requests"].update({"ephemeral-storage": "9Ti"}),
    ),
    "directory without end": ("volume home: an emptyDir has a sizeLimit", _no_size_limit),
    "directories beyond the limit": (
        "fit into the limit of ephemeral-storage",
        lambda objects: _worker(objects)["resources"]["limits"].update({"ephemeral-storage": "7Gi"}),
    ),
    "own probe": ("livenessProbe is the operator's", _set(_worker, livenessProbe={"exec": {"command": ["true"]}})),
    "nowhere to write": (
        "a volume is mounted at /tmp",
        _set(_mount("/tmp"), mountPath="/var"),
    ),
    "shared memory on disk": ("/dev/shm is an emptyDir in memory", _disk_for_shared_memory),
    "mount without volume": (
        "mounts name volumes",
        _set(_mount("/mnt/mipo-runs"), name="run"),
    ),
    "other namespace": (
        "is in the namespace mipo-ray",
        lambda objects: only(objects, "RayJob")["metadata"].update(namespace="default"),
    ),
    "no recipe": (
        "ConfigMap mipo-recipe is among the objects",
        lambda objects: objects.remove(only(objects, "ConfigMap", "mipo-recipe")),
    ),
    "no claim": (
        "PersistentVolumeClaim mipo-runs is among the objects",
        lambda objects: objects.remove(only(objects, "PersistentVolumeClaim", "mipo-runs")),
    ),
    "committed secret": (
        "secrets are made by hand",
        lambda objects: objects.append({"kind": "Secret", "apiVersion": "v1", "metadata": {"name": "mipo-redis"}}),
    ),
    "token in the environment": ("HF_TOKEN2 comes from a Secret", _add_environment(_head, "HF_TOKEN2")),
    "few submitters": ("submitterConfig.backoffLimit is at least 20", _set(_job, submitterConfig={"backoffLimit": 2})),
    "few clusters": ("backoffLimit is at least 10", _set(_job, backoffLimit=3)),
    "KubeRay's submitter": ("the submitter runs submit.py", _set(_submitter, command=None)),
    "an environment that nobody passes on": (
        "no runtimeEnvYAML",
        _set(_job, runtimeEnvYAML="working_dir: s3://b/c.zip"),
    ),
    "another entrypoint": ("only argument is the entrypoint", _set(_submitter, args=["python -m mipo_ray.run x.yaml"])),
    "engine that stays": (
        "engines may go",
        _set(_metadata(0), annotations={"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}),
    ),
    "training that goes": ("group train: stays while it runs", _set(_metadata(1), annotations={})),
    "head without a budget": ("head: a PodDisruptionBudget keeps all", _set(_budget("head"), minAvailable=0)),
    "two budgets": ("head: a PodDisruptionBudget keeps all", _set(_budget("submitter"), selector={})),
    "a budget for fewer": ("group train: a PodDisruptionBudget keeps all", _set(_budget("train"), minAvailable=0)),
    "submitter without a budget": (
        "submitter: a PodDisruptionBudget keeps all",
        _set(_budget("submitter"), selector={"matchLabels": {"app": "submitter"}}),
    ),
    "any architecture": ("kubernetes.io/arch is amd64", _set(_head, nodeSelector={})),
    "training anywhere": ("training pods prefer one zone", _set(_train, affinity={})),
    "open network": ("closes every pod in both directions", _policies),
    "rule for everything": ("no rule opens everything", _open_policy),
}


def _fault_tolerance(objects: list[Manifest]) -> Manifest:
    return only(objects, "RayCluster")["spec"]["gcsFaultToleranceOptions"]


# Of a cluster that stays, which alone has Redis.
LONG_LIVED_MISTAKES: dict[str, tuple[str, Callable[[list[Manifest]], None]]] = {
    "no Redis": ("redisAddress is set", _set(_fault_tolerance, redisAddress=None)),
    "Redis password in clear": (
        "the Redis password comes from a Secret",
        _set(_fault_tolerance, redisPassword={"value": "hunter2"}),
    ),
    "Redis that goes": (
        "StatefulSet mipo-redis: stays while it runs",
        lambda objects: only(objects, "StatefulSet")["spec"]["template"]["metadata"].pop("annotations"),
    ),
    "Redis without a budget": (
        "StatefulSet mipo-redis: a PodDisruptionBudget keeps all",
        lambda objects: objects.remove(only(objects, "PodDisruptionBudget", "mipo-redis")),
    ),
}


@pytest.mark.parametrize("mistake", LONG_LIVED_MISTAKES)
def test_a_mistake_in_a_cluster_that_stays_is_noticed(mistake: str) -> None:
    sentence, make = LONG_LIVED_MISTAKES[mistake]
    objects = build("long-lived/cpu-demo")

    make(objects)

    assert [rule for rule in broken_rules(objects, RAY_VERSION) if sentence in rule]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake: str) -> None:
    sentence, make = MISTAKES[mistake]
    objects = build("overlays/cpu-demo")

    make(objects)

    assert [rule for rule in broken_rules(objects, RAY_VERSION) if sentence in rule]
