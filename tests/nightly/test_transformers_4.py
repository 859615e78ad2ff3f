"""transformers 4.57 reads the same model out of an export as transformers 5 does.

python -m pytest tests/nightly/test_transformers_4.py

Its packages go to a folder of the test's own, in front of this environment's; where they cannot be had, it is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mipo_ray.models.embedded import prepare_embedded_model
from mipo_ray.training.export import export_policy
from mipo_ray.training.layout import lay_out
from mipo_ray.training.logprobs import response_logprobs
from tests.helpers.model_zoo import ZOO, make_member, sequences
from tests.helpers.tiny_families import sequence_trees

PACKAGES = ["transformers==4.57.*", "huggingface-hub<1", "tokenizers>=0.22,<=0.23.0"]

# Version 5 writes this family's number of experts under a name that 4.57 does not read, where the source ends with an
# error as the export does.
UNREAD = ("Qwen3 of experts",)
MEMBERS = tuple(name for name, member in ZOO.items() if member.refused is None and name not in UNREAD)

SCORE = """
import json, sys, torch, transformers
assert transformers.__version__.startswith("4.57"), transformers.__version__
from transformers import AutoModelForCausalLM
for directory in json.loads(sys.argv[1]):
    options = {"torch_dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    sums = []
    for prompt, response in json.loads(sys.argv[2]):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        found = logits.float().log_softmax(-1).gather(1, torch.tensor(response)[:, None])
        sums.append(float(found.sum()))
    print("SUMS", json.dumps(sums))
"""


@pytest.fixture(scope="module")
def version_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers 4.57 and the two packages that it wants of other versions."""
    folder = tmp_path_factory.mktemp("transformers-4")
    command = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--no-deps"]
    try:
        subprocess.run(
            [*command, "--python", sys.executable, "--target", str(folder), *PACKAGES],
            check=True,
            capture_output=True,
            text=True,
            timeout=600,
        )
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"transformers 4.57 cannot be had here: {error} {getattr(error, 'stderr', '')}"[:500])
    return folder


def by_version_4(folder: Path, directories: list[Path]) -> list[list[float]]:
    environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    arguments = [json.dumps([str(directory) for directory in directories]), json.dumps(sequences())]
    process = subprocess.run(
        [sys.executable, "-c", SCORE, *arguments], env=environment, capture_output=True, text=True, cwd=folder
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return [json.loads(line[5:]) for line in process.stdout.splitlines() if line.startswith("SUMS ")]


def by_this_version(model: object) -> list[float]:
    with torch.no_grad():
        return [float(response_logprobs(model, lay_out([tree], "padded"))) for tree in sequence_trees(sequences())]


def test_exports_are_the_same_model_to_version_4(version_4: Path, tmp_path: Path) -> None:
    expected, directories = {}, []
    for number, name in enumerate(MEMBERS):
        source, export = tmp_path / f"{number}", tmp_path / f"{number}-exported"
        source.mkdir()
        model = make_member(name, source)
        export_policy(model, source, export)
        expected[name] = by_this_version(model)
        directories.append(export)
    for name, found in zip(MEMBERS, by_version_4(version_4, directories), strict=True):
        assert found == pytest.approx(expected[name], abs=2e-3, rel=0), name


def test_the_demos_policy_is_the_same_model_to_version_4(version_4: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = prepare_embedded_model()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    export_policy(model, source, tmp_path / "exported")
    (found,) = by_version_4(version_4, [tmp_path / "exported"])
    assert found == pytest.approx(by_this_version(model), abs=2e-3, rel=0)
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["rope_theta"] == 1e5
