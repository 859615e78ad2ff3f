"""What the configuration had and has no more. A recipe that names a field that is gone is told so, and a run that holds
one goes on; a value that has another name now is read as that one, in recipes and runs alike."""

from __future__ import annotations

from typing import Any, NamedTuple


class RemovedField(NamedTuple):
    """since: the first version without the field. instead: what holds now, or what to use."""

    since: str
    instead: str


REMOVED = {
    "train.micro_batch_size": RemovedField(
        "0.1.0", "micro-batches are filled by tokens: set train.micro_batch_tokens, tokens of one forward pass"
    ),
    "train.checkpoint_minutes": RemovedField(
        "0.1.0", "checkpoints come every 30 minutes, or by steps: set train.checkpoint_steps"
    ),
    "filters.identical": RemovedField(
        "0.1.0", "a pair whose two responses are the same text prefers nothing and is always dropped"
    ),
    "evaluate.bootstrap_samples": RemovedField("0.1.0", "every 95 % interval is made of 2000 resamples"),
    "evaluate.judge.max_unreadable_share": RemovedField(
        "0.1.0",
        "a judge of which more than half cannot be read is refused: choose another evaluate.judge.model, or write "
        "evaluate.judge.pairwise_template or pointwise_template for it",
    ),
}

# What a switch became that was widened to several values: its former values by their present names.
RENAMED_VALUES: dict[str, dict[bool, str]] = {"filters.truncated": {True: "drop", False: "keep"}}


def present_value(path: str, value: Any) -> Any:
    """The present name of a field's value where an earlier version had another one; else the value itself."""
    return RENAMED_VALUES[path][value] if path in RENAMED_VALUES and isinstance(value, bool) else value


def explain_removed(path: str) -> str | None:
    """One line for a recipe or an override that names a removed field; None where `path` is none."""
    if (removed := REMOVED.get(path)) is None:
        return None
    return f"{path}: was removed in version {removed.since}: {removed.instead}; take the key out"


def in_present_terms(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a run's configuration as this version has them: without the fields that were removed since it was
    written, and each value under its present name."""
    return {
        name: in_present_terms(value, f"{prefix}{name}.")
        if isinstance(value, dict)
        else present_value(f"{prefix}{name}", value)
        for name, value in values.items()
        if f"{prefix}{name}" not in REMOVED
    }
