"""A short run on a cluster of nodes with roles: its arguments, commands as drivers there, and where actors ran."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.labelled_cluster import LabelledCluster

ROLE = "mipo.io/role"
NODES = [{"num_cpus": 2, "labels": {ROLE: role}} for role in ("head", "generate", "train")]
ON_GROUPS = [f"generation.pool.label_selector={{{ROLE}: generate}}", f"train.label_selector={{{ROLE}: train}}"]


def short_run(directory: Path, model: Path, cluster: LabelledCluster) -> list[str]:
    """Arguments of a short run of one round on the cluster."""
    rows = [{"prompt": f"Question {index}?", "context": f"I am user {index}."} for index in range(16)]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "recipe.yaml").write_text("{}")  # the defaults, not the demo
    return [
        str(directory / "recipe.yaml"),
        f"ray.address={cluster.address}",
        f"run_dir={directory}/run",
        "rounds=1",
        f"model.path={model}",
        "model.max_model_len=256",
        f"prompts.path={directory}/train.jsonl",
        "evaluate.enabled=false",
        "generation.sampling.max_tokens=8",
        "train.num_workers=2",
    ]


def run(cluster: LabelledCluster, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        env=cluster.environment,
    )


def actors_by_role(cluster: LabelledCluster) -> dict[str, set[str]]:
    """What the state API knows of the cluster's actors, the ended ones too: class name -> roles of their nodes."""
    from ray.util.state import list_actors, list_nodes

    roles = {node.node_id: node.labels[ROLE] for node in list_nodes(address=cluster.dashboard, detail=True)}
    found: dict[str, set[str]] = {}
    for actor in list_actors(address=cluster.dashboard, limit=10_000):
        if actor.node_id in roles:
            found.setdefault(actor.class_name, set()).add(roles[actor.node_id])
    return found
