"""Every command under one name: `mipo-ray COMMAND ...` is `python -m mipo_ray.COMMAND ...`.

    mipo-ray run jobs/NAME.yaml train.beta=0.2
    mipo-ray pairs export runs/mine --format trl --output pairs

`mipo-ray COMMAND --help` lists what a command takes. Exit codes are the command's own.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

import mipo_ray
from mipo_ray.terminal import say, say_error

# Command -> the module with its `main`, and what it does.
COMMANDS = {
    "run": ("mipo_ray.run", "improve a model: the demo, or a recipe"),
    "evaluate": ("mipo_ray.evaluate", "measure accuracy tasks, and have answers judged"),
    "compare": ("mipo_ray.compare", "train baselines and kinds of MIPO on the same pairs"),
    "chat": ("mipo_ray.chat.__main__", "ask a run's policies, in the terminal or on a local page"),
    "pairs": ("mipo_ray.pairs.__main__", "hand a run's preference pairs to other tools"),
    "publish": ("mipo_ray.publish.__main__", "put a run's model on the Hugging Face Hub, with a card"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        say(_help())
        return 0 if words else 2
    if words[0] == "--version":
        say(f"mipo-ray {mipo_ray.__version__}")
        return 0
    if words[0] not in COMMANDS:
        nearest = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        say_error(f"error: expected a command ({', '.join(COMMANDS)}), found {words[0]}{hint}")
        return 2
    code: int = importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])
    return code


def _help() -> str:
    lines = [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join([str(__doc__).strip(), "", "commands:", *lines])


if __name__ == "__main__":
    sys.exit(main())
