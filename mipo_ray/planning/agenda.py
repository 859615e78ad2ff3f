"""What a run has still to do, for whoever watches it, and what its stages took where that was measured before."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mipo_ray.monitoring.event_lines import parse_events
from mipo_ray.monitoring.run_state import Agenda, Event, StageKey
from mipo_ray.planning.plan import Plan


def agenda_of(plan: Plan, stages: Sequence[str] | None = None) -> Agenda:
    """The stages of a run (None: all of its plan), and the seconds that such stages took: in its own earlier attempts,
    and in earlier runs."""
    own = stage_seconds(parse_events(plan.run.read_text("metrics.jsonl") or ""))
    return agenda(plan.stages if stages is None else stages, plan.finished, {**_of_earlier_runs(plan), **own})


def agenda(stages: Sequence[str], finished: Collection[str], seconds: dict[str, float]) -> Agenda:
    """The agenda of stages by their directories. All tasks of a policy are one stage while they are worked on."""
    keys: dict[StageKey, list[bool]] = {}
    for stage in stages:
        keys.setdefault(stage_key(stage), []).append(stage in finished)
    return Agenda(tuple(keys), frozenset(key for key, done in keys.items() if all(done)), seconds)


def stage_key(directory: str) -> StageKey:
    """The key of a stage by its directory: "base/evaluate", "rounds/000/generate", "rounds/000/tasks/NAME"."""
    first, _, rest = directory.partition("/")
    number = None
    if first == "rounds":
        first, _, rest = rest.partition("/")
        number = int(first)
    return number, "tasks" if rest.startswith("tasks/") else rest


def stage_seconds(events: Sequence[Event]) -> dict[str, float]:
    """What each stage took when it was last done without an interruption, by name."""
    starts: dict[StageKey, int] = {}
    seconds: dict[str, float] = {}
    for event in events:
        key = (event.get("round"), str(event.get("stage")))
        if event.get("event") == "stage_start":
            starts[key] = starts.get(key, 0) + 1
        elif event.get("event") == "stage" and starts.pop(key, 0) == 1 and "stage_seconds" in event:
            seconds[key[1]] = float(event["stage_seconds"])
    return seconds


def _of_earlier_runs(plan: Plan) -> dict[str, float]:
    """By the device seconds of rounds like the planned ones, on the engines and workers that there are now."""
    config, resources = plan.config, plan.resources
    measured = plan.earlier.measured(on_gpu=resources.on_gpu)
    if measured is None:
        return {}
    generate, train = measured.seconds(plan.most_pairs, config.train.epochs)
    engines = plan.lifetime.most * (resources.gpus_per_engine or 1)
    workers = config.train.num_workers * (resources.gpus_per_worker or 1)
    return {"generate": generate / engines, "train": train / workers}
