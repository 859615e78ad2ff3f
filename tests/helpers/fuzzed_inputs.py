"""Broken inputs that hypothesis draws, and what a command must do with each: use it, or refuse it by name.

`must_answer` calls a command in this process. Whatever it is given, it has to end in time with code 0 or 2, say in a
line what it refuses, show no traceback, and write nothing but what it was asked to write.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mipo_ray.config.recipe import fields
from tests.helpers.covering import by_night

Command = Callable[[Sequence[str]], int]
CASES = by_night([2_250], [40])[-1]  # of each of nine properties: 20,000 in a night
fuzzed = settings(max_examples=CASES, suppress_health_check=list(HealthCheck))
MOST_SECONDS = 60  # a case takes a fraction of one; on a machine with other work some
# What reaches for another machine, or for another process, is no matter of bad input.
_ELSEWHERE = ("ray.address",)


@dataclass(frozen=True)
class Answer:
    """How a command ended: its exit code, and what it printed on both streams."""

    code: int
    text: str

    @property
    def is_refused(self) -> bool:
        return self.code == 2


class HangError(AssertionError):
    """A command that did not end in time."""


def must_answer(command: Command, arguments: Sequence[str], unchanged: Path) -> Answer:
    """Calls a command; raises AssertionError where it does not end as every command must.

    unchanged: a directory in which no file may be made, changed or removed.
    """
    before, printed = _files(unchanged), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), _time_limit(arguments):
        try:
            code = command(arguments)
        except SystemExit as ended:  # argparse
            code = ended.code if isinstance(ended.code, int) else 1
    text = printed.getvalue()
    assert code in (0, 2), f"{arguments}: ended with {code}: {text}"
    assert "Traceback (most recent call last)" not in text, f"{arguments}: {text}"
    assert code == 0 or "error: " in text, f"{arguments}: refused without a word: {text!r}"
    assert _files(unchanged) == before, f"{arguments}: changed the files in {unchanged}"
    return Answer(code, text)


@contextlib.contextmanager
def _time_limit(arguments: Sequence[str]) -> Iterator[None]:
    def hang(number: int, frame: Any) -> None:
        raise HangError(f"{arguments}: no end after {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _files(directory: Path) -> dict[Path, tuple[int, int]]:
    found = ((path, path.lstat()) for path in directory.rglob("*"))
    return {path: (status.st_size, status.st_mtime_ns) for path, status in found if not path.is_dir()}


# Values. Numbers beyond what a field can mean, texts with what terminals, YAML and file systems take for their own.

WORDS = st.sampled_from(
    ["", " ", "null", "nan", "-inf", "1e999", "0x10", "true", "~", "[]", "{}", "[", "{a: 1", "- -", "a: b: c", "&a *a",
     "!!python/object:os.system", "random_context", "auto", "../..", "/", ".", "%s", "{{ 1 }}", "\u202e",
     "é" * 300, "\x1b[31m", "1_000", "2026-11-28", "0.5", "1,5", "on", "=", "a=b", "# no"]
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 3), st.sampled_from([2**31, 2**63, 10**30, -(10**30)]), st.floats(allow_nan=True, width=64)
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=20))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(WORDS | st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    """One to four `key=value` arguments: fields of the configuration, some of them misspelt, and any value."""
    known = [(path, info) for path, info in fields() if path not in _ELSEWHERE]
    given = []
    for _ in range(draw(st.integers(1, 4))):
        name, info = draw(st.sampled_from(known))
        value = draw(VALUES if draw(st.integers(0, 3)) == 0 else _allowed(info))
        if draw(st.integers(0, 19)) == 0:
            cut = draw(st.integers(0, len(name) - 1))
            name = name[:cut] + name[cut + 1 :]
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        given.append(f"{name}={text}".replace("\0", ""))  # the system takes no NUL in an argument
    return given


def _allowed(info: Any) -> st.SearchStrategy[Any]:
    """Values that a field takes by its type and bounds, so that more than the first mistake is looked at."""
    if "mipo_ray" in str(info.annotation):  # a section with rules of its own
        return VALUES
    try:
        with warnings.catch_warnings(action="ignore"):  # of bounds that hypothesis does not know
            strategy = st.from_type(Annotated[(info.annotation, *info.metadata)])
            strategy.validate()
    except Exception:  # a type that it does not know
        return VALUES
    return strategy


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole` after one to three accidents: cut off, bytes changed, lost, doubled or put in."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.sampled_from([1, 2, 7, 64, 1000])))
        accident = draw(st.sampled_from(["cut", "change", "lose", "double", "put"]))
        if accident == "cut":
            del content[at:]
        elif accident == "change" and at < len(content):
            content[at] = draw(st.integers(0, 255))
        elif accident == "lose":
            del content[at:end]
        elif accident == "double":
            content[at:at] = content[at:end]
        else:
            content[at:at] = draw(st.binary(min_size=1, max_size=9))
    return bytes(content)


# Rows in the files that prompts and pairs come in.

COLUMNS = ("prompt", "prompt_id", "context", "group", "user", "chosen", "rejected", "messages", "question", "other")
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz")


@st.composite
def rows(draw: st.DrawFn, whole: dict[str, Any]) -> list[dict[str, Any]]:
    """Some rows like `whole`, with fields that are missing, of another kind, or not known."""
    found = []
    for number in range(draw(st.integers(0, 5))):
        row = {name: f"{value} {number}" if isinstance(value, str) else value for name, value in whole.items()}
        for _ in range(draw(st.integers(0, 2))):
            name = draw(st.sampled_from(COLUMNS))
            if draw(st.booleans()):
                row.pop(name, None)
            else:
                row[name] = draw(VALUES)
        found.append(row)
    return found


@st.composite
def tables(draw: st.DrawFn, whole: dict[str, Any]) -> tuple[str, bytes]:
    """A file's suffix and content: rows in one of SUFFIXES, damaged in some cases."""
    suffix = draw(st.sampled_from(SUFFIXES))
    content = _written(draw(rows(whole)), suffix)
    return suffix, draw(damaged(content)) if draw(st.booleans()) else content


def _written(found: list[dict[str, Any]], suffix: str) -> bytes:
    if suffix == ".parquet":
        return _as_parquet(found)
    if suffix == ".csv":
        names = list(dict.fromkeys(name for row in found for name in row))
        lines = [names, *([row.get(name, "") for name in names] for row in found)]
        return "\n".join(",".join(_cell(value) for value in line) for line in lines).encode("utf-8", "surrogatepass")
    text = json.dumps(found) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in found)
    return gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode()


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return '"' + text.replace('"', '""') + '"'


def _as_parquet(found: list[dict[str, Any]]) -> bytes:
    """Columns of whatever type Arrow finds for their values, and of text where it finds none."""
    columns = {}
    for name in dict.fromkeys(name for row in found for name in row):
        values = [row.get(name) for row in found]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, ValueError, OverflowError):
            columns[name] = pa.array([json.dumps(value) for value in values])
    sink = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pa.table(columns), sink)
    except pa.ArrowException:  # a struct without fields
        pyarrow.parquet.write_table(pa.table({"prompt": [json.dumps(found)]}), sink)
    return sink.getvalue()
