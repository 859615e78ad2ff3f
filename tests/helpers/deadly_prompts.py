"""A fault for real engines: a certain prompt kills them as soon as it comes, as the kernel does where memory runs out.

It is a logits processor of vLLM, which runs in the engine's core, the process beside the actor.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor

# A prompt that holds the same token so many times in a row is deadly: of the tiny model's tokenizer as of any other,
# that of DEADLY_TEXT is one. No chat template holds it, nor do the probes.
REPEATED = 6
DEADLY_TEXT = "~" * REPEATED


class KillsCore(LogitsProcessor):
    """Ends the core of the engine."""

    def __init__(self, *_: Any) -> None:
        self._victim = os.getpid()

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        for _, _, prompt, _ in () if batch_update is None else batch_update.added:
            if any(len(set(prompt[start : start + REPEATED])) == 1 for start in range(len(prompt) - REPEATED + 1)):
                os.kill(self._victim, signal.SIGKILL)

    def apply(self, logits: Any) -> Any:
        return logits


class KillsActor(KillsCore):
    """Ends the actor that has the engine, of which nobody hears a word then."""

    def __init__(self, *_: Any) -> None:
        self._victim = os.getppid()
