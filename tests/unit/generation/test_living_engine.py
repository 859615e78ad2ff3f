"""When a living engine takes a policy's weights, and by what it proves that it has them.

python -m pytest tests/unit/generation/test_living_engine.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from mipo_ray.config.recipe import load_config
from mipo_ray.generation.living_engine import WrongWeights, check_probes, takes_weights_of
from mipo_ray.generation.vllm_arguments import engine_settings
from mipo_ray.ray_cluster.resources import resolve

CONFIG = load_config(None)
EXPECTED = (-200.0, -210.0, -190.0, -205.0)
POLICY = replace(
    engine_settings(CONFIG, "/runs/demo/policy", resolve(CONFIG, {"CPU": 6, "GPU": 0})), probe_logprobs=EXPECTED
)


def test_an_engine_takes_the_weights_of_another_policy_that_can_be_proven_and_differs_in_nothing_else() -> None:
    assert takes_weights_of(POLICY, POLICY)
    assert takes_weights_of(replace(POLICY, probe_logprobs=None), replace(POLICY, model_path="/runs/demo/next"))
    assert takes_weights_of(replace(POLICY, probe_logprobs=None), replace(POLICY, probe_logprobs=None))
    assert not takes_weights_of(POLICY, replace(POLICY, model_path="/runs/demo/older", probe_logprobs=None))
    assert not takes_weights_of(POLICY, replace(POLICY, dtype="bfloat16"))
    assert not takes_weights_of(POLICY, replace(POLICY, max_model_len=POLICY.max_model_len + 1))


@pytest.mark.parametrize(
    ("settings", "difference", "is_right"),
    [
        (POLICY, 0.0009, True),
        (POLICY, 0.0011, False),
        (replace(POLICY, on_gpu=True), 0.009, True),
        (replace(POLICY, on_gpu=True), 0.011, False),
        (replace(POLICY, dtype="bfloat16"), 0.9, True),
        (POLICY, float("nan"), False),
        (POLICY, float("-inf"), False),
    ],
)
def test_what_an_engine_gives_is_what_the_trainer_gave(settings, difference, is_right) -> None:
    found = [value + difference for value in EXPECTED]
    if is_right:
        check_probes(settings, found)
    else:
        with pytest.raises(WrongWeights, match="/runs/demo/policy: an engine gives the probe sequences log-probs of"):
            check_probes(settings, found)


def test_a_router_that_sends_some_tokens_elsewhere_makes_no_other_policy() -> None:
    check_probes(POLICY, [EXPECTED[0] + 2, EXPECTED[1] - 2, *EXPECTED[2:]])
    with pytest.raises(WrongWeights):
        check_probes(POLICY, [EXPECTED[0] + 2, EXPECTED[1] - 2, EXPECTED[2] + 2, EXPECTED[3]])


def test_all_probes_are_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        check_probes(POLICY, EXPECTED[:3])
