"""The prompts section: a table of prompts and how a row becomes chat messages, with the solved examples before it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator

from mipo_ray.config.base import Section, execution_only
from mipo_ray.config.field_types import PositiveInt
from mipo_ray.errors import brief
from mipo_ray.examples import EXAMPLES_DIRECTORY
from mipo_ray.models.hub import REVISION, hub_file
from mipo_ray.text.dates import DATE_STRING, date_of

# What chat templates are given anyway, or what would make something else of a prompt than its token ids.
_RESERVED_ARGUMENTS = frozenset(
    {
        "messages",
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "tokenizer_kwargs",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "sanitize_control_tokens",
        "strftime_now",
    }
)

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
        raise ValueError(f"expected a list of exemplars or {known}; found {brief(value)}")
    return yaml.safe_load(names[name].read_text(encoding="utf-8"))


Exemplars = Annotated[tuple[Exemplar, ...], BeforeValidator(_bundled_exemplars)]


class PromptsConfig(Section):
    """A table of prompts and how a row becomes chat messages."""

    path: str = Field(
        "bundled:personalization",
        description="JSONL, Parquet or CSV: one file or a glob, on any filesystem that fsspec opens; "
        "bundled:NAME is a file of mipo_ray/examples",
    )
    revision: str | None = Field(
        None,
        description="branch, tag or commit of a path of the Hugging Face Hub (hf://), also of profiles_path; null: the "
        "one in the path (hf://datasets/organisation/name@REVISION/...), else the main branch",
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

    @property
    def source(self) -> str:
        """`path` with the revision in it, as `prompts.files.find_files` takes it."""
        return _at_revision(self.path, self.revision)

    @property
    def profiles_source(self) -> str | None:
        """`profiles_path`, the same."""
        return None if self.profiles_path is None else _at_revision(self.profiles_path, self.revision)

    @model_validator(mode="after")
    def _has_one_revision(self) -> PromptsConfig:
        if self.revision is None:
            return self
        if not REVISION.fullmatch(self.revision):
            raise ValueError(f"revision: expected a branch, tag or commit, found {brief(self.revision)}")
        for name in ("path", "profiles_path"):
            url = getattr(self, name)
            file = None if url is None else hub_file(url)
            if url is not None and (file is None or file.revision is not None):
                raise ValueError(
                    f"revision is that of a path of the Hub without one (hf://datasets/organisation/name/...), found "
                    f"{brief(url)} as {name}"
                )
        return self


def _at_revision(url: str, revision: str | None) -> str:
    file = hub_file(url)
    return url if file is None or revision is None else replace(file, revision=revision).url


@dataclass(frozen=True)
class ChatSettings:
    """How a conversation becomes token ids: what its chat template is told beside the messages, and what becomes of
    control tokens in texts from data. `prompts.template_arguments` and `prompts.control_tokens` say what they mean."""

    arguments: Mapping[str, Any]
    control_tokens: Literal["text", "refuse"] = "text"


class TrainingPromptsConfig(PromptsConfig):
    """The training prompts, and what holds for every prompt of a run: those that are held out, of tasks, of a judge."""

    template_arguments: dict[str, Any] = Field(
        default_factory=lambda: {"date_string": DATE_STRING},
        description="variables that every chat template of the run is given beside the messages (enable_thinking, "
        "...); date_string is also the day that templates get which ask for today's",
    )
    control_tokens: Literal["text", "refuse"] = Field(
        "text",
        description="what becomes of control tokens (<|im_end|>, ...) that stand in texts from data. text: they are "
        "tokenised as the text that they are, and end no turn; refuse: such a row stops the run before it starts",
    )

    @property
    def chat(self) -> ChatSettings:
        """How every conversation of the run becomes token ids."""
        return ChatSettings(self.template_arguments, self.control_tokens)

    @field_validator("template_arguments")
    @classmethod
    def _can_be_rendered(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if reserved := sorted(_RESERVED_ARGUMENTS & arguments.keys()):
            raise ValueError(f"{', '.join(reserved)}: set by the run itself; remove it")
        arguments = {"date_string": DATE_STRING, **arguments}
        try:
            json.dumps(arguments, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected texts, numbers, lists and mappings: {error}; quote a date") from None
        if not isinstance(arguments["date_string"], str):
            raise ValueError(f"date_string: expected text, found {brief(arguments['date_string'])}")
        try:
            date_of(arguments["date_string"])
        except ValueError as error:
            raise ValueError(f"date_string: {error}") from None
        return arguments
