"""The embedded model, converted once, read by all that reads models. Weights: tests/nightly/test_embedded_weights.py"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mipo_ray.models.source import check_model


@pytest.fixture(scope="module")
def converted() -> Path:
    """The embedded model, made by its command in the test session's own cache."""
    result = subprocess.run([sys.executable, "-m", "mipo_ray.models.embedded"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.rsplit("embedded model: ", 1)[1].strip())


def test_second_call_returns_it_without_importing_torch(converted: Path) -> None:
    code = (
        "import sys; from mipo_ray.models.source import local_model_directory;"
        "print(local_model_directory('embedded'), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(converted), "False"]


def test_nothing_but_the_model_is_left_in_the_cache(converted: Path) -> None:
    assert not list(converted.parent.glob("*.partial"))


def test_model_directory_passes_its_own_check(converted: Path) -> None:
    check_model(str(converted))
    generation = json.loads((converted / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
    assert "_from_model_config" not in generation
    assert "quantization_config" not in json.loads((converted / "config.json").read_text())
