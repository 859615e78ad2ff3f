"""Whether a checkpoint is whole, and which one to go on from where the newest is not.

Each worker notes the size and the checksum of every file of its shard beside them. Before a checkpoint is read they are
compared: storage that failed, or was tidied up by hand, may have lost a file or a part of one, and of weights that are
half others nobody would be told.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import distributed

from mipo_ray.errors import UserError
from mipo_ray.storage.faults import StorageFault, named
from mipo_ray.terminal import say_error

PROGRESS = "progress.json"
# In it: that there are notes. Without them an upload that was cut off would look like an earlier release's checkpoint.
NOTED = "noted"


class CheckpointRefused(UserError):
    """A checkpoint that this training cannot go on from. All workers find it together, and would again."""


def note_files(shard: Path, rank: int) -> None:
    """Writes files-RANK.json into a worker's shard: each of its files with bytes and SHA-256."""
    files = {
        path.relative_to(shard).as_posix(): [path.stat().st_size, _checksum(path)]
        for path in sorted(shard.rglob("*"))
        if path.is_file()
    }
    (shard / f"files-{rank}.json").write_text(json.dumps(files))


def find_damage(checkpoint: Path, ranks: Collection[int]) -> str:
    """What is wrong with a checkpoint of all shards, "" where nothing is.

    Sizes are compared for every shard, checksums for those of `ranks`. Of a checkpoint of an earlier release, whose
    progress says nothing of notes and which has none, nothing is known. Raises OSError where the disk fails, which says
    nothing of the checkpoint.
    """
    notes = {int(path.stem.removeprefix("files-")): path for path in checkpoint.glob("files-*.json")}
    try:
        facts = json.loads((checkpoint / PROGRESS).read_text())
        if not notes and NOTED not in facts:
            return ""
        workers = int(facts["workers"])
        if missing := sorted(set(range(workers)) - notes.keys()):
            return f"files-{missing[0]}.json is missing"
        for rank in range(workers):
            for name, (size, checksum) in json.loads(notes[rank].read_text()).items():
                path = checkpoint / name
                if not path.is_file():
                    return f"{name} is missing"
                if path.stat().st_size != size:
                    return f"{name}: expected {size:,} bytes, found {path.stat().st_size:,}"
                if rank in ranks and _checksum(path) != checksum:
                    return f"{name}: expected what was written, found other bytes"
    except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError) as error:
        return f"its notes cannot be read ({type(error).__name__})"
    return ""


@contextlib.contextmanager
def first_whole(
    where: str,
    names: Sequence[str],
    open_checkpoint: Callable[[str], AbstractContextManager[Path]],
    warn: Callable[[str], None] = say_error,
) -> Iterator[Path | None]:
    """The directory of the first of the checkpoints `names` in `where` that is whole, None where none is, or none is
    there; `warn` is told, by rank 0, which were passed over, and why.

    Every worker must call it, with the newest first; where their names differ, rank 0's hold. Raises StorageFault, on
    all of them, where one meets a fault of a disk or a store: a checkpoint is not damaged for that.
    """
    damages: list[str] = []
    for name in gathered(list(names))[0]:
        with contextlib.ExitStack() as stack:
            directory, damage, fault = None, "", ""
            try:
                with named(f"{where}/{name}", "read"):
                    directory = stack.enter_context(open_checkpoint(name))
                    damage = find_damage(directory, _own_ranks(directory))
            except StorageFault as error:
                fault = str(error)
            except OSError as error:  # it is not there
                damage = f"cannot be read: {error}"
            everywhere = gathered((damage, fault))
            if met := next((fault for _, fault in everywhere if fault), ""):
                raise StorageFault(met)
            damage = next((found for found, _ in everywhere if found), "")
            if not damage and directory is not None:
                if damages and distributed.get_rank() == 0:
                    warn(f"warning: training goes on from {name}, since {'; '.join(damages)}")
                yield directory
                return
            damages.append(f"{name}: {damage}")
    if damages and distributed.get_rank() == 0:
        warn(
            f"warning: training starts from the beginning of the round, since no checkpoint in {where} is as it was "
            f"written: {'; '.join(damages)}"
        )
    yield None


def _own_ranks(checkpoint: Path) -> Collection[int]:
    """The shards that this worker reads: its own and rank 0's or, where another number of workers wrote it, all."""
    written = len(list(checkpoint.glob("files-*.json")))
    return {0, distributed.get_rank()} if written == distributed.get_world_size() else range(written)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def gathered(value: Any) -> list[Any]:
    """The value of every worker, by rank."""
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
