"""Answers whether network policies let one end of a connection reach another, as a cluster's network plugin would.

Policies add up. A pod that a policy selects for a direction may do in that direction only what some policy's rule
allows; one that none selects may do everything. A connection needs both ends: the sender's egress and the receiver's
ingress.

Plugins differ in one point: whether an address block matches the address of a pod. Calico's does; Cilium's, which is
GKE's Dataplane V2, does not. `by_address` says it; what a component needs must work with both, what is closed must be
closed with both.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tests.helpers.cluster_manifests import Manifest


@dataclass(frozen=True)
class End:
    """One end of a connection: a pod (namespace and labels), or with no namespace something outside the pod network."""

    address: str
    namespace: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Connection:
    """Who wants to reach whom, on which port."""

    source: End
    destination: End
    port: int
    protocol: str = "TCP"


def allowed(objects: Sequence[Manifest], connection: Connection, by_address: bool) -> bool:
    """Whether the NetworkPolicies among the objects let the connection through."""
    policies = [item for item in objects if item["kind"] == "NetworkPolicy"]
    source, destination = connection.source, connection.destination
    return _direction(policies, "egress", (source, destination), connection, by_address) and _direction(
        policies, "ingress", (destination, source), connection, by_address
    )


def _direction(
    policies: Sequence[Manifest], direction: str, ends: tuple[End, End], connection: Connection, by_address: bool
) -> bool:
    """Whether the policies that select the first end allow the second one in this direction."""
    subject, other = ends
    chosen = [policy for policy in policies if _applies(policy, direction, subject)]
    if not chosen:
        return True
    key = "to" if direction == "egress" else "from"
    rules = [(policy, rule) for policy in chosen for rule in policy["spec"].get(direction, [])]
    return any(
        _ports(rule, connection)
        and (not rule.get(key) or any(_peer(peer, policy, other, by_address) for peer in rule[key]))
        for policy, rule in rules
    )


def _applies(policy: Manifest, direction: str, subject: End) -> bool:
    spec = policy["spec"]
    # Kubernetes' own default differs by what is written; the manifests say it always, which the tests rely on.
    assert "policyTypes" in spec, f"NetworkPolicy {policy['metadata']['name']} has no policyTypes"
    return (
        direction.capitalize() in spec["policyTypes"]
        and subject.namespace == policy["metadata"]["namespace"]
        and selects(spec["podSelector"], subject.labels)
    )


def _ports(rule: Manifest, connection: Connection) -> bool:
    def fits(port: Manifest) -> bool:
        first = port.get("port")
        assert first is None or isinstance(first, int), "named ports are not read here"
        last = port.get("endPort", first)
        return port.get("protocol", "TCP") == connection.protocol and (
            first is None or first <= connection.port <= last
        )

    return not rule.get("ports") or any(map(fits, rule["ports"]))


def _peer(peer: Manifest, policy: Manifest, end: End, by_address: bool) -> bool:
    if "ipBlock" in peer:
        return (end.namespace is None or by_address) and _in_block(peer["ipBlock"], end.address)
    if end.namespace is None:
        return False
    if "namespaceSelector" in peer:
        # Kubernetes gives every namespace this label; the manifests use no other.
        inside = selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": end.namespace})
    else:
        inside = end.namespace == policy["metadata"]["namespace"]
    return inside and selects(peer.get("podSelector", {}), end.labels)


def _in_block(block: Manifest, address: str) -> bool:
    where = ipaddress.ip_address(address)
    return where in ipaddress.ip_network(block["cidr"]) and not any(
        where in ipaddress.ip_network(hole) for hole in block.get("except", [])
    )


def selects(selector: Manifest, labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects a pod or namespace with these labels."""
    return all(_requirements(selector, labels))


def _requirements(selector: Manifest, labels: Mapping[str, str]) -> Iterator[bool]:
    yield selector.get("matchLabels", {}).items() <= labels.items()
    for expression in selector.get("matchExpressions", []):
        value, operator = labels.get(expression["key"]), expression["operator"]
        if operator == "In":
            yield value in expression["values"]
        elif operator == "NotIn":
            yield value not in expression["values"]
        else:
            yield (value is not None) == {"Exists": True, "DoesNotExist": False}[operator]
