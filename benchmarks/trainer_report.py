"""The trainer benchmark's tables as Markdown."""

from __future__ import annotations

from typing import Any

GIB = 2**30


def markdown(tables: dict[str, dict[str, Any]]) -> str:
    """All tables, each with the machine that it was measured on."""
    known = {"check": _check, "trl": _trl, "own": _own, "memory": _memory}
    parts = [known[name](name, table) for name, table in tables.items()]
    return (
        "\n\n".join(
            f"{part}\n\n{table['machine']}; seed {table['seed']}."
            for part, table in zip(parts, tables.values(), strict=True)
        )
        + "\n"
    )


def _check(name: str, table: dict[str, Any]) -> str:
    steps = len(next(iter(table["losses"].values())))
    return (
        f"## Losses\n\nOver {steps} steps from the same weights on the same pairs, the losses of "
        f"{' / '.join(table['losses'])} differ by {table['worst_difference']:.1e} nats at most (learning rate "
        f"{table['learning_rate']}; the loss moves by up to {table['largest_move']:.2g} from ln 2)."
    )


def _trl(name: str, table: dict[str, Any]) -> str:
    lines = [
        "| prompt/response | pairs | reference | checkpointing | pairs/s, TRL | pairs/s, ours | speed (rounds) "
        "| by FLOPs | tokens/s, TRL | tokens/s, ours | peak GiB, TRL | peak GiB, ours | peak "
        "| TFLOP, TRL | TFLOP, ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table["rows"]:
        trl, ours, ratio = row["trl"], row["ours"], row["ratio"]
        low, high = ratio["speed_range"]
        cells = [
            row["shape"],
            row["pairs"],
            row["reference"],
            {0: "no", 1: "ours", 2: "both"}[len(row["checkpointing"])],
            f"{trl['pairs_per_second']:.3f}",
            f"{ours['pairs_per_second']:.3f}",
            f"**{ratio['speed']:.2f}x** ({low:.2f} - {high:.2f})",
            f"{ratio['flops']:.2f}x",
            f"{trl['tokens_per_second']:.0f}",
            f"{ours['tokens_per_second']:.0f}",
            f"{trl['peak_bytes'] / GIB:.2f}",
            f"{ours['peak_bytes'] / GIB:.2f}",
            f"**{ratio['peak_bytes']:.2f}x**",
            f"{trl['flops'] / 1e12:.2f}",
            f"{ours['flops'] / 1e12:.2f}",
        ]
        lines.append(_line(cells))
    repeats = len(table["rows"][0]["trl"]["seconds"])
    return "\n".join(
        [
            "## Beside TRL's DPOTrainer\n",
            *lines,
            "",
            f"SmolLM2-135M-Instruct, float32, {table['threads']} threads, one optimizer step in one forward pass, "
            f"fused AdamW, gradients clipped at 1.0; medians of {repeats} steps, the trainers in turns, each in a "
            "process of its own. Ratios are ours to TRL; in brackets the extreme rounds. Tokens are those of all "
            "sequences, the prompt counted for each response, without padding. Peak: resident memory of the process. "
            "Reference cached: its log-probs were computed before (TRL: precompute_ref_log_probs). Checkpointing: who "
            "computes activations again in backward. TRL's padding_free turns itself off in this version; its fused LM "
            "head, which is on, scores every position on a CPU. FLOPs are counted by torch, of matrix products and "
            "attention, masked or not.",
        ]
    )


def _own(name: str, table: dict[str, Any]) -> str:
    lines = [
        "| prompt/response | pairs | reference | checkpointing | layout | pairs/s | tokens/s | padding | peak GiB "
        "| TFLOP |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table["rows"]:
        cells = [
            row["shape"],
            row["pairs"],
            row["reference"],
            "yes" if row["checkpointing"] else "no",
            row["layout"],
            f"{row['pairs_per_second']:.3f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['padding_share']:.1%}",
            f"{row['peak_bytes'] / GIB:.2f}",
            f"{row['flops'] / 1e12:.2f}",
        ]
        lines.append(_line(cells))
    return "\n".join(
        [
            "## Our layouts, reference modes and gradient checkpointing\n",
            *lines,
            "",
            f"As above; medians of {len(table['rows'][0]['seconds'])} steps, the three layouts in turns. Reference "
            "adapter trains LoRA of rank 16, the others all weights.",
        ]
    )


def _memory(name: str, table: dict[str, Any]) -> str:
    lines = [
        "| prompt | response | tokens through the policy | peak MiB | predicted MiB | kept for backward MiB | "
        "full logits MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table["rows"]:
        sizes = ("grown_bytes", "predicted_bytes", "kept_bytes", "full_logits_bytes")
        cells = [row["prompt"], row["response"], row["forward_tokens"], *(f"{row[size] / 2**20:.0f}" for size in sizes)]
        lines.append(_line(cells))
    return "\n".join(
        [
            "## Memory by length\n",
            *lines,
            "",
            "One pair, layout shared, forward and backward pass, each row in a fresh process; the peak is resident "
            "memory above weights and gradients. Predicted: what is kept for backward, from the tensors of the first "
            f"three rows, one chunk of logits (at most {table['chunk_bytes'] / 2**20:.0f} MiB), and the gradients of "
            "the head's weight and input. Full logits: [tokens, vocabulary] in float32, which are never made.",
        ]
    )


def _line(cells: list[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
