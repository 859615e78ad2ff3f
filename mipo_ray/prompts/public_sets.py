"""Public personalization data sets, read as their authors published them -> rows with a prompt, a context and a group.

A loader turns one row of a published file into one row with the columns that the prompts section names
(`column`, `context_column`, `group_column`, `id_column` and, for judges, `reference_column`: the answer that this user
preferred); the published columns stay beside them, for `prompts.question_template` and for `extra`. Column names as of:

prism                PRISM Alignment (arXiv 2404.16019), names of its code book: conversations.jsonl as `prompts.path`,
                     survey.jsonl as `prompts.profiles_path`.
community_alignment  Community Alignment (arXiv 2507.09650), community_alignment.csv. Its code book was not at hand; the
                     names are those that public programs which read the file use.
multi_bench          "Multi-Bench" names no public file. Read as Multifaceted Bench (arXiv 2405.17977): a system message
                     that says what one user prefers, and a prompt. It has no user ids, so every row is a user of its
                     own. Tables that name these columns otherwise are read by the other names in MULTI_BENCH. A
                     context that is written as a system message wants `prompts.context_role: system`.

Conversations without a first question (null, empty, or PRISM's "EMPTY STRING") are no prompts and are passed over.
Nothing here imports ray, torch or vllm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.errors import UserError
from mipo_ray.prompts.files import PromptFile, find_files
from mipo_ray.prompts.reading import SourceRow, missing_column, read_rows

RowReader = Callable[[PromptFile], Iterator[SourceRow]]

PRISM_QUESTION, PRISM_USER, PRISM_ID = "opening_prompt", "user_id", "conversation_id"
PRISM_HISTORY = "conversation_history"  # utterances: turn, role, content, if_chosen
PRISM_STATEMENTS = {"self_description": "Self-description", "system_string": "How an assistant should behave"}
PRISM_PREFERENCES = "stated_prefs"
STRONG_PREFERENCE = 50  # the middle of PRISM's sliders, which go from 0 to 100
# What each slider rates as important in an answer.
PRISM_SLIDERS = {
    "values": "reflecting my values and culture",
    "creativity": "creativity",
    "fluency": "good writing",
    "factuality": "facts",
    "diversity": "several viewpoints",
    "safety": "safety",
    "personalisation": "being personal to me",
    "helpfulness": "helpfulness",
}
PRISM_OTHER_SLIDER, PRISM_OTHER_TEXT = "other", "other_text"
PRISM_DEMOGRAPHICS = {
    "age": "Age",
    "gender": "Gender",
    "education": "Education",
    "employment_status": "Employment",
    "marital_status": "Marital status",
    "religion.simplified": "Religion",
    "ethnicity.simplified": "Ethnicity",
    "location.reside_country": "Country",
}

COMMUNITY_QUESTION, COMMUNITY_USER, COMMUNITY_ID = "first_turn_prompt", "annotator_id", "conversation_id"
COMMUNITY_PREFERRED, COMMUNITY_ANSWER = "first_turn_preferred_response", "first_turn_response_"  # a to d
COMMUNITY_DEMOGRAPHICS = {
    "annotator_age": "Age",
    "annotator_gender": "Gender",
    "annotator_education_level": "Education",
    "annotator_political": "Politics",
    "annotator_ethnicity": "Ethnicity",
    "annotator_country": "Country",
}

END_OF_TEXT = "<|end_of_text|>"  # left at the end of some answers of Community Alignment

# The first name that a row has counts. Group, id and reference are optional.
MULTI_BENCH = {
    "context": ("system", "persona", "profile", "context"),
    "prompt": ("prompt", "question", "instruction"),
    "group": ("user_id", "user", "persona_id"),
    "id": ("id", "prompt_id"),
    "reference": ("reference_answer", "reference"),
}

NOT_GIVEN = ("", "empty string", "prefer not to say", "prefer not to answer")


def row_reader(prompts: PromptsConfig, section: str = "prompts") -> RowReader:
    """What reads a prompt file row by row, as `prompts.loader` says; the profiles of PRISM are read here, once.

    section: where `prompts` stands in the configuration, for messages. Raises UserError for a profiles file that is
    missing, superfluous or broken; the reader raises it for rows, naming file, row and column.
    """
    key = f"{section}.profiles_path"
    if prompts.profiles_path is not None and prompts.loader != "prism":
        raise UserError(f"{key}: only loader prism reads profiles, found loader {prompts.loader}; remove it")
    load: Callable[[SourceRow], SourceRow | None]
    if prompts.loader == "prism":
        if prompts.profiles_source is None:
            raise UserError(f"{key}: loader prism needs the file of user profiles (survey.jsonl), found null")
        profiles = _prism_profiles(row for file in find_files(prompts.profiles_source, key) for row in read_rows(file))
        load = functools.partial(prism_row, prompts=prompts, profiles=profiles)
    elif prompts.loader == "community_alignment":
        load = functools.partial(community_alignment_row, prompts=prompts)
    elif prompts.loader == "multi_bench":
        load = functools.partial(multi_bench_row, prompts=prompts)
    else:
        return read_rows
    return functools.partial(_read, load=load)


def prism_row(row: SourceRow, prompts: PromptsConfig, profiles: Mapping[str, str]) -> SourceRow | None:
    """A PRISM conversation, with its user's profile as context (`profiles`: user id -> context); None: no question."""
    _require(row, (PRISM_ID, PRISM_USER, PRISM_QUESTION), "prism")
    if _is_missing(row.values[PRISM_QUESTION]):
        return None
    user = row.values[PRISM_USER]
    if str(user) not in profiles:
        raise UserError(f"{row.where}, field {PRISM_USER!r}: user {user!r} has no profile in {prompts.profiles_path}")
    question, prompt_id = row.values[PRISM_QUESTION], row.values[PRISM_ID]
    return _with_columns(row, prompts, question, profiles[str(user)], user, prompt_id, _prism_reference(row))


def prism_context(profile: SourceRow) -> str:
    """What a row of PRISM's survey says of a user, one statement a line: own words, wishes, strong preferences
    (strongest first), demographics; what was not given is left out."""
    _require(profile, (PRISM_USER, *PRISM_STATEMENTS, PRISM_PREFERENCES), "prism")
    preferences = profile.values[PRISM_PREFERENCES] or {}
    if not isinstance(preferences, dict):
        raise UserError(
            f"{profile.where}, field {PRISM_PREFERENCES!r}: expected an object of ratings from 0 to 100, found "
            f"{type(preferences).__name__}"
        )
    sliders = PRISM_SLIDERS | {PRISM_OTHER_SLIDER: _text(preferences.get(PRISM_OTHER_TEXT))}
    strong = [
        (rating, sliders[name])
        for name, rating in preferences.items()
        if sliders.get(name) and isinstance(rating, (int, float)) and rating > STRONG_PREFERENCE
    ]
    strong.sort(key=lambda item: -item[0])
    return _lines(
        *((label, _text(profile.values[column])) for column, label in PRISM_STATEMENTS.items()),
        ("Important in an answer, most important first", ", ".join(name for _, name in strong)),
        *((label, _text(_inner(profile.values, path))) for path, label in PRISM_DEMOGRAPHICS.items()),
    )


def community_alignment_row(row: SourceRow, prompts: PromptsConfig) -> SourceRow | None:
    """A Community Alignment conversation; context: the annotator's demographics. None: no question.

    Its feedback columns are left out of it: they say what was good about answers to this very question. The reference
    is the answer that the annotator preferred.
    """
    _require(row, (COMMUNITY_ID, COMMUNITY_USER, COMMUNITY_QUESTION, *COMMUNITY_DEMOGRAPHICS), "community_alignment")
    if _is_missing(row.values[COMMUNITY_QUESTION]):
        return None
    context = _lines(*((label, _text(row.values[column])) for column, label in COMMUNITY_DEMOGRAPHICS.items()))
    question, user, prompt_id = (row.values[name] for name in (COMMUNITY_QUESTION, COMMUNITY_USER, COMMUNITY_ID))
    letter = _text(row.values.get(COMMUNITY_PREFERRED)).lower().removeprefix("response_")
    preferred = _text(row.values.get(f"{COMMUNITY_ANSWER}{letter}")).removesuffix(END_OF_TEXT).strip() or None
    return _with_columns(row, prompts, question, context, user, prompt_id, preferred)


def multi_bench_row(row: SourceRow, prompts: PromptsConfig) -> SourceRow:
    """A row of Multifaceted Bench, or of a table with other names of MULTI_BENCH."""
    found = {part: next((name for name in names if name in row.values), None) for part, names in MULTI_BENCH.items()}
    for part in ("context", "prompt"):
        if found[part] is None:
            names = MULTI_BENCH[part]
            others = f", which loader multi_bench reads as the {part} (or {', '.join(names[1:])})"
            raise missing_column(row, names[0], others)
    parts = ("prompt", "context", "group", "id", "reference")
    return _with_columns(
        row, prompts, *(None if found[part] is None else row.values[str(found[part])] for part in parts)
    )


def _prism_profiles(rows: Iterable[SourceRow]) -> dict[str, str]:
    profiles: dict[str, str] = {}
    for row in rows:
        context = prism_context(row)
        user = str(row.values[PRISM_USER])
        if user in profiles:
            raise UserError(f"{row.where}, field {PRISM_USER!r}: user {user!r} has a profile already")
        profiles[user] = context
    return profiles


def _read(file: PromptFile, load: Callable[[SourceRow], SourceRow | None]) -> Iterator[SourceRow]:
    for row in read_rows(file):
        loaded = load(row)
        if loaded is not None:
            yield loaded


def _prism_reference(conversation: SourceRow) -> str | None:
    """The answer to the first question that the user chose; None where the conversation names none."""
    history = conversation.values.get(PRISM_HISTORY)
    for utterance in history if isinstance(history, list) else []:
        if not isinstance(utterance, dict) or utterance.get("role") != "model":
            continue
        if utterance.get("turn") == 0 and utterance.get("if_chosen") is True:
            return _text(utterance.get("content")) or None
    return None


def _with_columns(
    row: SourceRow, prompts: PromptsConfig, question: Any, context: Any, group: Any, prompt_id: Any, reference: Any
) -> SourceRow:
    made = {prompts.column: question, prompts.context_column: context}
    # Where the published table has none, the user's own columns stay.
    optional = [
        (prompts.group_column, group),
        (prompts.id_column, prompt_id),
        (prompts.reference_column, reference),
    ]
    made |= {name: value for name, value in optional if value is not None}
    return SourceRow(row.where, row.numbered_id, row.values | made)


def _require(row: SourceRow, columns: Sequence[str], loader: str) -> None:
    for column in columns:
        if column not in row.values:
            raise missing_column(row, column, f", which loader {loader} reads")


def _is_missing(question: Any) -> bool:
    return question is None or (isinstance(question, str) and question.strip() in ("", "EMPTY STRING"))


def _inner(values: Mapping[str, Any], path: str) -> Any:
    value: Any = values
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _text(value: Any) -> str:
    text = str(value).strip() if isinstance(value, (str, int, float)) else ""
    return "" if text.lower() in NOT_GIVEN else text


def _lines(*statements: tuple[str, str]) -> str:
    return "\n".join(f"{label}: {text}" for label, text in statements if text)
