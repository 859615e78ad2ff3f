"""What every command of this package does around its work: mistakes and stops become a line and an exit code."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable

from mipo_ray.errors import UserError
from mipo_ray.stop_signals import stop_signals


def run_command(work: Callable[[], int], *, resumes: bool) -> int:
    """Runs a command's work and returns its exit code, or 2 for a UserError, 130 for Ctrl-C, 143 for SIGTERM.

    `resumes`: whether the same command goes on where it was stopped, which its last line then says.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that a terminal cannot show must not end a run
            stream.reconfigure(errors="backslashreplace")
    with stop_signals() as signals:
        try:
            return work()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (KeyboardInterrupt, SystemExit) as error:
            if signals.received is None and getattr(error, "code", None) != signal.SIGTERM:
                raise
            # While it starts, Ray turns SIGTERM into its number as exit code.
            number = signals.received or signal.SIGTERM
            hint = ": the same command resumes this run" if resumes else ""
            print(f"stopped by {number.name}{hint}", file=sys.stderr, flush=True)
            return 128 + number
