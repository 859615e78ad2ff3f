"""The command, with a look at the cluster before each of its stages: what is alive, and what is reserved.

python -m tests.helpers.watched_run FILE.jsonl [arguments of mipo_ray.run ...]

Appends a JSON object to the file for each stage that begins: `stage`; `actors`, the class names of the job's living
actors; `placement_groups` that are not removed; `reserved`, the CPUs and GPUs that are not available; `asked`, the
bundles that the autoscaler is asked to keep nodes for.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import ray

from mipo_ray import loop, run

# Actors end in the background. What is left after this time is left for good.
SECONDS_TO_END = 30
STAGE_ACTORS = ("MapWorker(", "RayTrainWorker", "TrainController", "PlacementGroupCleaner", "SplitCoordinator")


def look(stage: str) -> dict[str, Any]:
    """What the cluster holds at this moment."""
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    context = ray.get_runtime_context()
    actors = ray._private.state.state.actor_table(None)
    groups = ray.util.placement_group_table()
    available, total = ray.available_resources(), ray.cluster_resources()
    state: Any = get_cluster_resource_state(ray._raylet.GcsClient(address=context.gcs_address))
    return {
        "stage": stage,
        "actors": sorted(actor["ActorClassName"] for actor in actors.values() if actor["State"] != "DEAD"),
        "placement_groups": [group["state"] for group in groups.values() if group["state"] != "REMOVED"],
        "reserved": {kind: total[kind] - available.get(kind, 0.0) for kind in ("CPU", "GPU") if kind in total},
        "asked": [
            dict(one.request.resources_bundle)
            for constraint in state.cluster_resource_constraints
            for one in constraint.resource_requests
        ],
    }


def is_clear(seen: dict[str, Any]) -> bool:
    """Whether nothing of an earlier stage is left."""
    left = [name for name in seen["actors"] if name.startswith(STAGE_ACTORS)]
    return not left and not seen["placement_groups"] and not any(seen["reserved"].values()) and not seen["asked"]


def watch(stage: str, file: Path) -> None:
    """Looks until everything is clear, or its time is over, and writes down what was seen last."""
    started = time.monotonic()
    seen = look(stage)
    while not is_clear(seen) and time.monotonic() - started < SECONDS_TO_END:
        time.sleep(0.1)
        seen = look(stage)
    with file.open("a") as lines:
        lines.write(json.dumps({**seen, "seconds": time.monotonic() - started}) + "\n")


def main(file: Path, arguments: list[str]) -> int:
    for name in ("generate", "train", "evaluate"):
        stage = getattr(loop, name)

        def watched(*values: Any, stage: Any = stage, name: str = name) -> Any:
            watch(name, file)
            return stage(*values)

        setattr(loop, name, watched)
    return run.main(arguments)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
