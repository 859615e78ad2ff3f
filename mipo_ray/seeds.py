"""Seeds that depend on what they are for, never on where or in which order the work runs."""

from __future__ import annotations

import hashlib
import json


def stable_seed(*parts: str | int) -> int:
    """A seed in [0, 2**63) from the SHA-256 hash of `parts`: the same in every process, on every machine.

    `stable_seed("ab", "c")` and `stable_seed("a", "bc")` differ, as do `stable_seed(1)` and `stable_seed("1")`.
    """
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
