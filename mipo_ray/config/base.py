"""What the sections of the configuration share: their base class, fields that several have, checks of two fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from mipo_ray.redaction import holds_text, names_secret, secret_in

# What vLLM is told by fields of their own, or must be told always.
_SET_ENGINE_ARGUMENTS = {
    "model",
    "tokenizer",
    "dtype",
    "max_model_len",
    "tensor_parallel_size",
    "trust_remote_code",
    "generation_config",
    "logprobs_mode",
}
# With these an engine would sample from another model than the one that is trained and scored.
_ANOTHER_MODEL = {
    "hf_overrides",
    "hf_config_path",
    "config_format",
    "load_format",
    "quantization",
    "quantization_config",
    "revision",
    "code_revision",
    "tokenizer_revision",
}


class Section(BaseModel):
    """A section of the configuration: no unknown keys, no other types, no secrets, no change once it is made."""

    # A message of pydantic's own would show the whole input.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, hide_input_in_errors=True
    )

    @field_validator("*")
    @classmethod
    def _holds_no_secret(cls, value: Any) -> Any:
        """A configuration is written to the run directory, printed and sent to trackers, and a run that is resumed
        compares it. So no secret is taken, rather than one that is written without it."""
        for place, secret in _secrets(value):
            raise ValueError(f"{place}{secret}: {_INSTEAD}")
        return value


_INSTEAD = (
    "a configuration holds no secrets, since it is written, printed and sent; set it in the environment of every node, "
    "by the variable that its library reads (HF_TOKEN, AWS_SECRET_ACCESS_KEY, WANDB_API_KEY, ...), and take it out"
)


def _secrets(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Each secret in a value: where it stands in it ("" or "a.b: "), and what it is, in words that do not show it."""
    before = f"{place}: " if place else ""
    if isinstance(value, str) and (secret := secret_in(value)) is not None:
        yield before, f"found {secret}"
    elif isinstance(value, dict):
        for key, part in value.items():
            below = f"{place}.{key}" if place else str(key)
            if secret_in(str(key)) is not None:
                yield before, "found a key that holds a secret"
            elif names_secret(key) and holds_text(part):
                yield "", f"found a secret, as its name says ({below})"
            else:
                yield from _secrets(part, below)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _secrets(part, f"{place}[{number}]")


def execution_only(default: Any, description: str, **constraints: Any) -> Any:
    """A field that says where or how fast a run executes, or what is looked at, but not what it trains: it may change
    between two calls over the same run directory."""
    return Field(default, description=description, json_schema_extra={"execution_only": True}, **constraints)


def reserved_gpus(actor: str, otherwise: str) -> Any:
    """The field that says how many GPUs an actor reserves; `otherwise`: how many where it is null."""
    return execution_only(None, f"GPUs reserved by {actor}; null: {otherwise} where the cluster has GPUs, else 0")


def reserved_cpus(actor: str) -> Any:
    """The field that says how many CPUs an actor reserves."""
    return execution_only(1.0, f"logical CPUs reserved by {actor}")


def node_labels(actors: str, role: str) -> Any:
    """The field that says on which nodes actors run; `role`: an example."""
    return execution_only(
        {},
        f"labels of the Ray nodes that {actors} run on, for example {{mipo.io/role: {role}}}; conditions: value, "
        "!value, in(a, b), !in(a, b)",
    )


def check_engine_arguments(arguments: dict[str, Any], *, of_policy: bool) -> None:
    """Raises ValueError for a raw vLLM engine argument that the configuration sets itself, and for engines of the
    policy also for one that makes another model of it."""
    for key in sorted(_SET_ENGINE_ARGUMENTS & arguments.keys()):
        raise ValueError(f"engine_args.{key} is set by the configuration itself; remove it")
    for key in sorted(_ANOTHER_MODEL & arguments.keys()) if of_policy else ():
        raise ValueError(
            f"engine_args.{key} would make the engines sample from another model than the one that is trained; "
            "remove it"
        )


def check_at_most(fewest: tuple[str, int], most: tuple[str, int]) -> None:
    """Raises ValueError where the first of two numbers, each with its name, is larger than the second."""
    if fewest[1] > most[1]:
        raise ValueError(f"{fewest[0]} ({fewest[1]}) is larger than {most[0]} ({most[1]})")


def check_room(answer: tuple[str, int], window: tuple[str, int]) -> None:
    """Raises ValueError where an answer of so many tokens leaves no room for a prompt in the window, each with its
    name."""
    if answer[1] >= window[1]:
        raise ValueError(f"{answer[0]} ({answer[1]}) leaves no room for a prompt in {window[0]} ({window[1]})")
