"""Label selectors: what is accepted, and what matches.

python -m pytest tests/unit/config/test_label_selectors.py
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.config.label_selectors import check_selector, matches, off_group, shown
from mipo_ray.config.recipe import ConfigError, load_config

LABELS = {"mipo.io/role": "generate", "ray.io/accelerator-type": "H100"}
values = st.from_regex(r"\A[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?\Z")


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({}, True),
        ({"mipo.io/role": "generate"}, True),
        ({"mipo.io/role": "train"}, False),
        ({"mipo.io/role": "gen"}, False),
        ({"mipo.io/role": "!train"}, True),
        ({"mipo.io/role": "!generate"}, False),
        ({"mipo.io/role": "in(train, generate)"}, True),
        ({"mipo.io/role": "in(train,other)"}, False),
        ({"mipo.io/role": "!in(train, other)"}, True),
        ({"mipo.io/role": "!in(train,generate)"}, False),
        # A label that the node does not have.
        ({"zone": "a"}, False),
        ({"zone": "in(a, b)"}, False),
        ({"zone": "!a"}, True),
        ({"zone": "!in(a, b)"}, True),
        # All conditions must hold.
        ({"mipo.io/role": "generate", "ray.io/accelerator-type": "in(H100, H200)"}, True),
        ({"mipo.io/role": "generate", "ray.io/accelerator-type": "A100"}, False),
    ],
)
def test_a_node_matches_when_every_condition_holds(selector: dict[str, str], expected: bool) -> None:
    assert matches(LABELS, check_selector(selector)) == expected


@given(st.dictionaries(values, values, max_size=4), values, st.lists(values, min_size=1, max_size=3), st.booleans())
def test_an_exclamation_mark_is_the_opposite(labels: dict[str, str], key: str, among: list[str], spaced: bool) -> None:
    condition = f"in({(', ' if spaced else ',').join(among)})"
    selector = check_selector({key: condition})
    assert matches(labels, selector) == (labels.get(key) in among)
    assert matches(labels, check_selector({key: f"!{condition}"})) != matches(labels, selector)
    assert matches(labels, {key: among[0]}) == matches(labels, {key: f"in({among[0]})"})


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [
        ({"role": "generate"}, {"role": "train"}, {"role": "!train"}),
        ({"role": "generate", "zone": "a"}, {"role": "train", "zone": "a"}, {"role": "!train"}),
        ({"role": "train"}, {"role": "train"}, {}),
        ({"role": "generate"}, {"zone": "a"}, {}),
        ({}, {"role": "train"}, {}),
        # Conditions that hold on nodes of both.
        ({"role": "!train"}, {"role": "train"}, {}),
        ({"role": "in(train, generate)"}, {"role": "train"}, {}),
    ],
)
def test_what_keeps_off_another_group_still_takes_its_own(
    own: dict[str, str], other: dict[str, str], expected: dict[str, str]
) -> None:
    assert off_group(own, other) == expected


@given(st.dictionaries(st.sampled_from("abc"), st.sampled_from("xyz")), st.data())
def test_a_node_of_the_own_group_is_never_kept_off_and_one_of_the_other_always(
    labels: dict[str, str], data: st.DataObject
) -> None:
    selectors = st.dictionaries(st.sampled_from("abc"), st.sampled_from(["x", "y", "!x", "in(x, y)"]))
    own, other = data.draw(selectors), data.draw(selectors)
    if condition := off_group(own, other):
        check_selector(condition)
        assert matches(labels, condition) or not matches(labels, own)
        assert not (matches(labels, condition) and matches(labels, other))


@pytest.mark.parametrize(
    "key", ["", "role!", "/role", "mipo.io/", "-role", "role-", "a/b/c!", "r" * 64, "p" * 254 + "/r"]
)
def test_a_key_that_ray_refuses(key: str) -> None:
    with pytest.raises(ValueError, match=r"expected label keys like mipo\.io/role, found"):
        check_selector({key: "x"})


@pytest.mark.parametrize(
    "condition", ["", "!", "in()", "in(a,)", "in(a", "!!a", "a b", "=a", "in(a;b)", "v" * 64, "(a)"]
)
def test_a_condition_that_ray_refuses(condition: str) -> None:
    with pytest.raises(ValueError, match="expected for role a value, !value, in"):
        check_selector({"role": condition})


@pytest.mark.parametrize("field", ["generation.pool.label_selector", "train.label_selector"])
def test_the_configuration_takes_selectors_and_names_the_field_of_a_wrong_one(field: str) -> None:
    config = load_config(overrides=[f"{field}={{mipo.io/role: 'in(a, b)', zone: '!c'}}"])
    section = config.train if field.startswith("train") else config.generation.pool
    assert section.label_selector == {"mipo.io/role": "in(a, b)", "zone": "!c"}
    with pytest.raises(ConfigError, match=rf"{field}: expected for zone a value"):
        load_config(overrides=[f"{field}={{zone: 'in('}}"])


def test_a_selector_is_shown_in_one_line() -> None:
    assert shown({"zone": "!c", "mipo.io/role": "generate"}) == "mipo.io/role=generate, zone=!c"
