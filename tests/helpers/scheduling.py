"""Which test process runs which files, where pytest-xdist starts several: each has a Ray cluster of its own."""

from __future__ import annotations

import functools
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

# Fixtures of minutes: all files that read one are run by one process, which makes it once.
LONG_FIXTURES = ("golden_run", "real_tasks")


# Files of minutes that share nothing with others.
LONG_FILES = ("test_training_ray.py", "test_strategies.py", "test_autoscaling.py", "test_job_submission.py")


@functools.cache
def long_fixture(path: Path) -> str | None:
    """The long fixture that a file of tests reads, the first of them."""
    text = path.read_text(encoding="utf-8")
    return next((name for name in LONG_FIXTURES if name in text), None)


def turn(path: Path) -> int:
    """When a file is begun: what takes longest first, so that no process is left with it at the end."""
    if long_fixture(path) is not None:
        return 0
    return 1 if path.name in LONG_FILES else 2


class FilesByFixture(LoadScopeScheduling):
    """A file stays in one process, and so do all files that read the same long fixture."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return long_fixture(self.config.rootpath / file) or file
