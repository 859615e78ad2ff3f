"""The paper-and-pencil model of a round on GPUs: by hand, its own claims, and that the committed table is its output.

python -m pytest tests/unit/benchmarks/test_paper_model.py
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from benchmarks import paper_model
from benchmarks.paper_model import ASSUMPTIONS, GPUS, round_on, table

ROOT = Path(__file__).parents[3]


def test_eight_gpus_by_hand() -> None:
    """500M tokens at 5,777 and 400M scored at 24,633 a GPU second on 4 engines; 3,125 steps of 64 pairs of 650 tokens
    on each of 4 workers at 4,321.5 tokens/s, and 0.06 s to exchange 24 GB over NVLink."""
    one = round_on(8)
    assert (one.engines, one.workers) == (4, 4)
    assert one.sampling_seconds == pytest.approx((500e6 / 5777 + 400e6 / 24632.6) / 4, rel=1e-4)
    assert one.training_seconds == pytest.approx(3125 * (64 * 650 / 4321.5 + 4 * 8.03e9 * 3 / 4 / 400e9), rel=1e-4)
    assert one.seconds == max(one.sampling_seconds, one.training_seconds) + 180 + 60
    assert one.loads["one core of the driver"] == pytest.approx(31250 * 0.016 / one.training_seconds, rel=0.01)
    assert one.loads["writes to the store"] == pytest.approx(31250 * 2 / 100 / one.training_seconds, rel=0.01)


def test_more_gpus_are_faster_and_never_cheaper() -> None:
    rounds = [round_on(gpus) for gpus in GPUS]
    assert all(after.seconds < before.seconds for before, after in itertools.pairwise(rounds))
    assert all(a.seconds * a.gpus > 0.99 * b.seconds * b.gpus for b, a in itertools.pairwise(rounds))
    assert [one.gpus for one in rounds] == list(GPUS)


def test_something_shared_that_is_full_stretches_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that took 1.6 s a block would bound 8 GPUs: 50,000 s for 31,250 blocks, twice what the GPUs need."""
    before = round_on(8)
    slow = paper_model.Assumption(1600.0, "ms a block", "made up")
    monkeypatch.setitem(ASSUMPTIONS, "driver_ms", slow)
    after = round_on(8)
    assert after.bound[0] == "one core of the driver"
    assert after.bound[1] > 1
    assert after.seconds == pytest.approx(31250 * 1.6 + 240)
    assert after.seconds > before.seconds


def test_a_measured_driver_stands_in_place_of_the_guess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks.scale prompts` has blocks of 8 rows: 0.5 ms a pair are 4 ms a block."""
    runs = {"2000": [{"cpu_seconds": 9.0, "pairs": 2000}], "32000": [{"cpu_seconds": 16.0, "pairs": 32000}] * 3}
    (tmp_path / "scale_prompts.json").write_text(json.dumps({"measured": runs}))
    monkeypatch.setattr(paper_model, "MEASURED_DRIVER", tmp_path / "scale_prompts.json")
    found = paper_model._driver_ms()
    assert found.value == 4.0
    assert "32,000 prompts" in found.source
    scale = (ROOT / "benchmarks" / "scale.py").read_text()
    assert f'"conditioning.block_size={paper_model.SCALE_BLOCK_ROWS}"' in scale


def test_every_assumption_says_where_it_is_from_and_the_committed_table_is_this_one() -> None:
    """After a change: python -m benchmarks.paper_model, and the table in benchmarks/README.md."""
    assert all(one.source for one in ASSUMPTIONS.values())
    committed = (ROOT / paper_model.RESULT).read_text()
    assert committed == table()
    rows = re.findall(r"^\| (\d+) \| (\d+ \+ \d+) \| ([\d.]+) \| ([\d,]+) \|", committed, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(GPUS)
    told = (ROOT / "benchmarks" / "README.md").read_text()
    assert re.findall(r"^\| (\d+) \| (\d+ \+ \d+) \| ([\d.]+) \| ([\d,]+) \|", told, re.MULTILINE) == rows


def test_the_page_names_every_command() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    modules = [path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "__init__"]
    assert [name for name in [*modules, "gpu"] if f"`{name}" not in page] == []
