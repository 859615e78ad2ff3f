"""The preference section: who chooses between a prompt's responses."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mipo_ray.config.base import Section
from mipo_ray.errors import brief

Chooser = Literal["mipo", "pmi", "function", "judge"]

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

# What decides about mismatched responses, of which chooser mipo alone has any, and about mismatched prompts, which pmi
# has as well.
OF_MISMATCHED_RESPONSES = {"generation": ("samples_per_prompt", "pairing"), "filters": ("min_pmi",)}
OF_MISMATCHED_PROMPTS = ("negatives_per_prompt",)  # of generation


class PreferenceConfig(Section):
    """Who chooses between a prompt's responses: where they come from, or a reward of each."""

    chooser: Chooser = Field(
        "mipo",
        description="mipo: the response to the prompt itself is chosen, that to the mismatched prompt rejected; "
        "function: of several responses to the prompt the one with the largest reward is chosen, the one with the "
        "smallest rejected; pmi: the same, with the response's pointwise mutual information with its prompt as its "
        "reward (nats: its log-prob under the prompt less that under the mismatched ones); judge: the same, with the "
        "comparisons that a response wins less those that it loses, by the judge of evaluate.judge",
    )
    function: str | None = Field(
        None,
        description="chooser function: MODULE:NAME of the reward function (or of a class without arguments whose "
        "instances are one), called as TRL's are, on the responses of several prompts at once",
    )
    samples: Annotated[int, Field(ge=2)] = Field(
        2, description="chooser function, pmi or judge: responses sampled to each prompt; one pair is made of them"
    )

    @field_validator("function")
    @classmethod
    def _is_an_import_path(cls, function: str | None) -> str | None:
        if function is not None and not _IMPORT_PATH.fullmatch(function):
            raise ValueError(f"expected MODULE:NAME, as in my_rewards:is_short, found {brief(function)}")
        return function

    @property
    def is_mipo(self) -> bool:
        """Whether pairs are made by mutual information: matched against mismatched responses."""
        return self.chooser == "mipo"

    @property
    def mismatches(self) -> bool:
        """Whether each prompt has mismatched ones: to sample responses under, or to score under them."""
        return self.chooser in ("mipo", "pmi")

    @property
    def described(self) -> str:
        """In a few words, for people: "mipo", "2 samples, by my_rewards:is_short", "4 samples, by the judge"."""
        by = {"function": self.function, "pmi": "PMI", "judge": "the judge"}
        return "mipo" if self.is_mipo else f"{self.samples} samples, by {by[self.chooser]}"

    @model_validator(mode="after")
    def _says_by_what(self) -> PreferenceConfig:
        if (self.chooser == "function") != (self.function is not None):
            raise ValueError(
                "chooser function and the name of the function go together: expected both, for example chooser: "
                f"function and function: my_rewards:is_short; found chooser {self.chooser}, function {self.function}"
            )
        if self.is_mipo and self.samples != 2:
            raise ValueError(
                "samples are those that a function, a judge or PMI chooses from: set chooser, or for chooser mipo "
                "generation.samples_per_prompt"
            )
        return self
