"""The actors of one phase on a cluster, without an engine: where they ran.

python -m tests.helpers.placed_actors ADDRESS '{"mipo.io/role": "generate"}'

Prints {"roles": [...]}: the label mipo.io/role of the nodes on which two actors saw four blocks of rows.
"""

from __future__ import annotations

import json
import sys

import pyarrow as pa
import ray
import ray.data

from mipo_ray.ray_cluster.blocks import map_actors
from mipo_ray.ray_cluster.resources import Request


class SaysItsRole:
    """Adds the role of its node to every row."""

    def __call__(self, block: pa.Table) -> pa.Table:
        import ray

        role = ray.get_runtime_context().get_node_labels()["mipo.io/role"]
        return block.append_column("role", pa.array([role] * block.num_rows))


def main(address: str, selector: dict[str, str]) -> None:
    ray.init(address=address, log_to_driver=False)
    request = Request("generation", "actor", "generation.pool.min_size", 2, 2, 1.0, 0.0, selector)
    pool = ray.data.ActorPoolStrategy(min_size=2, max_size=2)
    dataset = ray.data.range(8, override_num_blocks=4)
    rows = map_actors(dataset, SaysItsRole, (), request=request, pool=pool, wait_minutes=1).take_all()
    print(json.dumps({"roles": [row["role"] for row in rows]}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
