"""Stopping a run from outside: Ctrl-C, and the SIGTERM of `ray job stop`, Kubernetes and `kill`; and what stops with
it, a thread beside a block of the driver."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_STOPS = (signal.SIGINT, signal.SIGTERM)
_AGAIN_SECONDS = 0.1


class StopSignals:
    """Makes a signal raise KeyboardInterrupt in the main thread, which blocks of `with` and `finally` tidy up after.

    Ray passes that one on from a waiting `ray.get`, and turns or swallows others. Where Python itself has to swallow
    it, in a destructor or a callback of C, it is raised again a moment later (`raise_again`).
    """

    received: signal.Signals | None = None
    _was_swallowed = False

    def listen(self) -> None:
        """Registers, in the main thread.

        A signal that this process was started to ignore, as in the background of a shell script, stays ignored.
        """
        for number in _STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        # A second SIGTERM (`ray job stop` tells every process, Kubernetes after its hook) must not disturb the tidying
        # up. A second Ctrl-C may: somebody sits there who does not want to wait for it.
        if self.received is None or self._was_swallowed or number == signal.SIGINT:
            self.received = self.received or signal.Signals(number)
            self._was_swallowed = False
            raise KeyboardInterrupt

    def raise_again(self, swallowed: sys.UnraisableHookArgs) -> bool:
        """Whether what Python could not raise was this; then it is raised anew, when the main thread has gone on."""
        if self.received is None or not issubclass(swallowed.exc_type, KeyboardInterrupt):
            return False
        self._was_swallowed = True
        main = threading.main_thread().ident or 0
        again = threading.Timer(_AGAIN_SECONDS, signal.pthread_kill, (main, self.received))
        again.daemon = True
        again.start()
        return True


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Listens while the block runs, and gives the signals back to those who had them before."""
    signals = StopSignals()
    tell = sys.unraisablehook
    with kept_handlers():
        signals.listen()
        sys.unraisablehook = lambda swallowed: None if signals.raise_again(swallowed) else tell(swallowed)
        try:
            yield signals
        finally:
            sys.unraisablehook = tell


@contextlib.contextmanager
def kept_handlers() -> Iterator[None]:
    """After the block the handlers are those of before: `ray.init` registers one of its own for SIGTERM."""
    before = {number: signal.getsignal(number) for number in _STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # one that is not Python's
                signal.signal(number, handler)


@contextlib.contextmanager
def thread_beside(work: Callable[[threading.Event], None], name: str) -> Iterator[None]:
    """Runs `work(stop)` in a thread while the block runs; at its end, however it ends, sets `stop` and waits for it."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
