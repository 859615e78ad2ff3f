"""The manifests in cluster/: schemas, what Ray's autoscaler reads in them, and the recipes they carry.

A real API server validates the RayJob and the RayCluster themselves: tests/integration/test_cluster_api_server.py.

python -m pytest tests/unit/cluster/test_manifests.py
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import SchemaNotFoundError, ValidationError

from mipo_ray.config.recipe import load_config
from mipo_ray.config.schema import Config
from mipo_ray.models.shape import EMBEDDED_SHAPE, ModelShape
from mipo_ray.planning.disk import Unwritten, disk_needs
from mipo_ray.run import DEMO_RECIPE, main
from mipo_ray.storage.run_directory import open_run
from tests.helpers.cluster_manifests import (
    ALL,
    CLOUDS,
    CLUSTER,
    RAY_CLUSTERS,
    RAY_JOBS,
    Manifest,
    as_pods,
    build,
    only,
    pod_templates,
    ray_cluster_spec,
    ray_objects,
)
from tests.helpers.cluster_rules import broken_rules, quantity
from tests.helpers.network_policies import selects

# The oldest Kubernetes that cluster/README.md names, and the newest whose schemas are at hand.
KUBERNETES_VERSIONS = ("1.30", "1.37")


def core_objects(objects: list[Manifest]) -> list[Manifest]:
    """Everything but Ray's kinds, and the pods of Ray's kinds."""
    return [item for item in objects if item not in ray_objects(objects)] + as_pods(objects)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("overlay", ALL)
def test_objects_and_pod_templates_fit_the_kubernetes_schemas(overlay: str, version: str) -> None:
    kinds = []
    for item in core_objects(build(overlay)):
        kubernetes_validate.validate(item, version, strict=True)
        kinds.append(item["kind"])
    redis = {"StatefulSet", "Service"} if overlay in RAY_CLUSTERS else set()
    assert set(kinds) == redis | {
        *("Namespace", "ConfigMap", "PersistentVolumeClaim", "NetworkPolicy", "PodDisruptionBudget", "Pod"),
    }


def test_the_pod_for_files_fits_too() -> None:
    pod = yaml.safe_load((CLUSTER / "files-pod.yaml").read_text())
    # A pod has no template of its own: as one of another object the rules see it.
    holder = {"apiVersion": "v1", "kind": "Job", "metadata": pod["metadata"], "spec": {"template": pod}}
    objects = [*build("overlays/cpu-demo"), holder]

    kubernetes_validate.validate(pod, KUBERNETES_VERSIONS[0], strict=True)
    assert broken_rules(objects, importlib.metadata.version("ray")) == []
    images = {template["spec"]["containers"][0]["image"] for _, template in pod_templates(objects)}
    assert pod["spec"]["containers"][0]["image"] in images


def _misspelt(pod: Manifest) -> None:
    pod["spec"]["containers"][0]["imagePullPolice"] = "Always"


def _wrong_type(pod: Manifest) -> None:
    pod["spec"]["terminationGracePeriodSeconds"] = "60"


def _nameless(pod: Manifest) -> None:
    del pod["spec"]["containers"][0]["name"]


def _unquoted_number(pod: Manifest) -> None:
    pod["spec"]["containers"][0]["env"][0]["value"] = 1


def _unknown_kind(pod: Manifest) -> None:
    pod["kind"] = "Pot"


@pytest.mark.parametrize("mistake", [_misspelt, _wrong_type, _nameless, _unquoted_number, _unknown_kind])
def test_the_schemas_notice_a_mistake(mistake: Callable[[Manifest], None]) -> None:
    pod = as_pods(build("overlays/cpu-demo"))[0]
    kubernetes_validate.validate(pod, KUBERNETES_VERSIONS[0], strict=True)

    mistake(pod)

    with pytest.raises((ValidationError, SchemaNotFoundError)):
        kubernetes_validate.validate(pod, KUBERNETES_VERSIONS[0], strict=True)


@pytest.mark.parametrize("long_lived", RAY_CLUSTERS)
def test_the_long_lived_cluster_is_the_one_of_the_job(long_lived: str) -> None:
    job = only(build(long_lived.replace("long-lived", "overlays")), "RayJob")
    cluster = only(build(long_lived), "RayCluster")
    assert cluster["spec"].pop("gcsFaultToleranceOptions")  # for which a job has no use
    assert cluster["spec"] == job["spec"]["rayClusterSpec"]


def autoscaler_reads(item: Manifest) -> dict[str, Any]:
    """Node types as Ray's autoscaler derives them from a RayCluster, or from the one that a RayJob makes."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    config = _derive_autoscaling_config_from_ray_cr({"metadata": item["metadata"], "spec": ray_cluster_spec(item)})
    return dict(config["available_node_types"])


@pytest.mark.parametrize(
    ("overlay", "groups"),
    {
        "overlays/cpu-demo": {"generate": (0, 1, 6, 0), "train": (0, 1, 6, 0)},
        "overlays/gpu-single-node": {"train": (0, 1, 64, 8)},
        "overlays/gpu-multi-node": {"generate": (0, 8, 8, 1), "train": (0, 2, 64, 8)},
        "overlays/gpu-gang": {"train": (2, 2, 64, 8)},
        **{
            cloud: {"generate": (0, 8, 8, 1), "generate-on-demand": (0, 8, 8, 1), "train": (0, 2, 64, 8)}
            for cloud in CLOUDS
        },
    }.items(),
)
def test_ray_reads_the_groups(overlay: str, groups: dict[str, tuple[int, ...]]) -> None:
    nodes = autoscaler_reads(ray_objects(build(overlay))[0])

    head = nodes.pop("headgroup")
    assert head["resources"]["CPU"] == 0
    assert "GPU" not in head["resources"]
    assert {
        name: (node["min_workers"], node["max_workers"], node["resources"]["CPU"], node["resources"].get("GPU", 0))
        for name, node in nodes.items()
    } == groups
    assert {name: node["labels"] for name, node in nodes.items()} == {
        name: {"mipo.io/role": name.removesuffix("-on-demand")} for name in nodes
    }
    autoscaled = overlay != "overlays/gpu-gang"
    assert [node.get("idle_timeout_s") for node in nodes.values()] == [120.0 if autoscaled else None] * len(nodes)


def _bad_label(group: Manifest) -> None:
    group["labels"] = {"mipo.io/role": "generate!"}


def _no_cpus(group: Manifest) -> None:
    del group["rayStartParams"]["num-cpus"]
    group["template"]["spec"]["containers"][0]["resources"] = {}


def _no_maximum(group: Manifest) -> None:
    del group["maxReplicas"]


@pytest.mark.parametrize("mistake", [_bad_label, _no_cpus, _no_maximum])
def test_ray_notices_a_mistake(mistake: Callable[[Manifest], None]) -> None:
    (item,) = ray_objects(build("overlays/cpu-demo"))

    mistake(ray_cluster_spec(item)["workerGroupSpecs"][0])

    with pytest.raises((ValueError, KeyError)):
        autoscaler_reads(item)


@pytest.mark.parametrize("overlay", ALL)
def test_the_object_store_fits_shared_memory(overlay: str) -> None:
    from ray.autoscaler._private.kuberay.utils import parse_quantity

    spec = ray_cluster_spec(ray_objects(build(overlay))[0])
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        (shared,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shared-memory")
        memory = parse_quantity(pod["containers"][0]["resources"]["limits"]["memory"])
        store = int(group["rayStartParams"]["object-store-memory"])
        assert store < parse_quantity(shared["sizeLimit"]) <= memory / 2


@pytest.mark.parametrize("overlay", ALL)
def test_the_grace_period_covers_a_stop(overlay: str) -> None:
    objects = build(overlay)
    pod = ray_cluster_spec(ray_objects(objects)[0])["headGroupSpec"]["template"]["spec"]
    stop = int(only(objects, "ConfigMap", "mipo-environment")["data"]["RAY_JOB_STOP_WAIT_TIME_S"])
    hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert f"seq {stop}" in hook
    assert stop < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("overlay", ALL)
def test_prometheus_finds_every_ray_node_and_may_reach_it(overlay: str) -> None:
    monitor = yaml.safe_load((CLUSTER / "monitoring" / "podmonitor.yaml").read_text())
    objects = build(overlay)
    asked = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    (rule,) = only(objects, "NetworkPolicy", "metrics")["spec"]["ingress"]
    allowed = {port["port"] for port in rule["ports"]}

    found = {}
    for where, template in pod_templates(objects):
        if selects(monitor["spec"]["selector"], template["metadata"]["labels"]):
            ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
            found[where] = {name: number for name, number in ports.items() if name in asked}
    nodes = [where for where, _ in pod_templates(ray_objects(objects)) if not where.endswith("submitter")]
    head = [where for where in nodes if where.endswith("head")]

    assert set(found) == set(nodes)
    for where, ports in found.items():
        more = {"as-metrics": 44217, "dash-metrics": 44227} if where in head else {}
        assert ports == {"metrics": 8080, **more}
        assert set(ports.values()) <= allowed
    assert asked == set(found[head[0]])
    assert monitor["metadata"]["namespace"] == only(objects, "Namespace")["metadata"]["name"]


def carried_recipe(overlay: str, directory: Path) -> Path:
    """The recipe of an overlay, in the folder that its ConfigMap is mounted as."""
    for name, text in only(build(overlay), "ConfigMap", "mipo-recipe")["data"].items():
        (directory / name).write_text(text)
    return directory / "recipe.yaml"


@pytest.mark.parametrize("overlay", RAY_JOBS)
def test_the_recipe_passes_the_dry_run(
    overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = carried_recipe(overlay, tmp_path)
    # The hub is not asked for the model; the nodes of the gang are not here.
    overrides = [f"run_dir={tmp_path}/run", "model.path=embedded", "ray.autoscaling=true"]

    assert main(["--dry-run", str(recipe), *overrides]) == 0, capsys.readouterr().err
    assert "dry run: nothing was started" in capsys.readouterr().out


@pytest.mark.parametrize("overlay", RAY_JOBS)
def test_the_recipe_fits_the_groups(overlay: str, tmp_path: Path) -> None:
    config = load_config(carried_recipe(overlay, tmp_path))
    (item,) = ray_objects(build(overlay))
    nodes = autoscaler_reads(item)
    engines, workers = nodes.get("generate", nodes["train"]), nodes["train"]

    assert _places(engines, config.generation.pool.gpus_per_engine) >= config.generation.pool.max_size
    assert _places(workers, config.train.gpus_per_worker) >= config.train.num_workers
    # Reading stays off the nodes of the other phase (ray_cluster/growth.py), and so needs a CPU beside the actors.
    for node, gpus, cpus in (
        (engines, config.generation.pool.gpus_per_engine, config.generation.pool.cpus_per_engine),
        (workers, config.train.gpus_per_worker, config.train.cpus_per_worker),
    ):
        actors = node["resources"]["GPU"] / gpus if gpus else 1
        assert node["resources"]["CPU"] >= actors * cpus + 1
    assert config.run_dir.startswith("/mnt/mipo-runs/")
    assert config.ray.autoscaling == ray_cluster_spec(item)["enableInTreeAutoscaling"]
    # Engines that outlive their stage would hold the GPUs that training waits for, or nodes that nobody uses.
    shared = config.generation.pool.label_selector == config.train.label_selector
    scales_to_zero = engines["min_workers"] == 0
    assert config.generation.pool.lifetime == "stage"
    assert shared or scales_to_zero


def _places(node: dict[str, Any], gpus: float | None) -> float:
    """How many engines or workers a group at full size holds; without GPUs one logical CPU each."""
    return node["max_workers"] * (node["resources"]["GPU"] / gpus if gpus else node["resources"]["CPU"])


def test_the_demo_is_the_demo(tmp_path: Path) -> None:
    def shared(config: Config) -> dict[str, Any]:
        placed = {"generation": {"pool": {"label_selector", "lifetime"}}, "train": {"label_selector"}}
        return config.model_dump(exclude={"run_dir": True, "ray": True, **placed})

    assert shared(load_config(carried_recipe("overlays/cpu-demo", tmp_path))) == shared(load_config(DEMO_RECIPE))


# Models of the overlays' recipes: their shapes, which nobody downloads for a test.
SHAPES = {
    "embedded": EMBEDDED_SHAPE,
    "Qwen/Qwen2.5-1.5B-Instruct": ModelShape(1_543_714_304, 28, 1536, 8960, 12, 2, 128, 151_936),
    "Qwen/Qwen2.5-7B-Instruct": ModelShape(7_615_616_512, 28, 3584, 18_944, 28, 4, 128, 152_064),
}


@pytest.mark.parametrize("overlay", RAY_JOBS)
def test_volumes_hold_what_the_recipe_writes(overlay: str, tmp_path: Path) -> None:
    """By the plan's formula: three checkpoints and the policies on the claim; and in the directories of a training pod
    what going on with another number of workers takes."""
    objects = build(overlay)
    config = load_config(carried_recipe(overlay, tmp_path))
    dtype = "float32" if config.model.dtype == "auto" else config.model.dtype
    elastic = config.model_copy(update={"train": config.train.model_copy(update={"min_workers": 1})})
    pairs = 10**6
    work = Unwritten(elastic, dtype, pairs, open_run(str(tmp_path / "run")), finished=())
    needs = disk_needs(work, SHAPES[config.model.source])
    claim = only(objects, "PersistentVolumeClaim", "mipo-runs")["spec"]["resources"]["requests"]["storage"]
    assert needs.run_directory < 0.9 * quantity(claim)
    models = only(objects, "PersistentVolumeClaim", "mipo-models")["spec"]["resources"]["requests"]["storage"]
    assert needs.policy < 0.9 * quantity(models)
    if config.train.num_workers > 1:
        groups = ray_cluster_spec(ray_objects(objects)[0])["workerGroupSpecs"]
        (train,) = (group for group in groups if group["labels"]["mipo.io/role"] == "train")
        volumes = {volume["name"]: volume for volume in train["template"]["spec"]["volumes"]}
        assert needs.node < quantity(volumes["tmp"]["emptyDir"]["sizeLimit"])
