"""The guard's section: what a bound may be over, and how it stands beside the defaults.

python -m pytest tests/unit/config/test_guard.py
"""

from __future__ import annotations

import pytest

from mipo_ray.config.guard import DEFAULT_BOUNDS
from mipo_ray.config.recipe import ConfigError, load_config, load_run_config, to_yaml


def test_a_bound_that_is_given_stands_beside_the_defaults_and_null_takes_one_out() -> None:
    config = load_config(overrides=["guard.bounds.self_bleu.max_rise=0.1", "guard.bounds.kl_per_token=null"])
    assert config.guard.bounds == {**DEFAULT_BOUNDS, "self_bleu": {"max_rise": 0.1}, "kl_per_token": None}
    # And stays so in the run directory.
    assert load_run_config(to_yaml(config), "config.yaml") == config
    of_task = load_config(overrides=["guard.bounds={gsm8k.accuracy: {max_fall: 0.05}}"])
    assert of_task.guard.bounds == {**DEFAULT_BOUNDS, "gsm8k.accuracy": {"max_fall": 0.05}}


def test_without_a_word_there_is_no_guard() -> None:
    assert load_config().guard.when_bad is None


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["guard.bounds.slef_bleu.max_rise=1"], "guard.bounds: 'slef_bleu': expected one of reward_accuracy, "),
        (["guard.bounds={gsm8k.acuracy: {max_fall: 1}}"], "guard.bounds: 'gsm8k.acuracy': expected one of "),
        (["guard.bounds={judge_pairwise.net_win: {max_fall: 1}}"], "guard.bounds: 'judge_pairwise.net_win': expected"),
        (["guard.bounds.pmi_echo={max_rise: 0.1}"], "guard.bounds: pmi_echo: expected a measure that every policy has"),
        (["guard.bounds.self_bleu={}"], "guard.bounds: self_bleu: expected at least one of min_ratio, max_ratio,"),
        (["guard.bounds.pmi_initial.min_ratio=0.9"], "guard.bounds: pmi_initial: expected max_rise or max_fall, found"),
        (
            ["guard.bounds.response_tokens.min_ratio=1.1"],
            "guard.bounds: response_tokens: expected bounds that the base",
        ),
        (
            ["guard.bounds.response_tokens.max_ratio=0.9"],
            "guard.bounds: response_tokens: expected bounds that the base",
        ),
        (["guard.bounds.self_bleu.max_rise=-0.1"], "guard.bounds.self_bleu.max_rise: Input should be greater than"),
        (["guard.bounds.self_bleu.max_rise=.nan"], "guard.bounds.self_bleu.max_rise: Input should be"),
        (["guard.bounds.self_bleu.rise=0.1"], "guard.bounds.self_bleu.rise"),
        (["guard.bounds=0.1"], "guard.bounds: Input should be a valid dictionary; found 0.1"),
        (["guard.when_bad=warn"], "guard.when_bad: Input should be 'stop' or 'halve_learning_rate'; found 'warn'"),
        (
            ["guard.when_bad=stop", "evaluate.schedule=overlapping"],
            "evaluate.schedule overlapping samples the next round's pairs while a policy is measured, and guard",
        ),
        (
            ["guard.when_bad=stop", "evaluate.enabled=false"],
            "guard.when_bad stop compares what is measured after each round, which evaluate.enabled=false leaves out",
        ),
    ],
)
def test_a_guard_that_could_not_guard_is_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)
