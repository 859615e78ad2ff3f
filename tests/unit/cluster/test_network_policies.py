"""What the built network policies let through and what they do not, connection by connection.

Two tables: what each component needs to do its work, and what must stay closed. Each line holds with plugins that match
an address block with a pod's address, and with those that do not.

python -m pytest tests/unit/cluster/test_network_policies.py
"""

from __future__ import annotations

import pytest

from tests.helpers.cluster_manifests import (
    ALL,
    CLOUDS,
    RAY_CLUSTERS,
    Manifest,
    build,
    operator_labels,
    pod_templates,
)
from tests.helpers.network_policies import Connection, End, allowed

NAMESPACE = "mipo-ray"
RAY_NODE = {"ray.io/is-ray-node": "yes"}
HEAD = End("10.4.0.10", NAMESPACE, {**RAY_NODE, "ray.io/node-type": "head"})
GENERATE = End("10.4.0.11", NAMESPACE, {**RAY_NODE, "app.kubernetes.io/component": "generate"})
TRAIN = End("10.4.0.12", NAMESPACE, {**RAY_NODE, "app.kubernetes.io/component": "train"})
SUBMITTER = End("10.4.0.13", NAMESPACE, {"app.kubernetes.io/component": "submitter"})
REDIS = End("10.4.0.14", NAMESPACE, {"app.kubernetes.io/name": "redis"})
CLEANUP = End("10.4.0.15", NAMESPACE, {"ray.io/node-type": "redis-cleanup"})
FILES = End("10.4.0.16", NAMESPACE, {"app.kubernetes.io/part-of": "mipo-ray"})
OPERATOR = End("10.4.1.1", "kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"})
PROMETHEUS = End("10.4.1.2", "monitoring", {"app.kubernetes.io/name": "prometheus"})
STRANGER = End("10.4.1.3", "default", {})
COREDNS = End("10.4.1.4", "kube-system", {"k8s-app": "kube-dns"})

API_SERVER = End("10.0.0.2")
HUB = End("18.155.0.1")
ROUTED_PRIVATELY = End("10.8.0.5")
METADATA = End("169.254.169.254")
METADATA_CALICO = End("169.254.169.252")
POD_IDENTITY = End("169.254.170.23")
# Where names are asked for, other than at a pod of kube-system.
NAME_SERVERS = {
    "GKE's Cloud DNS, as Autopilot has": METADATA,
    "NodeLocal DNSCache": End("169.254.20.10"),
    "the Service's address, as Calico sees it": End("10.0.0.10"),
    "the Service's address on EKS": End("172.20.0.10"),
    "the Service's address on GKE": End("34.118.224.10"),
    "a name server on the node, as EKS Auto Mode has": End("192.168.20.4"),
    "a name server on the node, secondary range": End("100.64.3.9"),
}

Line = tuple[str, End, End, int, str]


def every_pod_resolves() -> list[Line]:
    pods = {"head": HEAD, "engine": GENERATE, "training": TRAIN, "submitter": SUBMITTER, "Redis": REDIS}
    servers = {"CoreDNS": COREDNS, **NAME_SERVERS}
    return [
        (f"{pod} asks {server} for names, {protocol}", end, address, 53, protocol)
        for pod, end in pods.items()
        for server, address in servers.items()
        for protocol in ("UDP", "TCP")
    ]


NEEDED: list[Line] = [
    *every_pod_resolves(),
    ("the autoscaler patches its RayCluster", HEAD, API_SERVER, 443, "TCP"),
    ("the same where the API server has its own port", HEAD, API_SERVER, 6443, "TCP"),
    ("a worker joins: GCS", GENERATE, HEAD, 6379, "TCP"),
    ("the head calls a raylet on a port that it chose", HEAD, TRAIN, 38217, "TCP"),
    ("objects move between workers", GENERATE, TRAIN, 41003, "TCP"),
    ("gradients move between workers", TRAIN, End("10.4.0.17", NAMESPACE, TRAIN.labels), 29400, "TCP"),
    ("the submitter submits and follows", SUBMITTER, HEAD, 8265, "TCP"),
    ("KubeRay asks for the job's status", OPERATOR, HEAD, 8265, "TCP"),
    ("Prometheus scrapes an engine's node", PROMETHEUS, GENERATE, 8080, "TCP"),
    ("Prometheus scrapes the autoscaler", PROMETHEUS, HEAD, 44217, "TCP"),
    ("Prometheus scrapes the dashboard", PROMETHEUS, HEAD, 44227, "TCP"),
]
NEEDED_WITH_REDIS: list[Line] = [
    ("the head keeps its state", HEAD, REDIS, 6379, "TCP"),
    ("KubeRay's job empties Redis after a deleted cluster", CLEANUP, REDIS, 6379, "TCP"),
]
NEEDED_WITH_INTERNET: list[Line] = [
    (f"{name} reaches the hub and object stores", end, HUB, 443, "TCP")
    for name, end in {"the head": HEAD, "an engine": GENERATE, "training": TRAIN}.items()
]
NEEDED_ON = {
    "overlays/gke": [
        ("Workload Identity on Dataplane V2", TRAIN, METADATA, 80, "TCP"),
        ("the same, its other port", HEAD, METADATA, 8080, "TCP"),
        ("Workload Identity with Calico", TRAIN, METADATA_CALICO, 988, "TCP"),
        ("the same, its other port", HEAD, METADATA_CALICO, 987, "TCP"),
    ],
    "overlays/eks": [("Pod Identity", TRAIN, POD_IDENTITY, 80, "TCP"), ("the same", HEAD, POD_IDENTITY, 80, "TCP")],
}

CLOSED: list[Line] = [
    ("another namespace runs code", STRANGER, HEAD, 8265, "TCP"),
    ("another namespace joins the cluster", STRANGER, HEAD, 6379, "TCP"),
    ("another namespace calls a worker", STRANGER, GENERATE, 41003, "TCP"),
    ("Ray's client port", STRANGER, HEAD, 10001, "TCP"),
    ("Prometheus runs code", PROMETHEUS, HEAD, 8265, "TCP"),
    ("KubeRay reads what workers say to each other", OPERATOR, TRAIN, 41003, "TCP"),
    ("the submitter reaches workers", SUBMITTER, GENERATE, 41003, "TCP"),
    ("the submitter reaches GCS", SUBMITTER, HEAD, 6379, "TCP"),
    ("the submitter reaches the Kubernetes API", SUBMITTER, API_SERVER, 443, "TCP"),
    ("the submitter reaches the internet", SUBMITTER, HUB, 443, "TCP"),
    ("an engine reaches the Kubernetes API", GENERATE, API_SERVER, 443, "TCP"),
    ("an engine reaches another namespace", GENERATE, STRANGER, 80, "TCP"),
    ("an engine reaches private addresses", GENERATE, ROUTED_PRIVATELY, 22, "TCP"),
    ("an engine reaches another namespace's Service on GKE", GENERATE, End("34.118.230.7"), 443, "TCP"),
    ("an engine asks a public name server, which carries data away", GENERATE, HUB, 53, "UDP"),
    ("an engine reaches the internet without TLS", GENERATE, HUB, 80, "TCP"),
    ("an engine reaches what is link-local by HTTPS", GENERATE, METADATA, 443, "TCP"),
    ("the submitter gets an identity", SUBMITTER, METADATA, 80, "TCP"),
    ("the submitter gets one of EKS", SUBMITTER, POD_IDENTITY, 80, "TCP"),
    ("the pod for files reaches the internet", FILES, HUB, 443, "TCP"),
    ("the pod for files reaches the head", FILES, HEAD, 8265, "TCP"),
]
CLOSED_WITH_REDIS: list[Line] = [
    ("a worker reads the cluster's state", GENERATE, REDIS, 6379, "TCP"),
    ("another namespace reads it", STRANGER, REDIS, 6379, "TCP"),
    ("Redis reaches the internet", REDIS, HUB, 443, "TCP"),
]
# Wherever the line is not needed.
CLOSED_ELSEWHERE = {
    "overlays/gke": [("a node's identity", GENERATE, METADATA, 80, "TCP"), ("", TRAIN, METADATA_CALICO, 988, "TCP")],
    "overlays/eks": [("a pod's identity on EKS", GENERATE, POD_IDENTITY, 80, "TCP")],
}


def violations(objects: list[Manifest], needed: list[Line], closed: list[Line]) -> list[str]:
    """What is needed and blocked, or to be closed and open, with either kind of plugin."""
    found = []
    for wanted, lines in ((True, needed), (False, closed)):
        for name, source, destination, port, protocol in lines:
            for by_address in (True, False):
                if allowed(objects, Connection(source, destination, port, protocol), by_address) != wanted:
                    found.append(f"{'blocked' if wanted else 'open'}: {name} ({destination.address}:{port})")
                    break
    return found


def lines(overlay: str) -> tuple[list[Line], list[Line]]:
    """What an overlay needs and what it keeps closed."""
    needed, closed = NEEDED + NEEDED_ON.get(overlay, []), list(CLOSED)
    if overlay in RAY_CLUSTERS:
        needed, closed = needed + NEEDED_WITH_REDIS, closed + CLOSED_WITH_REDIS
    if "cpu-demo" not in overlay:
        needed = needed + NEEDED_WITH_INTERNET
    else:
        closed += [(f"not: {name}", *rest) for name, *rest in NEEDED_WITH_INTERNET if rest[0] is not HEAD]
    for cloud in CLOUDS:
        closed += [] if overlay == cloud else CLOSED_ELSEWHERE[cloud]
    return needed, closed


@pytest.mark.parametrize("overlay", ALL)
def test_what_is_needed_is_open_and_the_rest_is_closed(overlay: str) -> None:
    assert violations(build(overlay), *lines(overlay)) == []


@pytest.mark.parametrize("overlay", ALL)
def test_the_table_has_the_labels_that_pods_have(overlay: str) -> None:
    """A pod of the table that no pod resembles would pass for nothing."""
    ends = {"head": HEAD, "generate": GENERATE, "train": TRAIN, "submitter": SUBMITTER, "mipo-redis": REDIS}
    for where, template in pod_templates(build(overlay)):
        end = ends[where.rsplit(" ", 1)[-1].removesuffix("-on-demand")]
        assert end.labels.items() <= operator_labels(where, template).items(), where


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ("dns", "blocked: head asks CoreDNS for names, UDP"),
        ("ray-nodes", "blocked: objects move between workers"),
        ("ray-dashboard", "blocked: KubeRay asks for the job's status"),
        ("metrics", "blocked: Prometheus scrapes the autoscaler"),
        ("kubernetes-api", "blocked: the autoscaler patches its RayCluster"),
        ("submitter", "blocked: the submitter submits and follows"),
        ("internet", "blocked: an engine reaches the hub and object stores"),
        ("identity", "blocked: Workload Identity on Dataplane V2"),
        ("deny-all", "open: another namespace runs code"),
    ],
)
def test_every_policy_is_missed(policy: str, sentence: str) -> None:
    """Without it the tables notice; `deny-all` closes what the others do not select."""
    objects = [item for item in build("overlays/gke") if item["metadata"]["name"] != policy]
    if policy == "deny-all":
        objects = [item for item in objects if item["metadata"]["name"] != "ray-dashboard"]
        objects = [item for item in objects if item["metadata"]["name"] not in ("ray-nodes", "metrics")]
    assert [found for found in violations(objects, *lines("overlays/gke")) if found.startswith(sentence)]


@pytest.mark.parametrize("server", NAME_SERVERS)
def test_a_name_server_that_is_left_out_is_noticed(server: str) -> None:
    """As it was on GKE Autopilot, where no pod could resolve a name."""
    objects = build("overlays/cpu-demo")
    address = NAME_SERVERS[server].address
    for item in objects:
        if item["metadata"]["name"] == "dns":
            (rule,) = item["spec"]["egress"]
            blocks = [peer for peer in rule["to"] if "ipBlock" in peer]
            first = address.split(".")[0]
            rule["to"] = [
                peer for peer in rule["to"] if peer not in blocks or not peer["ipBlock"]["cidr"].startswith(first)
            ]
    assert [found for found in violations(objects, *lines("overlays/cpu-demo")) if address in found]


def test_a_hole_is_noticed() -> None:
    objects = build("overlays/eks")
    for item in objects:
        if item["metadata"]["name"] == "internet":
            item["spec"]["egress"][0]["to"][0]["ipBlock"]["except"].remove("10.0.0.0/8")
            item["spec"]["egress"][0].pop("ports")
    found = violations(objects, *lines("overlays/eks"))
    assert "open: an engine reaches private addresses (10.8.0.5:22)" in found
    assert "open: an engine asks a public name server, which carries data away (18.155.0.1:53)" in found
