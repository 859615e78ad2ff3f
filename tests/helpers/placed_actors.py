"""The actors of one phase, and the tasks that read for them, on a cluster, without an engine: where they ran.

python -m tests.helpers.placed_actors ADDRESS generate

Prints {"role": [...], "read": [...]}: the label mipo.io/role of the nodes on which two actors saw sixteen blocks of
rows, and of those on which the blocks were made.
"""

from __future__ import annotations

import json
import sys

import pyarrow as pa
import ray
import ray.data

from mipo_ray.config.recipe import load_config
from mipo_ray.ray_cluster.blocks import map_actors, map_blocks, ordered_context
from mipo_ray.ray_cluster.growth import keep_to_group
from mipo_ray.ray_cluster.resources import Request
from tests.helpers.placement import ON_GROUPS, ROLE


def with_role(block: pa.Table, column: str) -> pa.Table:
    """The rows and the role of this node."""
    role = ray.get_runtime_context().get_node_labels()[ROLE]
    return block.append_column(column, pa.array([role] * block.num_rows))


class SaysItsRole:
    """Adds the role of its node to every row."""

    def __call__(self, block: pa.Table) -> pa.Table:
        return with_role(block, "role")


def main(address: str, role: str) -> None:
    ray.init(address=address, log_to_driver=False)
    config = load_config(None, [*ON_GROUPS, "ray.autoscaling=true"])
    request = Request("generation", "actor", "generation.pool.min_size", 2, 2, 1.0, 0.0, {ROLE: role})
    pool = ray.data.ActorPoolStrategy(min_size=2, max_size=2)
    with ordered_context() as context:
        keep_to_group(context.execution_options, config, training=role == "train")
        dataset = map_blocks(ray.data.range(64, override_num_blocks=16), with_role, column="read")
        rows = map_actors(dataset, SaysItsRole, (), request=request, pool=pool, wait_minutes=1).take_all()
    print(json.dumps({name: [row[name] for row in rows] for name in ("role", "read")}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
