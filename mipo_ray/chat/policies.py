"""Whom one talks to: a run's directory, and which of its policies answer. All that is checked before any engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mipo_ray.config.recipe import load_run_config
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError, brief
from mipo_ray.models.source import check_model, check_sampled_model
from mipo_ray.planning.chat import check_chats
from mipo_ray.storage.configuration import check_config
from mipo_ray.storage.rounds import BASE, Round, base_and_rounds
from mipo_ray.storage.run_directory import RunDirectory, open_run
from mipo_ray.storage.verdicts import last_good


@dataclass(frozen=True)
class ChatRun:
    """A run that one talks to. rounds: those whose policies answer, in the order of the rounds; BASE is the initial
    model, which judges the answers whether it gives one or not."""

    run: RunDirectory
    config: Config
    rounds: tuple[Round, ...]

    @property
    def engine_rounds(self) -> tuple[Round, ...]:
        """The policies that an engine is needed for."""
        return (BASE, *(round for round in self.rounds if not round.is_base))


def open_chat(target: str, named: str | None, overrides: Sequence[str] = (), *, trusts_recipe: bool = False) -> ChatRun:
    """Opens a run (a local path or a URL) and finds its policies.

    named: which of them answer ("base,0,1"); None: the base and the newest that the guard did not find bad. overrides:
    of the run's configuration, for what decides where engines run. Raises UserError where there is no run, no such
    policy, or an override that would make it another run.
    """
    run = open_run(target)
    text = run.read_text("config.yaml")
    if text is None:
        raise UserError(f"{run.url}: expected a run directory with a config.yaml, found none")
    overrides = [*overrides, f"run_dir={run.url}"]
    config = load_run_config(text, run.path("config.yaml"), overrides, trusts_recipe=trusts_recipe)
    check_config(run, config)
    trained = [number for number in range(config.rounds) if run.is_finished(run.stage(Round(number), "train"))]
    if not trained:
        raise UserError(f"{run.url}: expected a round that is trained, found none; python -m mipo_ray.run trains them")
    there = base_and_rounds(trained)
    rounds = tuple(dict.fromkeys((BASE, last_good(run, there[-1])))) if named is None else _named(named, there, run)
    check_model(config.model.source)
    check_sampled_model(config.model.source, config.windows)
    check_chats(config, ())
    return ChatRun(run, config, rounds)


def _named(named: str, there: Sequence[Round], run: RunDirectory) -> tuple[Round, ...]:
    """The policies that --rounds names, in order and each once."""
    by_key = {round.key: round for round in there}
    keys = [key.strip() for key in named.split(",")]
    for key in keys:
        if key not in by_key:
            raise UserError(
                f"--rounds {brief(named)}: expected policies of {run.url} with commas between them "
                f"({', '.join(by_key)}), found {brief(key)}"
            )
    return tuple(sorted({by_key[key] for key in keys}))
