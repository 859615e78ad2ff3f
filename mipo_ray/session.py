"""One stage of a run: done once, reported, and committed with its manifest."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mipo_ray.config.schema import Config
from mipo_ray.evaluation.judge.scores import describe
from mipo_ray.monitoring.events import Events
from mipo_ray.storage.run_directory import RunDirectory


def once(
    config: Config,
    run: RunDirectory,
    round_index: int | None,
    stage_name: str,
    events: Events,
    work: Callable[[Events], dict[str, Any]],
) -> dict[str, Any]:
    """Runs a stage and commits it, unless it is finished already. Returns its manifest.

    `work` does the stage's work, reports to the events of the stage, and returns the facts of the manifest; `files` or
    `pairs` among them are the files that make up the stage (default: all that lie there).
    """
    stage = run.stage(round_index, stage_name)
    label = f"{'base   ' if round_index is None else f'round {round_index}'}  {stage_name:<8}"
    manifest = run.read_manifest(stage)
    if manifest is not None:
        print(f"{label}  finished before", flush=True)
        return manifest
    stage_events = events.at(round_index, stage_name)
    started = time.monotonic()
    print(f"{label}  started", flush=True)
    stage_events.emit({"event": "stage_start"})
    facts = work(stage_events)
    seconds = time.monotonic() - started
    files = facts.get("files", facts.get("pairs"))
    manifest = run.commit(stage, config, {"round": round_index, "seconds": seconds, **facts}, files=files)
    written = sum(manifest["files"].values())
    stage_events.emit({"event": "stage", "stage_seconds": seconds, "written_bytes": written})
    events.flush()
    print(f"{label}  done in {seconds:.0f} s{_summary(stage_name, manifest)}", flush=True)
    return manifest


def _summary(stage_name: str, manifest: dict[str, Any]) -> str:
    """What a stage's line says beyond its duration."""
    if stage_name == "generate":
        statistics = manifest["statistics"]
        return f": {statistics['kept']} pairs kept of {statistics['rows']}, {statistics['generated_tokens']} tokens"
    if stage_name == "train":
        summary = manifest["summary"]
        return f": {summary['steps']} steps, loss {summary['first_loss']:.4f} -> {summary['last_loss']:.4f}"
    if stage_name.startswith("judge/"):
        return f": {describe(manifest['evaluation']['metrics'])}"
    return f": {manifest['responses']} held-out responses"
