"""What a judge is asked: the template of a protocol, and one prompt for each judgement. Pure: no Ray, no tokenizer.

The texts that are judged are delimited: each stands between a BEGIN and an END line that hold `boundary`, letters that
occur in none of them, so that no answer can write the line that ends it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mipo_ray.config.judge import JudgeConfig, Protocol
from mipo_ray.config.prompts import ChatSettings
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.prompts.reading import nearest
from mipo_ray.prompts.rows import PromptRow
from mipo_ray.prompts.templates import render_template, template_variables

# Raised when the bundled prompt or the reading of judgements changes its meaning.
VERSIONS: Mapping[str, int] = {"pairwise": 1, "pointwise": 1}

# Which answer stands first. Each pair is judged in both orders.
ORDERS = ("base_first", "policy_first")

NEEDED = {"pairwise": ("question", "answer_a", "answer_b"), "pointwise": ("question", "reference", "answer")}
OPTIONAL = ("context", "boundary")


@dataclass(frozen=True)
class JudgePrompt:
    """The template of a protocol: its text, whole, and the hash (12 hex digits) by which results name it."""

    protocol: Protocol
    text: str

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


def judge_prompt(judge: JudgeConfig, protocol: Protocol) -> JudgePrompt:
    """The configured template of a protocol, or the bundled one.

    Raises UserError for a file that cannot be read and for a template that does not compile, names a variable that
    there is none of, or leaves one out that the protocol cannot do without.
    """
    key = f"evaluate.judge.{protocol}_template"
    configured = judge.pairwise_template if protocol == "pairwise" else judge.pointwise_template
    path = Path(__file__).parent / f"{protocol}.txt.j2" if configured is None else Path(configured)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{key}: {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path}: expected UTF-8 text: {error.reason}") from None
    names = template_variables(text, f"{key}: {path}")
    known = (*NEEDED[protocol], *OPTIONAL)
    for name in sorted(names - set(known)):
        raise UserError(f"{key}: {path}: unknown variable {name!r}; expected {', '.join(known)}{nearest(name, known)}")
    if missing := [name for name in NEEDED[protocol] if name not in names]:
        raise UserError(f"{key}: {path}: expected the template to use {', '.join(missing)}, which it leaves out")
    return JudgePrompt(protocol, text)


def judge_chat(config: Config) -> ChatSettings:
    """How what a judge is asked becomes token ids. It holds answers, so that its control tokens are always text: a run
    that has sampled everything must not stop at what a policy said."""
    return ChatSettings(config.prompts.template_arguments)


def pairwise_prompt(prompt: JudgePrompt, row: PromptRow, answers: Sequence[str]) -> str:
    """What the judge is asked about two answers (in the order in which they are shown) to a prompt row."""
    texts = {"question": question_text(row), "context": row["context"], "answer_a": answers[0], "answer_b": answers[1]}
    return _render(prompt, texts)


def pointwise_prompt(prompt: JudgePrompt, row: PromptRow, answer: str) -> str:
    """What the judge is asked about one answer to a prompt row, beside the row's reference."""
    texts = {"question": question_text(row), "context": row["context"], "reference": row["reference"], "answer": answer}
    return _render(prompt, texts)


def question_text(row: PromptRow) -> str:
    """The question without the context: the user's message, or all turns by role where there are several.

    A system message counts as a turn: what it asks of answers is part of the task.
    """
    messages = row["question_messages"]
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def boundary_of(texts: Iterable[str]) -> str:
    """12 letters that occur in none of the texts; the same for the same texts."""
    joined = json.dumps(list(texts))
    for attempt in range(1 << 16):
        digits = hashlib.sha256(f"{attempt} {joined}".encode()).hexdigest()[:12]
        boundary = digits.translate(str.maketrans("0123456789abcdef", "ABCDEFGHIJKLMNOP"))
        if boundary not in joined:
            return boundary
    raise AssertionError("65,536 hashes of a text all stand in it")


def _render(prompt: JudgePrompt, texts: dict[str, str]) -> str:
    # Line ends of the texts are not part of what they say, and the END lines must stand alone.
    texts = {name: text.strip("\r\n") for name, text in texts.items()}
    variables = {**texts, "boundary": boundary_of(texts.values())}
    return render_template(f"evaluate.judge.{prompt.protocol}_template", prompt.text, variables)
