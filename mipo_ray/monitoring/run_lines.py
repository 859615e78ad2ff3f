"""What a run is doing as words and as values, for lines of a log, for a live view and for machines. Pure."""

from __future__ import annotations

from typing import Any

from mipo_ray.monitoring.run_state import Phase, RunState, StageState


def line(state: StageState, run: RunState, now: float) -> str:
    """A stage under way in one line."""
    left = run.seconds_left(now)
    parts = [status(state, now), *details(state.phase)]
    of_phase = None if state.phase is None else state.phase.seconds_left(now)
    ends = [] if of_phase is None else [f"{duration(of_phase)} left"]
    ends += [] if left is None else [f"run {duration(left)} left"]
    return "; ".join([f"{state.label}  {', '.join(parts)}", *([", ".join(ends)] if ends else [])])


def status(state: StageState, now: float) -> str:
    """How far a stage is, or what it waits for: "64 of 96 rows (67%)", "waits for engines to start, 12 s"."""
    phase = state.phase
    if phase is None:
        return f"at work, {duration(now - state.since)}"
    if phase.waits_for:
        return f"waits for {phase.waits_for}, {duration(now - phase.waits_since)}"
    if phase.total is None:
        return f"{phase.done:,} {phase.unit}"
    return f"{phase.done:,} of {phase.total:,} {phase.unit} ({phase.done / max(phase.total, 1):.0%})"


def details(phase: Phase | None) -> list[str]:
    """The numbers of a phase that is on its way."""
    if phase is None or phase.waits_for:
        return []
    numbers, speed = phase.numbers, phase.tokens_per_second
    parts = [] if not phase.answers else [f"{phase.answers:,} answers", f"{phase.tokens:,} tokens"]
    parts += [] if speed is None else [f"{speed:,.0f} tokens/s"]
    parts += [] if not phase.pairs else [f"{phase.kept:,} pairs kept", f"{phase.pairs - phase.kept:,} dropped"]
    parts += [] if "loss" not in numbers else [f"loss {numbers['loss']:.4f}"]
    parts += [] if "reward_margin" not in numbers else [f"margin {numbers['reward_margin']:+.3f}"]
    parts += [] if "reward_accuracy" not in numbers else [f"accuracy {numbers['reward_accuracy']:.2f}"]
    parts += [] if "memory_bytes" not in numbers else [f"memory {numbers['memory_bytes'] / 1024**3:.1f} GiB"]
    return parts


def values(state: StageState, run: RunState, now: float) -> dict[str, Any]:
    """The same for machines; seconds, bytes and counts, without those that are not known."""
    phase, (round_index, stage) = state.phase, state.key
    found: dict[str, Any] = {"event": "progress", "time": now, "round": round_index, "stage": stage}
    if phase is not None:
        found |= {"phase": phase.name, "unit": phase.unit, "done": phase.done, "total": phase.total}
        if phase.waits_for:
            found |= {"waits_for": phase.waits_for, "waits_seconds": round(now - phase.waits_since, 1)}
        found |= {"answers": phase.answers or None, "tokens": phase.tokens or None}
        found |= {"tokens_per_second": phase.tokens_per_second, "seconds_left": phase.seconds_left(now)}
        found |= {"pairs_kept": phase.kept, "pairs_dropped": phase.pairs - phase.kept} if phase.pairs else {}
        found |= {name: value for name, value in phase.numbers.items() if name != "tokens_per_second"}
    found["run_seconds_left"] = run.seconds_left(now)
    found = {
        name: round(value, 1) if name.endswith("seconds_left") and value else value for name, value in found.items()
    }
    return {name: value for name, value in found.items() if value is not None or name == "round"}


def duration(seconds: float) -> str:
    """A time for people: "8 s", "3 min 20 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
