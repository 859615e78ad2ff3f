"""Watches a Ray cluster from beside it: its nodes by type, as its autoscaler counts them, and where actors are.

python -m tests.helpers.cluster_watcher ADDRESS DASHBOARD_URL FILE.jsonl

Appends a JSON object about once a second until its input ends, and one after that: `seconds` since its start; `nodes`,
`starting`: how many nodes of each type there are, and are on their way (the autoscaler's status); `alive`: how many
living nodes have each role (the state API); `actors`: class name -> roles of the nodes that living actors run on (the
state API); `labels`: the roles that the status gives the nodes of each type.
"""

from __future__ import annotations

import json
import select
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROLE = "mipo.io/role"
HEAD = "ray.head.default"


def look(address: str, dashboard: str) -> dict[str, Any]:
    """What the autoscaler and the state API tell at this moment; see above."""
    from ray.util.state import list_actors, list_nodes

    nodes = list_nodes(address=dashboard, detail=True)
    roles = {node.node_id: node.labels.get(ROLE, "head") for node in nodes}
    actors: dict[str, set[str]] = {}
    for actor in list_actors(address=dashboard, limit=10_000):
        if actor.state == "ALIVE" and actor.node_id in roles:
            actors.setdefault(actor.class_name, set()).add(roles[actor.node_id])
    return {
        "nodes": nodes_of(address),
        "starting": starting(address),
        "alive": dict(Counter(roles[node.node_id] for node in nodes if node.state == "ALIVE")),
        "actors": {name: sorted(places) for name, places in sorted(actors.items())},
    }


def nodes_of(address: str) -> dict[str, int]:
    """How many nodes of each type the autoscaler counts, idle ones too, without the head."""
    status = _status(address)
    types = (node.ray_node_type_name for node in [*status.active_nodes, *status.idle_nodes])
    return dict(Counter(name for name in types if name != HEAD))


def starting(address: str) -> dict[str, int]:
    """How many nodes of each type are on their way."""
    status = _status(address)
    found: Counter[str] = Counter(node.ray_node_type_name for node in status.pending_nodes)
    for launch in status.pending_launches:
        found[launch.ray_node_type_name] += launch.count
    return dict(found)


def _status(address: str) -> Any:
    from ray.autoscaler.v2.sdk import get_cluster_status

    return get_cluster_status(address)


def main(address: str, dashboard: str, file: Path) -> None:
    started = time.monotonic()
    is_over = False
    with file.open("a", buffering=1) as lines:
        while not is_over:
            is_over = bool(select.select([sys.stdin], [], [], 1.0)[0])  # its end
            try:
                seen = look(address, dashboard)
            except Exception as error:  # while the dashboard starts
                seen = {"error": str(error)[:200]}
            lines.write(json.dumps({"seconds": round(time.monotonic() - started, 1), **seen}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
