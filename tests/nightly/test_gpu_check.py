"""The GPU check whole, on a CPU with the tiny shape.

python -m pytest tests/nightly/test_gpu_check.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_every_part_ends_and_is_right(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--repeats", "1", "--seconds", "1500"]
    command += ["--model-shape", "tiny", "--large-model-shape", "tiny", "--output", str(tmp_path / "gpu")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(found) == {"agreement", "speed", "head", "large", "zero"}
    assert all(part["rows"] and part["error"] is None for part in found.values())
    trainers = {row["trainer"]: row["losses"] for row in found["speed"]["rows"] if row["shape"] == "mixed"}
    assert trainers["ours"] == pytest.approx(trainers["trl"], abs=1e-5)
    assert all(row["resume_difference"] == 0 for row in found["zero"]["rows"])
    assert "Not whole" not in (tmp_path / "gpu.md").read_text()
