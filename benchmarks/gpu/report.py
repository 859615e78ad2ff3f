"""The GPU check's rows as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

GIB = 2**30
Row = dict[str, Any]


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """All parts, each with the machine that it ran on."""
    sections = []
    for name, part in found.items():
        title, describe = _PARTS[name]
        lines = [f"## {title}", "", *describe(part["rows"])] if part["rows"] else [f"## {title}"]
        lines += ["", f"{part['machine']}; seed {part['seed']}, medians of {part['repeats']} steps."]
        if part["error"]:
            lines += ["", f"Not whole: {part['error']}"]
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"


def _agreement(rows: Sequence[Row]) -> list[str]:
    table = _table(["precision", "layout", "attention", "loss", "of the loss", "of the gradient", "allowed", ""])
    for row in rows:
        table.append(
            _line(
                [
                    row["dtype"],
                    row["layout"],
                    row["attention"],
                    f"{row['loss']:.6f}",
                    f"{row['loss_difference']:.1e}",
                    f"{row['gradient_difference']:.1e}",
                    " / ".join(f"{bound:.1e}" for bound in row["allowed"]),
                    "" if row["within"] else "**beyond**",
                ]
            )
        )
    return [*table, "", "Differences to plain torch in float32: of the loss in nats, of all gradients by their norm."]


def _speed(rows: Sequence[Row]) -> list[str]:
    baseline = {row["shape"]: row for row in rows if row["trainer"] == "trl" and "error" not in row}
    table = _table(
        [
            "model",
            "prompt/response",
            "pairs",
            "trainer",
            "pairs/s",
            "to TRL",
            "utilisation",
            "peak GiB",
            "to TRL",
            "estimated",
        ]
    )
    for row in rows:
        place = [row["model"], row["shape"], row["pairs"], row["trainer"]]
        if "error" in row:
            table.append(_line([*place, row["error"], *[""] * 5]))
            continue
        trl = baseline.get(row["shape"])
        estimated = row.get("estimated_bytes")
        table.append(
            _line(
                [
                    *place,
                    f"{row['pairs_per_second']:.2f}",
                    "" if trl is None else f"{row['pairs_per_second'] / trl['pairs_per_second']:.2f}x",
                    f"{row['utilisation']:.1%}",
                    f"{row['peak_bytes'] / GIB:.1f}",
                    "" if trl is None else f"{row['peak_bytes'] / trl['peak_bytes']:.2f}x",
                    "" if estimated is None else f"{estimated / GIB:.1f}",
                ]
            )
        )
    return table


def _head(rows: Sequence[Row]) -> list[str]:
    table = _table(["what", "ms", "peak GiB above inputs"])
    for row in rows:
        grown = "" if row["grown_bytes"] is None else f"{row['grown_bytes'] / GIB:.2f}"
        table.append(_line([row["what"], f"{1000 * row['median_seconds']:.1f}", grown]))
    return table


def _zero(rows: Sequence[Row]) -> list[str]:
    table = _table(
        ["setting", "last loss", "first loss after resuming, off by", "checkpoint GiB", "peak GiB", "estimated GiB"]
    )
    for row in rows:
        if "error" in row:
            table.append(_line([row["setting"], row["error"].strip().splitlines()[-1], *[""] * 4]))
            continue
        table.append(
            _line(
                [
                    row["setting"],
                    f"{row['losses'][-1]:.6f}",
                    f"{row['resume_difference']:.1e}",
                    f"{row['checkpoint_bytes'] / GIB:.2f}",
                    f"{row['peak_bytes'] / GIB:.2f}",
                    f"{row['estimated_bytes'] / GIB:.2f}",
                ]
            )
        )
    return table


def _table(columns: Sequence[str]) -> list[str]:
    return [_line(columns), "|" + "---|" * len(columns)]


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


_PARTS: dict[str, tuple[str, Callable[[Sequence[Row]], list[str]]]] = {
    "agreement": ("The same numbers as plain torch", _agreement),
    "speed": ("Beside TRL's DPOTrainer", _speed),
    "head": ("The output head alone", _head),
    "large": ("A larger model", _speed),
    "zero": ("ZeRO, offload, checkpoints", _zero),
}
