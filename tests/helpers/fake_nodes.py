"""Ray's fake provider of nodes, for node types with a size of memory; Ray's autoscaler makes one.

python -m pytest tests/nightly/test_autoscaling.py (where the cluster's description names it)

Ray Data asks for memory, and the autoscaler starts only nodes whose type has some; the provider's raylets refuse it.
"""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class FakeNodes(FakeMultiNodeProvider):
    """Nodes are raylets on this machine, with as much memory as it has; see above."""

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, float], labels: dict[str, str]
    ) -> None:
        resources = {kind: size for kind, size in resources.items() if kind != "memory"}
        super()._create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
