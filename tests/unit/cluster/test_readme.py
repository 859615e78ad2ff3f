"""What cluster/README.md promises of losses and retries is what the manifests and the operator's values say.

python -m pytest tests/unit/cluster/test_readme.py
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.helpers.cluster_manifests import ALL, CLUSTER, build, only

README = (CLUSTER / "README.md").read_text()
FLAT = " ".join(README.split())
REPOSITORY = CLUSTER.parent


def section(heading: str) -> str:
    """The text below a heading of the second level."""
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def losses() -> list[list[str]]:
    """The cells of the rows of the walk-through."""
    rows = [line for line in section("What each loss costs").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_the_operator_waits_for_a_lost_head_as_long_as_the_page_says() -> None:
    """KubeRay counts no retry for a head that is gone for longer, so that the page promises none."""
    values = yaml.safe_load((CLUSTER / "kuberay-values.yaml").read_text())
    (seconds,) = (one["value"] for one in values["env"] if one["name"] == "RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS")
    assert int(seconds) == 3600
    install = re.findall(r"^helm install(?:.*\\\n)*.*$", README, flags=re.MULTILINE)
    assert len(install) == 1
    assert "--values cluster/kuberay-values.yaml" in install[0]
    assert f"(`RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS`, {seconds})" in FLAT
    ((_, what, _, _),) = (row for row in losses() if row[0] == "the head, for more than an hour")
    assert "FAILED, without a retry" in what


def test_the_numbers_of_retries_are_those_of_the_manifests() -> None:
    job = only(build("overlays/cpu-demo"), "RayJob")["spec"]
    assert f"starts another one, up to {job['submitterConfig']['backoffLimit']} times" in FLAT
    assert f"a new cluster, up to {job['backoffLimit']} times" in FLAT
    assert f"is tried {job['backoffLimit']} times more, each on a new cluster" in FLAT


def test_every_row_names_the_test_that_holds_it() -> None:
    rows = losses()
    assert len(rows) >= 14
    for what, *_, held in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)`", held)
        assert tests or held.endswith("by reading"), what
        assert [name for name in tests if not (REPOSITORY / name).exists()] == [], what


@pytest.mark.parametrize("page", sorted(CLUSTER.rglob("*.md")), ids=lambda page: str(page.relative_to(CLUSTER)))
def test_the_commands_are_ones_that_a_shell_reads(page: Path) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) > 4
    for block in blocks:
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), block


@pytest.mark.parametrize("word", ["engine's node", "training node", "submitter", "head's pod", "Redis", "operator"])
def test_every_kind_of_pod_has_a_row(word: str) -> None:
    assert [row[0] for row in losses() if word in row[0]]


@pytest.mark.parametrize("overlay", ["overlays/gpu-multi-node", "long-lived/gpu-multi-node", "long-lived/cpu-demo"])
def test_the_patch_for_a_storage_class_reaches_every_claim(overlay: str, tmp_path: Path) -> None:
    """Redis makes its claim from a template, which a patch of claims alone misses."""
    (patches,) = re.findall(r"```yaml\n(patches:\n.*?)```", section("On GPUs"), flags=re.DOTALL)
    shutil.copytree(CLUSTER, tmp_path / "cluster")
    mine = tmp_path / "cluster" / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(f"resources: [../{overlay}]\n{patches}")
    done = subprocess.run(["kubectl", "kustomize", str(mine)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    objects = list(yaml.safe_load_all(done.stdout))
    claims = [item["spec"] for item in objects if item["kind"] == "PersistentVolumeClaim"]
    claims += [
        claim["spec"]
        for item in objects
        if item["kind"] == "StatefulSet"
        for claim in item["spec"]["volumeClaimTemplates"]
    ]
    assert len(claims) == (3 if "long-lived" in overlay else 2)
    assert {claim.get("storageClassName") for claim in claims} == {"YOUR-CLASS"}


def test_the_table_lists_every_overlay() -> None:
    for overlay in ALL:
        name = "long-lived/NAME" if overlay.startswith("long-lived") else overlay
        assert f"`{name}`" in README, overlay
