"""Label selectors of Ray nodes: what a selector may look like, and whether a node's labels match it. No Ray import.

A selector maps label keys to conditions, all of which must hold: `x` (the label is x), `!x` (it is not), `in(x, y)`
(it is one of them) and `!in(x, y)` (it is none of them). A node without the label matches conditions with `!` only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mipo_ray.errors import brief

_NAME = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_PREFIX = re.compile(r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]*[a-zA-Z0-9])?")
_LONGEST_PREFIX = 253
_CONDITION = re.compile(rf"(?P<negated>!?)(?:in\((?P<several>{_NAME}(?:, ?{_NAME})*)\)|(?P<single>{_NAME}))")


def check_selector(selector: dict[str, str]) -> dict[str, str]:
    """Returns the selector; raises ValueError for a key or condition that Ray would refuse."""
    for key, condition in selector.items():
        prefix, separator, name = key.rpartition("/")
        if not re.fullmatch(_NAME, name) or (
            separator and (len(prefix) > _LONGEST_PREFIX or not _PREFIX.fullmatch(prefix))
        ):
            raise ValueError(f"expected label keys like mipo.io/role, found {brief(key)}")
        if not _CONDITION.fullmatch(condition):
            raise ValueError(
                f"expected for {key} a value, !value, in(value, value) or !in(value, value), found {brief(condition)}"
            )
    return selector


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node with these labels satisfies every condition of a checked selector."""
    return all(_holds(labels.get(key), condition) for key, condition in selector.items())


def off_group(own: Mapping[str, str], other: Mapping[str, str]) -> dict[str, str]:
    """Conditions that hold on the nodes of selector `own` and on no node of `other`: for a key whose one value differs
    between the two, not that of `other`. Empty where there is no such key."""
    for key in own.keys() & other.keys():
        ours, theirs = (_CONDITION.fullmatch(selector[key]) for selector in (own, other))
        assert ours is not None, own
        assert theirs is not None, other
        values = [found["single"] for found in (ours, theirs)]
        if all(values) and values[0] != values[1] and not (ours["negated"] or theirs["negated"]):
            return {key: f"!{values[1]}"}
    return {}


def shown(selector: Mapping[str, str]) -> str:
    """The selector, or a node's labels, in one line."""
    return ", ".join(f"{key}={value}" for key, value in sorted(selector.items()))


def _holds(label: str | None, condition: str) -> bool:
    found = _CONDITION.fullmatch(condition)
    assert found is not None, condition
    values = re.split(r", ?", found["several"]) if found["several"] else [found["single"]]
    return (label in values) != bool(found["negated"])
