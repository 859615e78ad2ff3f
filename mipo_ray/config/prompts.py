"""The prompts section: a table of prompts and how a row becomes chat messages, with the solved examples before it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field

from mipo_ray.config.base import Section, execution_only
from mipo_ray.config.field_types import PositiveInt
from mipo_ray.examples import EXAMPLES_DIRECTORY

ENDING = "_exemplars"  # of the names of exemplar files


class Exemplar(Section):
    """One solved example of a few-shot prompt."""

    question: str = Field(description="what the user asks")
    answer: str = Field(description="what the assistant answers")


def _bundled_exemplars(value: Any) -> Any:
    """The exemplars of mipo_ray/examples/NAME.yaml for bundled:NAME; anything else as it is."""
    if not isinstance(value, str):
        return value
    names = {path.stem.removesuffix(ENDING): path for path in EXAMPLES_DIRECTORY.glob(f"*{ENDING}.yaml")}
    name = value.removeprefix("bundled:")
    if name not in names or name == value:
        known = " or ".join(f"bundled:{name}" for name in sorted(names))
        raise ValueError(f"expected a list of exemplars or {known}; found {value!r}")
    return yaml.safe_load(names[name].read_text(encoding="utf-8"))


Exemplars = Annotated[tuple[Exemplar, ...], BeforeValidator(_bundled_exemplars)]


class PromptsConfig(Section):
    """A table of prompts and how a row becomes chat messages."""

    path: str = Field(
        "bundled:personalization",
        description="JSONL, Parquet or CSV: one file or a glob, on any filesystem that fsspec opens; "
        "bundled:NAME is a file of mipo_ray/examples",
    )
    loader: Literal["rows", "prism", "community_alignment", "multi_bench"] = Field(
        "rows",
        description="what the files hold. rows: one prompt a row, in the columns named below; the others: a public "
        "personalization data set with its published columns",
    )
    profiles_path: str | None = Field(
        None, description="loader prism: the file of user profiles (survey.jsonl); path names the conversations"
    )
    column: str = Field("prompt", description="column with the prompt: a string, or chat messages that end with user")
    question_template: str | None = Field(
        None,
        description="Jinja2 template (sandboxed) over the row's columns that makes the prompt; null: prompts.column",
    )
    context_column: str = Field("context", description="optional column: what is known of the user")
    group_column: str = Field("group", description="optional column: rows of one group are never mismatched")
    id_column: str = Field("prompt_id", description="optional column with unique ids; without it rows are numbered")
    reference_column: str = execution_only(
        "reference", "optional column: a good answer to this prompt, which nothing but the pointwise judge reads"
    )
    limit: PositiveInt | None = Field(None, description="use the first rows only; null: all")
    system: str | None = Field(None, description="system message before every prompt that brings none of its own")
    exemplars: Exemplars = Field(
        (),
        strict=False,
        description="solved examples, each as a turn of user and assistant before the prompt; bundled:word_problems is "
        "eight of this project's",
    )
    context_role: Literal["user", "system"] = Field(
        "user", description="the message that holds the context: the user's, before the question, or the system's"
    )
    context_template: str | None = Field(
        None,
        description="Jinja2 template (sandboxed) of that message: context and question (user), context alone "
        "(system); null: the context, and for the user an empty line and the question",
    )
