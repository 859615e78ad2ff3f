"""The policy linter Checkov over the built manifests, and over a manifest with mistakes.

uv runs Checkov in an environment of its own: it asks for other versions of this project's packages.

python -m pytest tests/nightly/test_cluster_policies.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.cluster_manifests import ALL, Manifest, as_pods, build, only, ray_objects

CHECKOV = "checkov==3.3.30"

# Checks that do not fit, with the reason.
SKIPPED = {
    "CKV_K8S_8": "liveness probes of Ray pods are the operator's to set",
    "CKV_K8S_9": "readiness probes likewise",
    "CKV_K8S_15": "tags are fixed, so a node need not ask the registry at every start; kind has no registry",
    "CKV_K8S_35": "Redis, Ray and the Hugging Face libraries read their secrets from the environment",
    "CKV_K8S_43": "the image is the user's own: its digest is known when it is built",
}
# The head's autoscaler talks to the Kubernetes API.
ONLY_FOR_HEAD = "CKV_K8S_38"


@pytest.fixture(scope="module")
def checkov() -> list[str]:
    """The command, installed if it is not; skips where uv cannot install it."""
    beside = Path(sys.executable).parent / "uv"
    uv = str(beside) if beside.exists() else shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    command = [uv, "tool", "run", "--from", CHECKOV, "checkov"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        pytest.skip(f"uv cannot install {CHECKOV}: {done.stderr.strip().splitlines()[-1:]}")
    return command


def failures(checkov: list[str], objects: Sequence[Manifest], file: Path) -> tuple[set[tuple[str, str]], int]:
    """(check, resource) of each failed check, and the number of passed ones."""
    file.write_text(yaml.safe_dump_all(objects))
    options = ["--framework", "kubernetes", "--skip-download", "--output", "json", "--file", str(file)]
    done = subprocess.run([*checkov, *options], capture_output=True, text=True, timeout=600)
    report: dict[str, Any] = json.loads(done.stdout)
    failed = {(check["check_id"], check["resource"]) for check in report["results"]["failed_checks"]}
    return failed, report["summary"]["passed"]


def known(objects: Sequence[Manifest]) -> list[Manifest]:
    """The objects, with pods in place of Ray's kinds, which Checkov does not know."""
    return [item for item in objects if item not in ray_objects(objects)] + as_pods(objects)


def is_expected(check: str, resource: str) -> bool:
    return check in SKIPPED or (check == ONLY_FOR_HEAD and resource.endswith(".head"))


def test_checkov_has_nothing_to_say(checkov: list[str], tmp_path: Path) -> None:
    # All overlays in one run: most of its time is the start.
    together: list[Manifest] = []
    for number, overlay in enumerate(ALL):
        objects = build(overlay)
        for item in objects:
            item["metadata"]["namespace"] = f"overlay-{number}"
        together += known(objects)

    failed, passed = failures(checkov, together, tmp_path / "manifests.yaml")

    assert {found for found in failed if not is_expected(*found)} == set()
    assert passed > 100 * len(ALL)


def test_checkov_notices_mistakes(checkov: list[str], tmp_path: Path) -> None:
    objects = known(build("long-lived/cpu-demo"))  # which has Redis, too
    pods = {pod["metadata"]["name"]: pod["spec"] for pod in objects if pod["kind"] == "Pod"}
    pods["head"]["securityContext"].update(runAsNonRoot=False, runAsUser=0)
    pods["head"]["hostNetwork"] = True
    pods["generate"]["containers"][0]["image"] = "mipo-ray:latest"
    pods["generate"]["containers"][0]["securityContext"]["privileged"] = True
    del pods["train"]["containers"][0]["resources"]["limits"]
    pods["train"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] = False
    redis = only(objects, "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    del redis["livenessProbe"]

    failed, _ = failures(checkov, objects, tmp_path / "mistakes.yaml")

    assert {
        ("CKV_K8S_23", "Pod.mipo-ray.head"),  # root
        ("CKV_K8S_19", "Pod.mipo-ray.head"),  # the host's network
        ("CKV_K8S_14", "Pod.mipo-ray.generate"),  # no fixed tag
        ("CKV_K8S_16", "Pod.mipo-ray.generate"),  # privileged
        ("CKV_K8S_11", "Pod.mipo-ray.train"),  # no limit of CPUs
        ("CKV_K8S_13", "Pod.mipo-ray.train"),  # no limit of memory
        ("CKV_K8S_22", "Pod.mipo-ray.train"),  # writable root file system
        ("CKV_K8S_8", "StatefulSet.mipo-ray.mipo-redis"),  # no liveness probe
    } <= failed
