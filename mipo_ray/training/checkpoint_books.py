"""Ray Train's list of a training's checkpoints, without which, or with a wrong one, it would not start.

It is written anew at each checkpoint, so that a kill may cut it off, and it names directories that whoever tidies up
may have removed. Where it is dropped, the checkpoints that are there are found by their notes (`whole_checkpoints`).
"""

from __future__ import annotations

import contextlib
import json

from mipo_ray.storage.faults import StorageFault
from mipo_ray.storage.run_directory import RunDirectory, StorageError

BOOKS = "checkpoint_manager_snapshot.json"


def drop_damaged_books(run: RunDirectory, checkpoints: str) -> str:
    """Removes the list in the directory `checkpoints` of the run where it cannot be read or names a checkpoint that is
    gone; returns what was wrong with it, "" where nothing was. Raises StorageFault where that cannot be told."""
    name = f"{checkpoints}/{BOOKS}"
    try:
        text = run.read_text(name)
        listed = [] if text is None else [one["checkpoint_dir_name"] for one in json.loads(text)["checkpoint_results"]]
    except StorageFault:
        raise
    except (StorageError, ValueError, KeyError, TypeError, RecursionError):
        wrong = "cannot be read"
    else:
        there = {file.partition("/")[0] for file in run.list_files(checkpoints)} if listed else set()
        gone = sorted(set(listed) - there)
        wrong = f"names {gone[0]}, which is gone" if gone else ""
    if wrong:
        with contextlib.suppress(FileNotFoundError):
            run.filesystem.rm_file(run.path(name))
    return wrong
