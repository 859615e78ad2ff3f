"""Writes the personalization prompt files from users.jsonl and questions.jsonl.

python -m mipo_ray.examples
"""

from __future__ import annotations

import json

from mipo_ray.examples import CROSSINGS, EXAMPLES_DIRECTORY, Crossing, cross
from mipo_ray.terminal import say


def render(crossing: Crossing) -> str:
    """The content of one personalization file, as JSONL; the same at every call."""
    users, questions = (_read(name) for name in ("users", "questions"))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in cross(users, questions, crossing))


def main() -> None:
    """Writes every file of CROSSINGS beside the files it is made from."""
    for crossing in CROSSINGS:
        path = EXAMPLES_DIRECTORY / f"{crossing.name}.jsonl"
        path.write_text(render(crossing), encoding="utf-8")
        say(f"{path}: {crossing.rows} rows of the {crossing.split} users and questions")


def _read(name: str) -> list[dict[str, str]]:
    text = (EXAMPLES_DIRECTORY / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


if __name__ == "__main__":
    main()
