"""The events of a run of one round, as its stages send them.

Stages, engines, blocks and training steps are those of a run of the demo with `rounds=1` on two cores, rounded; the
counts between them (`answered`, `assembled`) are set so that they add up to its blocks.
"""

from __future__ import annotations

from typing import Any

START = 1_700_000_000.0  # seconds since the epoch
ENGINE = "9d0bba8a"

Event = dict[str, Any]


def recorded_events() -> list[Event]:
    """Every event in order, from 0 to 205 s after START."""
    return [*_base(), *_generate(), *_train(), *_evaluate()]


def until(seconds: float) -> list[Event]:
    """Those of the first `seconds`."""
    return [event for event in recorded_events() if event["time"] <= START + seconds]


def _event(seconds: float, round_index: int | None, stage: str, kind: str, **values: Any) -> Event:
    return {"time": START + seconds, "round": round_index, "stage": stage, "event": kind, **values}


def _base() -> list[Event]:
    def event(seconds: float, kind: str, **values: Any) -> Event:
        return _event(seconds, None, "evaluate", kind, **values)

    return [
        event(0.0, "stage_start"),
        event(0.5, "phase_start", phase="answer", unit="rows", total=20),
        event(14.9, "engine_start", engine=ENGINE, engine_starts=1, engine_start_seconds=12.0),
        event(15.0, "ready", engine=ENGINE),
        event(25.0, "answered", rows=5, answers=10, tokens=600),
        event(30.7, "answered", rows=15, answers=30, tokens=1831),
        *(event(30.8, "generated", engine=ENGINE, rows=rows, generated_tokens=810) for rows in (4, 8, 8)),
        event(30.9, "phase_end", phase="answer"),
        event(31.0, "phase_start", phase="score", unit="responses", total=70),
        event(36.0, "ready"),
        *(event(36.0 + 5 * number, "scored", scored_responses=14) for number in range(1, 6)),
        event(61.2, "phase_end", phase="score"),
        event(61.8, "results", response_tokens=39.1),
        event(61.8, "stage", stage_seconds=61.8, written_bytes=115_794),
    ]


def _generate() -> list[Event]:
    def event(seconds: float, kind: str, **values: Any) -> Event:
        return _event(seconds, 0, "generate", kind, **values)

    return [
        event(61.9, "stage_start"),
        event(62.2, "phase_start", phase="generate", unit="rows", total=96),
        event(63.2, "ready", engine=ENGINE),
        event(73.2, "answered", rows=24, answers=48, tokens=1800),
        event(83.2, "answered", rows=24, answers=48, tokens=1800),
        event(88.0, "answered", rows=24, answers=48, tokens=1880),
        *(event(88.5, "generated", engine=ENGINE, rows=32, generated_tokens=2435) for _ in range(2)),
        *(event(88.6, "assembled", pairs=32, kept=8) for _ in range(2)),
        event(92.6, "answered", rows=24, answers=48, tokens=1880),
        event(92.7, "generated", engine=ENGINE, rows=32, generated_tokens=2490),
        event(92.8, "assembled", pairs=32, kept=8),
        event(92.8, "phase_end", phase="generate"),
        event(92.9, "dropped", reason="truncated", dropped_pairs=72),
        event(92.9, "pairs", rows=96, kept=24, generated_tokens=7360),
        event(92.9, "stage", stage_seconds=31.0, written_bytes=122_396),
    ]


def _train() -> list[Event]:
    def event(seconds: float, kind: str, **values: Any) -> Event:
        return _event(seconds, 0, "train", kind, **values)

    steps = [
        (113.8, 5.7, 0.6931, 0.0, 0.5),
        (117.9, 4.1, 0.6788, 0.030, 0.75),
        (122.6, 4.7, 0.6961, -0.004, 0.25),
        (126.6, 4.0, 0.6208, 0.156, 1.0),
        (131.3, 4.6, 0.6081, 0.180, 1.0),
        (135.3, 4.0, 0.5753, 0.254, 1.0),
    ]
    return [
        event(92.9, "stage_start"),
        event(93.0, "phase_start", phase="train", unit="steps"),
        event(104.0, "ready"),
        *(
            event(
                seconds,
                "train_step",
                step=step,
                total_steps=len(steps),
                step_seconds=took,
                loss=loss,
                reward_margin=margin,
                reward_accuracy=accuracy,
                tokens_per_second=700 / took,
                memory_bytes=3_328_599_655,
            )
            for step, (seconds, took, loss, margin, accuracy) in enumerate(steps)
        ),
        event(137.9, "phase_end", phase="train"),
        event(138.0, "stage", stage_seconds=45.1, written_bytes=541_614_860),
    ]


def _evaluate() -> list[Event]:
    def event(seconds: float, kind: str, **values: Any) -> Event:
        return _event(seconds, 0, "evaluate", kind, **values)

    return [
        event(138.0, "stage_start"),
        event(138.2, "phase_start", phase="answer", unit="rows", total=20),
        event(140.0, "weight_swap", engine=ENGINE, weight_swaps=1, weight_swap_seconds=0.5),
        event(140.0, "ready", engine=ENGINE),
        event(146.4, "answered", rows=20, answers=40, tokens=1459),
        event(146.5, "generated", engine=ENGINE, rows=20, generated_tokens=1459),
        event(146.6, "phase_end", phase="answer"),
        event(146.7, "phase_start", phase="score", unit="responses", total=90),
        event(152.0, "ready"),
        *(event(152.0 + 5 * number, "scored", scored_responses=9) for number in range(1, 11)),
        event(203.0, "phase_end", phase="score"),
        event(205.2, "results", response_tokens=36.5),
        event(205.3, "stage", stage_seconds=67.3, written_bytes=101_818),
    ]
