"""What stages and actors tell while they work, and what the writer of events keeps of it.

python -m pytest tests/unit/monitoring/test_progress.py
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mipo_ray.generation.engine import _gather_rows
from mipo_ray.monitoring import progress as module
from mipo_ray.monitoring import trackers
from mipo_ray.monitoring.events import EventWriter, read_events
from mipo_ray.monitoring.progress import Tally, progress
from mipo_ray.storage.run_directory import open_run
from mipo_ray.training.ray_worker import peak_memory


class FakeEvents:
    """Keeps what is told."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def tell(self, event: dict[str, Any]) -> None:
        self.told.append(event)


def test_a_phase_begins_and_ends_also_where_it_fails() -> None:
    events: Any = FakeEvents()
    with progress(events, "answer", "rows", 20):
        pass
    with pytest.raises(ValueError, match="broken"), progress(events, "train", "steps"):
        raise ValueError("broken")
    assert events.told == [
        {"event": "phase_start", "phase": "answer", "unit": "rows", "total": 20},
        {"event": "phase_end", "phase": "answer"},
        {"event": "phase_start", "phase": "train", "unit": "steps"},
        {"event": "phase_end", "phase": "train"},
    ]


def test_counts_are_told_once_a_second_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    events: Any = FakeEvents()
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    tally = Tally(events)
    for _ in range(50):
        tally.answered(2, 30)
        clock[0] += 0.1
    tally.tell()
    tally.tell()
    assert 5 <= len(events.told) <= 7
    sums = {name: sum(event[name] for event in events.told) for name in ("rows", "answers", "tokens")}
    assert sums == {"rows": 50, "answers": 100, "tokens": 1500}


def test_a_row_is_heard_of_when_all_of_it_is_done() -> None:
    order: list[Any] = []

    async def answer(item: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(item["seconds"])
        order.append(item["seconds"])
        return item

    rows = [[{"seconds": 0.08}, {"seconds": 0.02}], [{"seconds": 0.04}], []]
    results = asyncio.run(_gather_rows(answer, rows, lambda row: order.append(len(row))))
    assert results == rows
    assert [found for found in order if found != 0] == [0.02, 0.04, 1, 0.08, 2]


def test_what_is_told_is_heard_once_and_written_nowhere(tmp_path: Path) -> None:
    run = open_run(str(tmp_path))
    writer = EventWriter(run)
    where = {"round": 0, "stage": "generate"}
    writer.tell({**where, "event": "answered", "rows": 1})
    writer.emit({**where, "event": "generated", "rows": 8, "generated_tokens": 100})
    writer.emit({**where, "event": "generated", "rows": 4, "generated_tokens": 50})
    news = writer.news()
    assert [event["event"] for event in news] == ["answered", "generated", "generated"]
    assert all(event["time"] > 0 for event in news)
    assert writer.news() == []
    assert writer.total(0, "generate", "generated_tokens") == 150
    assert writer.total(1, "generate", "generated_tokens") == 0
    writer.close(True)
    assert [event["event"] for event in read_events(run)] == ["generated", "generated"]


def test_a_tracker_that_fails_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in an actor, whose lines are among those of libraries."""
    writer = EventWriter(open_run(str(tmp_path)))
    writer.open_trackers(["tensorboard"], {})

    def fail(*_: Any) -> None:
        raise ConnectionError("away")

    monkeypatch.setattr(trackers.TensorBoard, "log", fail)
    writer.emit({"round": None, "stage": "run", "event": "results", "loss": 1.0})
    (warning,) = [event for event in writer.news() if event["event"] == "warning"]
    assert warning["text"] == "tracker tensorboard failed and gets no more numbers: ConnectionError: away"


def test_the_memory_of_a_worker_on_a_cpu_is_its_own() -> None:
    """In bytes: beside what the kernel says of this process, in KiB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    assert peak_memory("cpu") == pytest.approx(int(line.split()[1]) * 1024, rel=0.1)
