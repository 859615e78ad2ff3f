"""Writes the two locks of an accelerator from what uv resolved: the packages of the run, and those that tests add.

    python requirements/divide.py cpu       called by make lock

build/all.txt has every package with its hashes, build/run.txt those of the run. A build with a local version (torch's
+cpu) is not on the package index, so that uv sees the hashes of the one wheel that a folder has: those of the other
Pythons, which the lock knows already, stay.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent
BUILD = REQUIREMENTS.parent / "build"
PIN = re.compile(r"^([a-z0-9][a-z0-9.-]*==[^\s\\]+)((?:.*\\\n)*.*)", re.MULTILINE)
HASH = re.compile(r"--hash=(sha256:[0-9a-f]{64})")


def read(file: Path) -> dict[str, set[str]]:
    """Every pinned package of a requirements file (NAME==VERSION) -> its hashes."""
    text = file.read_text() if file.exists() else ""
    return {pin: set(HASH.findall(rest)) for pin, rest in PIN.findall(text)}


def write(file: Path, packages: dict[str, set[str]]) -> None:
    """Writes a requirements file that pip and uv install with --require-hashes."""
    for pin, hashes in packages.items():
        if not hashes:
            raise SystemExit(f"{file}: {pin}: expected hashes, found none")
    lines = [" \\\n    ".join([pin, *(f"--hash={one}" for one in sorted(hashes))]) for pin, hashes in packages.items()]
    file.write_text("\n".join(lines) + "\n")


def main(accelerator: str) -> None:
    """Divides what was resolved for an accelerator."""
    locks = [REQUIREMENTS / f"linux-x86_64-{accelerator}{part}.txt" for part in ("", "-test")]
    before = read(locks[0]) | read(locks[1])
    packages, run = read(BUILD / "all.txt"), read(BUILD / "run.txt")
    for pin in packages:
        if "+" in pin:
            packages[pin] |= before.get(pin, set())
    write(locks[0], {pin: packages[pin] for pin in run})
    write(locks[1], {pin: hashes for pin, hashes in packages.items() if pin not in run})


if __name__ == "__main__":
    main(sys.argv[1])
