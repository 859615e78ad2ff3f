"""The preference section: what goes together, and what would do nothing.

python -m pytest tests/unit/config/test_preference.py
"""

from __future__ import annotations

import pytest

from mipo_ray.config.recipe import ConfigError, load_config
from mipo_ray.config.schema import Config

FUNCTION = ("preference.chooser=function", "preference.function=rewards:short")
ENDPOINT = ("evaluate.judge.model=org/judge", "evaluate.judge.endpoint=http://localhost:8000/v1")
JUDGE = ("preference.chooser=judge", *ENDPOINT)
PMI = "preference.chooser=pmi"


def loaded(*overrides: str) -> Config:
    return load_config(overrides=list(overrides))


def test_who_chooses_says_how_many_are_sampled() -> None:
    assert (loaded().is_mipo, loaded().samples_of_prompt, loaded().scores_pmi) == (True, 1, True)
    config = loaded(*FUNCTION, "preference.samples=4")
    assert (config.is_mipo, config.samples_of_prompt, config.scores_pmi) == (False, 4, False)
    assert config.preference.described == "4 samples, by rewards:short"
    assert loaded(*JUDGE).preference.described == "2 samples, by the judge"
    assert loaded(*FUNCTION).generation.rejected_per_pair == 1


def test_pmi_chooses_among_samples_that_are_scored_under_mismatched_prompts() -> None:
    config = loaded(PMI, "preference.samples=4", "generation.negatives_per_prompt=3", "evaluate.enabled=false")
    assert (config.is_mipo, config.samples_of_prompt, config.scores_pmi) == (False, 4, True)
    assert config.preference.described == "4 samples, by PMI"
    assert loaded(PMI, "conditioning.strategy=similar_prompt").embeds_prompts


def test_near_prompts_are_looked_for_only_where_something_is_mismatched() -> None:
    similar = "conditioning.strategy=similar_prompt"
    assert loaded(similar).embeds_prompts
    assert not loaded(similar, *FUNCTION).embeds_prompts  # held-out answers are still compared by it


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["preference.chooser=function"], "go together"),
        (["preference.function=rewards:short"], "go together"),
        ([*JUDGE, "preference.function=rewards:short"], "go together"),
        (["preference.chooser=function", "preference.function=rewards.short"], "expected MODULE:NAME"),
        (["preference.chooser=function", "preference.function=../x:short"], "expected MODULE:NAME"),
        (["preference.samples=4"], "set chooser"),
        ([*FUNCTION, "preference.samples=1"], "greater than or equal to 2"),
        (["preference.chooser=judge"], "evaluate.judge.endpoint"),
        (["preference.chooser=judge", "evaluate.judge.model=org/judge"], "evaluate.judge.endpoint"),
        ([*FUNCTION, "train.objective=sami"], "sami compares two prompts"),
        ([*FUNCTION, "generation.sampling.temperature=0"], "temperature 0"),
        ([*FUNCTION, "generation.negatives_per_prompt=2"], "generation.negatives_per_prompt: expected only"),
        ([*FUNCTION, "filters.min_pmi=0"], "filters.min_pmi: expected only"),
        ([PMI, "filters.min_pmi=0"], "filters.min_pmi: expected only"),
        ([PMI, "generation.score_pmi=false"], "generation.score_pmi"),
        ([PMI, "train.objective=sami"], "sami compares two prompts"),
        ([PMI, "preference.function=rewards:short"], "go together"),
        (
            [*FUNCTION, "evaluate.enabled=false", "conditioning.strategy=random_prompt"],
            "conditioning.strategy: expected only",
        ),
        ([*FUNCTION, "pairs.path=x.jsonl", "rounds=1", "evaluate.enabled=false"], "pairs that were chosen"),
    ],
)
def test_what_would_do_nothing_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        loaded(*overrides)


def test_the_grain_of_resume_may_be_set_without_evaluation() -> None:
    assert loaded(*FUNCTION, "evaluate.enabled=false", "conditioning.block_size=8").conditioning.block_size == 8
