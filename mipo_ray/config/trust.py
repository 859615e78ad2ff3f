"""What a recipe, or the config.yaml of a run, may do without a word of the user who runs it, and what not.

Recipes and run directories are shared. What they say is data: a model, numbers, texts. A few fields are more: they
import classes, run a model's Python files, write outside the run directory, send a key. Such a value has to be the
user's own: it stands on the command line (`key=value`), or the command line says `--trust-recipe`. Which variables may
be sent to a server can also be said once, in the environment. The word is never taken from a file, so that `evaluate
RUN` inherits nothing from RUN, and a run that is resumed needs it again: others may write in its directory, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mipo_ray.config.judge import JudgeConfig
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError, brief, few
from mipo_ray.redaction import redacted

FLAG = "--trust-recipe"
FLAG_HELP = "let the recipe, or the run's configuration, run code, write anywhere and send any key (docs/security.md)"
# Names of variables, NAME or NAME@HOST, that may be sent to the server which a recipe names.
ALLOWED_VARIABLES = "MIPO_RAY_ALLOWED_VARIABLES"
OPENAI_HOST = "api.openai.com"

KEY_VARIABLE = "evaluate.judge.api_key_variable"
ENDPOINT = "evaluate.judge.endpoint"

# Engine arguments of which one word is a choice. All others are harmless as numbers and truth values alone: they import
# classes (worker_cls, scheduler_cls, logits_processors, compilation_config.backend, ...), or name files and hosts.
_CHOICES = frozenset(
    {
        "all2all_backend",
        "attention_backend",
        "convert",
        "dcp_comm_backend",
        "distributed_executor_backend",
        "expert_placement_strategy",
        "kv_cache_dtype",
        "linear_backend",
        "mamba_cache_dtype",
        "mamba_ssm_cache_dtype",
        "moe_backend",
        "performance_mode",
        "prefix_caching_hash_algo",
        "quantization",
        "runner",
        "safetensors_load_strategy",
        "scheduling_policy",
    }
)
# Sections of a DeepSpeed configuration that compute; others write files (csv_monitor, tensorboard, flops_profiler,
# autotuning, nebula), send (wandb, comet), or read data and code of their own.
_DEEPSPEED_SECTIONS = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "bf16",
        "comms_logger",
        "data_types",
        "fp16",
        "optimizer",
        "scheduler",
        "timers",
        "torch_autocast",
        "zero_optimization",
    }
)
_PLACE = re.compile(r"(?:.*_)?(?:path|file|dir|directory|folder)", re.IGNORECASE)  # as names of keys end
_WORD = re.compile(r"[A-Za-z0-9_+-]*")  # no path, URL or dotted name


class TrustError(UserError):
    """A recipe asks for what needs a word of the user's own."""


@dataclass(frozen=True)
class Act:
    """What one field of a configuration does beside computing, in words that follow the field's name."""

    field: str
    what: str


@dataclass(frozen=True)
class Said:
    """What the user says themselves: the fields that the command line sets, and whether it has --trust-recipe."""

    fields: tuple[str, ...] = ()
    trusts_recipe: bool = False

    @classmethod
    def on_command_line(cls, overrides: Sequence[str], trusts_recipe: bool) -> Said:
        """From the overrides `dotted.key=value` of a command line."""
        return cls(tuple(override.partition("=")[0] for override in overrides), trusts_recipe)

    def below(self, prefix: str) -> Said:
        """What is said of the fields below a prefix that ends in a dot, by their names there."""
        return Said(
            tuple(name.removeprefix(prefix) for name in self.fields if name.startswith(prefix)), self.trusts_recipe
        )

    def covers(self, field: str) -> bool:
        """Whether the field's value is the user's own."""
        return self.trusts_recipe or any(field == name or field.startswith(f"{name}.") for name in self.fields)


def check_trust(config: Config, said: Said, source: str, known: Sequence[Act] = ()) -> None:
    """Raises TrustError, naming every field, where `config` does what needs a word of the user's and has none.

    source: where the configuration comes from, for the message. known: acts that were looked at before.
    """
    asked = [act for act in acts(config) if act not in known and not said.covers(act.field)]
    if (key := _sent_key(config.evaluate.judge, said)) is not None:
        asked.append(key)
    if not asked:
        return
    hint = f"; or {ALLOWED_VARIABLES}=NAME in the environment lets a variable be sent" if key is not None else ""
    raise TrustError(
        f"{source}: asks for more than a recipe may do by itself. What you mean, say yourself: the same field on the "
        f"command line (key=value), or {FLAG} for all of it{hint}. Found:\n"
        + few(asked, lambda act: f"  {act.field}: {act.what}")
    )


def acts(config: Config) -> list[Act]:
    """Everything that a configuration does beside computing, apart from what it sends to a judge's server."""
    model, judge, found = config.model, config.evaluate.judge, []
    if model.trust_remote_code:
        similar = config.conditioning.similar.model
        models = " and ".join(brief(name) for name in (model.source, similar) if name is not None)
        found.append(Act("model.trust_remote_code", f"runs Python code that comes with {models}"))
    if judge.trust_remote_code:
        found.append(Act("evaluate.judge.trust_remote_code", f"runs Python code that comes with {brief(judge.model)}"))
    if config.ray.address not in (None, "auto"):
        found.append(Act("ray.address", f"joins the cluster at {brief(config.ray.address)}, which can run code here"))
    if config.preference.function is not None:
        found.append(Act("preference.function", f"imports and calls {brief(config.preference.function)}"))
    found += _of_engines("generation.pool.engine_args", config.generation.pool.engine_args)
    found += _of_engines("evaluate.judge.engine_args", judge.engine_args)
    found += _of_deepspeed("train.deepspeed", config.train.deepspeed)
    return found


def describe_acts(config: Config) -> list[str]:
    """Lines for the plan: what runs code, what is written elsewhere, and what is sent where."""
    judge = config.evaluate.judge
    lines = [f"trusted         {act.field}: {act.what}" for act in acts(config)]
    if judge.is_on and judge.endpoint is not None:
        key = f"${judge.api_key_variable}" if os.environ.get(judge.api_key_variable, "").strip() else "no key"
        own = "prompts, " if config.preference.chooser == "judge" else ""
        lines.append(f"sent            {key}, {own}held-out prompts and answers to {judge.endpoint}")
    if "wandb" in config.trackers:
        lines.append("sent            numbers and the configuration to Weights & Biases")
    if "mlflow" in config.trackers and (address := os.environ.get("MLFLOW_TRACKING_URI")) is not None:
        lines.append(f"sent            numbers and the configuration to {redacted(address)}")
    return lines


def is_openai(endpoint: str) -> bool:
    """Whether a judge's server is OpenAI's own, for which its variables in the environment are meant."""
    url = urlsplit(endpoint)
    return (url.scheme, url.netloc.lower()) == ("https", OPENAI_HOST)


def _sent_key(judge: JudgeConfig, said: Said) -> Act | None:
    """The key that would be sent to a server without a word of the user's; None where there is none, or they said so.

    A variable that a recipe names, or a server that it names, would send any secret of the environment to anyone.
    """
    name, endpoint = judge.api_key_variable, judge.endpoint
    if not judge.is_on or endpoint is None or not os.environ.get(name, "").strip() or said.covers(KEY_VARIABLE):
        return None
    is_default = name == JudgeConfig.model_fields["api_key_variable"].default
    if is_default and (said.covers(ENDPOINT) or is_openai(endpoint)):
        return None
    allowed = {part.strip() for part in os.environ.get(ALLOWED_VARIABLES, "").split(",")}
    if name in allowed or f"{name}@{urlsplit(endpoint).netloc}" in allowed:
        return None
    return Act(KEY_VARIABLE, f"sends ${name} to {endpoint}")


def _of_engines(field: str, arguments: dict[str, Any]) -> Iterator[Act]:
    for key, value in arguments.items():
        if not _is_plain(value, words=key in _CHOICES):
            yield Act(f"{field}.{key}", f"may import code, or name files and hosts: {brief(value)}")


def _of_deepspeed(field: str, values: dict[str, Any]) -> Iterator[Act]:
    for key, value in values.items():
        if not isinstance(value, dict) or key in _DEEPSPEED_SECTIONS:
            yield from _places(f"{field}.{key}", key, value)
        else:
            yield Act(f"{field}.{key}", f"may write files, send, or import code: {brief(value)}")


def _places(field: str, key: str, value: Any) -> Iterator[Act]:
    """Values in a section of DeepSpeed's that are more than numbers and words."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _places(f"{field}.{name}", str(name), part)
    elif _PLACE.fullmatch(key) or not _is_plain(value, words=True):
        yield Act(field, f"may name files or code: {brief(value)}")


def _is_plain(value: Any, *, words: bool) -> bool:
    """Numbers, truth values and null; lists of them; and words where they are allowed."""
    if isinstance(value, list | tuple):
        return all(_is_plain(part, words=words) for part in value)
    if isinstance(value, str):
        return words and _WORD.fullmatch(value) is not None
    return value is None or isinstance(value, bool | int | float)
