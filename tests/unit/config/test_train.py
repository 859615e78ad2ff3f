"""What the section `train` refuses, and what it takes.

python -m pytest tests/unit/config/test_train.py
"""

from __future__ import annotations

import pytest

from mipo_ray.config.recipe import ConfigError, load_config
from mipo_ray.config.train import TrainConfig


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        *(
            (
                ["train.label_smoothing=0.1", f"train.objective={objective}"],
                f"train: label_smoothing is part of objective dpo, found {objective}",
            )
            for objective in ("ipo", "infonce", "sami", "sft")
        ),
        *(
            (
                [f"train.{name}={value}", f"train.objective={objective}"],
                f"train: {name} is for objectives dpo, ipo, infonce, found {objective}",
            )
            for name, value in (("length_normalized", "true"), ("nll_coefficient", "0.5"))
            for objective in ("sami", "sft")
        ),
        (
            ["train.reference_mode=adapter"],
            "train: reference_mode adapter turns LoRA adapters off: expected lora.rank above 0, found 0",
        ),
        (
            ["train.reference_mode=adapter", "train.lora.rank=8", "train.reference=initial"],
            "train: reference_mode adapter is the round's starting policy, since adapters are merged after every "
            "round; for reference initial choose colocated or cached",
        ),
        (
            ["train.offload_reference=true", "train.reference_mode=cached"],
            "train: offload_reference needs reference_mode colocated, found cached",
        ),
        (
            ["train.offload_reference=true", "train.reference_mode=adapter", "train.lora.rank=8"],
            "train: offload_reference needs reference_mode colocated, found adapter",
        ),
        (
            ["train.min_workers=3", "train.num_workers=2"],
            "train: min_workers (3) is larger than num_workers (2)",
        ),
        *(
            (
                ["train.offload_parameters=true", f"train.zero_stage={stage}"],
                f"train: offload_parameters needs zero_stage 3, found {stage}",
            )
            for stage in (0, 1, 2)
        ),
        (
            ["train.offload_optimizer=true", "train.zero_stage=0"],
            "train: offload_optimizer needs zero_stage 1, 2 or 3, found 0",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_contradiction_names_what_was_expected_and_found(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.label_smoothing=0.1", "train.length_normalized=true", "train.nll_coefficient=1"],
        ["train.objective=ipo", "train.length_normalized=true", "train.nll_coefficient=1"],
        ["train.objective=infonce", "train.length_normalized=true", "train.nll_coefficient=1"],
        # What an objective does not read may stand at its default, and as the recipe's other objectives need it.
        ["train.objective=sami", "train.reference_mode=cached", "train.beta=0.5"],
        ["train.objective=sft", "train.reference=initial"],
        ["train.reference_mode=adapter", "train.lora.rank=1"],
        ["train.reference_mode=cached", "train.reference=initial", "train.lora.rank=8"],
        ["train.offload_reference=true", "train.reference=initial"],
        ["train.attention=flex_attention", "train.layout=shared"],
        ["train.offload_parameters=true", "train.offload_optimizer=true", "train.zero_stage=3"],
        ["train.offload_optimizer=true", "train.zero_stage=1"],
        ["train.checkpoint_steps=null"],
        # A step's pairs are shared out as they come.
        ["train.batch_size=5", "train.num_workers=3"],
        ["train.batch_size=1", "train.num_workers=8"],
    ],
    ids=" ".join,
)
def test_what_fits_together_is_taken(overrides: list[str]) -> None:
    load_config(overrides=overrides)


@pytest.mark.parametrize(
    ("objective", "expected"), [("dpo", True), ("ipo", True), ("infonce", True), ("sami", False), ("sft", False)]
)
def test_which_objectives_have_a_reference(objective: str, expected: bool) -> None:
    assert load_config(overrides=[f"train.objective={objective}"]).train.needs_reference is expected


def test_training_starts_with_all_workers_unless_fewer_are_allowed() -> None:
    assert TrainConfig(num_workers=4).fewest_workers == 4
    assert TrainConfig(num_workers=4, min_workers=1).fewest_workers == 1
    assert TrainConfig(num_workers=4, min_workers=4).fewest_workers == 4


def test_the_layers_of_adapters_are_a_list() -> None:
    lora = load_config(overrides=["train.lora={rank: 8, target_modules: [q_proj, v_proj]}"]).train.lora
    assert (lora.rank, lora.target_modules) == (8, ("q_proj", "v_proj"))
