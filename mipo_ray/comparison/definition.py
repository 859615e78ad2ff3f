"""A comparison: several ways of training the same model on the same prompts, each as a run of its own.

    base: ../personalization.yaml     # any recipe: what all arms share
    run_dir: runs/compare
    seeds: [0]
    arms:
      random_context: {}
      sft: {train: {objective: sft}}
      shuffled_labels: {train: {shuffle_labels: true}}

Every key but `arms` and `seeds` is that of a recipe (mipo_ray/config/). An arm overrides them, but only such keys as
leave data and steps equal. The initial model is always part of the table, as `base`. Nothing here imports torch, ray or
vllm.
"""

from __future__ import annotations

import functools
import json
import operator
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mipo_ray.config.recipe import ConfigError, explain, fields, merge, read_recipe, result_fields
from mipo_ray.config.schema import Config
from mipo_ray.config.trust import Said, acts, check_trust
from mipo_ray.errors import brief, cut, few
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import RunDirectory, open_run

BASE = "base"

# What the arms may differ in. All prompts, samples, filters and measurements are those of the comparison.
_OF_AN_ARM = ("conditioning.", "preference.", "generation.negatives_per_prompt", "generation.pairing", "train.")
# And where an arm may run otherwise; all of them share one cluster.
_PLACES = ("generation.pool.", "trackers")
_EQUAL_STEPS = ("train.batch_size", "train.epochs")
# What the generate stage of the first round depends on.
_GENERATED_BY = ("model.", "prompts.", "conditioning.", "preference.", "generation.", "filters.")


@dataclass(frozen=True)
class Comparison:
    """A checked comparison. `arms`: name -> configuration, but for run_dir and seed, in the recipe's order; `shared` is
    that of the initial model's measurement, from which every arm differs in what it overrides."""

    run_dir: str
    seeds: tuple[int, ...]
    shared: Config
    arms: Mapping[str, Config]

    def root(self) -> RunDirectory:
        """The directory of the whole comparison."""
        return open_run(self.run_dir)

    def run(self, arm: str, seed: int) -> RunDirectory:
        """The run directory of an arm, or of "base"."""
        return open_run(posixpath.join(self.run_dir, arm, f"seed-{seed}"))

    def config(self, arm: str, seed: int) -> Config:
        """The configuration of an arm's run, or of the base's measurement."""
        config = self.shared if arm == BASE else self.arms[arm]
        return config.model_copy(update={"run_dir": self.run(arm, seed).url, "seed": seed})

    def runs(self) -> list[tuple[str, int]]:
        """Every arm and seed, seed after seed."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    @property
    def controls(self) -> list[str]:
        """The arms that must not win."""
        return [name for name, config in self.arms.items() if config.train.shuffle_labels]

    def same_pairs(self, arm: str) -> str:
        """The first arm whose first round generates the same pairs as this one's; the arm itself where it is that."""
        own = _generated_by(self.arms[arm])
        return next(name for name, config in self.arms.items() if _generated_by(config) == own)


def load_comparison(recipe: str | Path, overrides: Sequence[str] = (), *, trusts_recipe: bool = False) -> Comparison:
    """Reads a comparison's recipe with its bases and applies `dotted.key=value` overrides (arms.NAME.train.beta=0.2).

    Raises ConfigError with one line for each wrong key, named with the arm that it stands in, and TrustError as
    `load_config` does.
    """
    values, _ = read_recipe(recipe, overrides)
    arms, seeds = values.pop("arms", None), values.pop("seeds", None)
    if seeds is not None and "seed" in values:
        raise ConfigError("seed: a comparison has seeds, a list; remove one of the two")
    seeds = _seeds([values.pop("seed", 0)] if seeds is None else seeds)
    if not isinstance(arms, dict) or not arms:
        raise ConfigError(
            f"{recipe}: arms: expected a mapping of arms, each a mapping of overrides; found {brief(arms)}"
        )
    shared = _checked("", values)
    if shared.pairs.path is not None:
        raise ConfigError("pairs.path: the arms of a comparison sample their pairs: expected none, found one")
    if shared.guard.when_bad is not None:
        raise ConfigError(
            f"guard.when_bad: every arm of a comparison does every round: expected null, found {shared.guard.when_bad}"
        )
    if not shared.evaluate.enabled:
        raise ConfigError("evaluate.enabled: a comparison measures: expected true, found false")
    if unquoted := [str(name) for name in arms if not isinstance(name, str)]:
        them = "it" if len(unquoted) == 1 else "them"
        raise ConfigError(f"arms: expected names that are text, found {cut(', '.join(unquoted))}: put {them} in quotes")
    wrong = [name for name in arms if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) or name == BASE]
    if wrong:
        raise ConfigError(
            f"arms: expected names of small letters, digits, _ and -, other than base (which is always measured); "
            f"found {cut(', '.join(wrong))}"
        )
    checked, faults = {}, []
    for name, own in arms.items():
        try:
            checked[name] = _arm(name, own, values, shared)
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError(few(faults, str))
    said = Said.on_command_line(overrides, trusts_recipe)
    check_trust(shared, said, str(recipe))
    for name, config in checked.items():
        check_trust(config, said.below(f"arms.{name}."), f"{recipe}, arms.{name}", known=acts(shared))
    return Comparison(shared.run_dir, seeds, shared, checked)


def describe_arm(config: Config) -> str:
    """An arm in a few words: objective, strategy and what is unusual."""
    train, negatives = config.train, config.generation.rejected_per_pair
    if train.objective == "sft":
        return "SFT on the chosen responses"
    rejected = f", {negatives} rejected" if negatives > 1 else ""
    labels = ", labels shuffled (control)" if train.shuffle_labels else ""
    chosen = config.conditioning.strategy if config.preference.is_mipo else config.preference.described
    return f"{train.objective.upper()}, {chosen}{rejected}{labels}"


def common_pairs_file(seed: int, round: Round) -> str:
    """Where the pair_ids that all arms train on stand, below the comparison's directory."""
    return f"common_pairs/seed-{seed}/round-{round.number:03d}.json"


def _arm(name: str, own: Any, values: dict[str, Any], shared: Config) -> Config:
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise ConfigError(f"arms.{name}: expected a mapping of configuration keys, found {brief(own)}")
    config = _checked(f"arms.{name}.", merge(values, own))
    there, here = (_leaves(one) for one in (shared, config))
    faults = [
        f"arms.{name}.{key}: the arms of a comparison have equal data and steps, and are measured alike: set {key} for "
        f"all of them ({there[key]!r} there, {here[key]!r} here)"
        for key in sorted(there)
        if there[key] != here[key] and key != "rounds" and not _is_of_an_arm(key)
    ]
    if config.rounds != shared.rounds:
        faults.append(f"arms.{name}.rounds: expected those of all arms, {shared.rounds}; found {config.rounds}")
    if faults:
        raise ConfigError(few(faults, str))
    return config


def _is_of_an_arm(key: str) -> bool:
    return key.startswith((*_OF_AN_ARM, *_PLACES)) and key not in _EQUAL_STEPS


def _leaves(config: Config) -> dict[str, Any]:
    """Every field by its dotted path, also those that decide no result of a single run."""
    dumped = config.model_dump(mode="json")
    return {path: functools.reduce(operator.getitem, path.split("."), dumped) for path, _ in fields()}


def _seeds(seeds: Any) -> tuple[int, ...]:
    is_list = isinstance(seeds, list) and bool(seeds)
    if not is_list or not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds: expected a list of different whole numbers from 0, found {brief(seeds)}")
    return tuple(seeds)


def _checked(prefix: str, values: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(few(error.errors(), lambda item: prefix + explain(item))) from None


def _generated_by(config: Config) -> str:
    fields = result_fields(config.model_dump(mode="json"))
    return json.dumps({key: value for key, value in fields.items() if key.startswith(_GENERATED_BY)}, sort_keys=True)
