"""Templates of others, rendered within limits of time, memory and length.

Jinja2's sandbox keeps a template from the machine's files and from Python's insides, and limits nothing else: `'a' *
10**10`, loops in loops, `center`, `indent` or a text that a loop doubles take all memory or never end, some of them
when the template is compiled. There is no list of what to forbid that would be whole. A template that can do more than
print values is therefore compiled and rendered by another process, one for each process that renders: it has a limit
of memory, and a timer of the kernel ends it. One that prints values alone is rendered here, at no cost, unless it is so
long that looking at it would be one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import jinja2
import jinja2.meta
import jinja2.nodes

CPU_SECONDS = 5.0  # for one text; a conversation of 100 turns takes a thousandth of one
WALL_SECONDS = 120.0  # where the process does not get a processor
MEMORY_BYTES = 1 << 30  # beside what the process has when it starts
MOST_CHARACTERS = 20_000_000  # of what is rendered
LONGEST_READ_HERE = 100_000  # characters of a template; Jinja2 parses them in a second at most

# What prints values, and chooses among them. Rendering it takes time and memory in proportion to template and values.
_PLAIN = (
    jinja2.nodes.Template,
    jinja2.nodes.Output,
    jinja2.nodes.TemplateData,
    jinja2.nodes.Name,
    jinja2.nodes.Const,
    jinja2.nodes.Getattr,
    jinja2.nodes.If,
    jinja2.nodes.Compare,
    jinja2.nodes.Operand,
    jinja2.nodes.And,
    jinja2.nodes.Or,
    jinja2.nodes.Not,
    jinja2.nodes.Test,
)

FOR_USERS = "UserError"  # of mipo_ray.errors: its message needs no name of an exception

Environment = Callable[[], jinja2.Environment] | Callable[[str], jinja2.Environment]


class TemplateFailed(Exception):
    """What a template raised: `kind` is the name of the exception, `line` that of the template, where it is known."""

    def __init__(self, kind: str, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.kind, self.message, self.line = kind, message, line

    @property
    def shown(self) -> str:
        """The template's own message; with the exception's name unless this program raised it for the user."""
        return self.message if self.kind == FOR_USERS else f"{self.kind}: {self.message}"


class LimitPassed(TemplateFailed):
    """A template that took more time, memory or text than it may."""

    @property
    def shown(self) -> str:
        return self.message


def render(environment: Environment, arguments: tuple[str, ...], text: str, variables: Mapping[str, Any]) -> str:
    """The template `text`, in the environment that `environment(*arguments)` makes, over the variables.

    environment: a function of a module, which the other process imports; it gives the same environment every time.

    Raises TemplateFailed for whatever the template raises, LimitPassed where it passes a limit.
    """
    try:
        plain = _plain(environment, arguments, text)
        if plain is not None:
            return _joined(plain.generate(variables))
    except Exception as error:
        raise _failed(error) from None
    return str(_process().ask(("render", environment, arguments, text, dict(variables))))


def variables_of(environment: Environment, arguments: tuple[str, ...], text: str) -> frozenset[str]:
    """The variables that a template reads and does not set; raises as `render` does where it does not compile."""
    return _found("variables", environment, arguments, text)


def literals_of(environment: Environment, arguments: tuple[str, ...], text: str) -> frozenset[str]:
    """The texts that stand in a template: between its tags, and as constants; raises as `variables_of`."""
    return _found("literals", environment, arguments, text)


def _found(kind: str, environment: Environment, arguments: tuple[str, ...], text: str) -> frozenset[str]:
    try:
        if _plain(environment, arguments, text) is not None:
            return _FINDERS[kind](environment(*arguments).parse(text))
    except Exception as error:
        raise _failed(error) from None
    return frozenset(_process().ask((kind, environment, arguments, text, {})))


@functools.lru_cache(maxsize=16)
def _plain(environment: Environment, arguments: tuple[str, ...], text: str) -> jinja2.Template | None:
    """The template, compiled in this process, where it does no more than print values."""
    if len(text) > LONGEST_READ_HERE:
        return None
    made = environment(*arguments)
    parsed = made.parse(text)
    nodes = [parsed, *parsed.find_all(jinja2.nodes.Node)]
    return made.from_string(text) if all(type(node) in _PLAIN for node in nodes) else None


def _joined(pieces: Iterable[str]) -> str:
    """The text that a template prints, which may print a long value a thousand times."""
    kept, length = [], 0
    for piece in pieces:
        kept.append(piece)
        length += len(piece)
        if length > MOST_CHARACTERS:
            raise LimitPassed(
                "MemoryError", f"the template takes more than {MOST_CHARACTERS:,} characters for one text"
            )
    return "".join(kept)


def _variables(parsed: jinja2.nodes.Template) -> frozenset[str]:
    # This compiles the template once more: Jinja2 computes there what is constant.
    return frozenset(jinja2.meta.find_undeclared_variables(parsed))


def _literals(parsed: jinja2.nodes.Template) -> frozenset[str]:
    constants = [node.value for node in parsed.find_all(jinja2.nodes.Const)]
    between = [node.data for node in parsed.find_all(jinja2.nodes.TemplateData)]
    return frozenset(text for text in (*constants, *between) if isinstance(text, str))


_FINDERS = {"variables": _variables, "literals": _literals}


def _failed(error: Exception) -> TemplateFailed:
    if isinstance(error, LimitPassed):
        return error
    if isinstance(error, MemoryError):
        return LimitPassed("MemoryError", f"the template takes more than {MEMORY_BYTES >> 20:,} MiB of memory")
    if isinstance(error, jinja2.TemplateSyntaxError):
        return TemplateFailed(type(error).__name__, str(error.message), error.lineno)
    names = [kind.__name__ for kind in type(error).__mro__]
    kind = FOR_USERS if FOR_USERS in names else names[0]
    return TemplateFailed(kind, str(error))


class _Process:
    """The other process, as this one sees it."""

    def __init__(self) -> None:
        root = str(Path(__file__).parents[2])
        code = f"import sys; sys.path.insert(0, sys.argv[1]); from {__name__} import serve; serve()"
        # Its own group: Ctrl-C is for this process, which ends the other one by closing its input.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        self._lock = threading.Lock()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: tuple[Any, ...]) -> Any:
        """The answer to a request; raises TemplateFailed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            try:
                _write(self._process.stdin, pickle.dumps((CPU_SECONDS, *request)))
                if not select.select([self._process.stdout], [], [], WALL_SECONDS)[0]:
                    self._process.kill()
                answer = json.loads(_read(self._process.stdout))
            except (EOFError, OSError):
                with contextlib.suppress(OSError):
                    self._process.stdin.close()
                code = self._process.wait()
                taken = f"{CPU_SECONDS:g} seconds" if code == -signal.SIGPROF else "the time or memory there is for it"
                raise LimitPassed("Timeout", f"the template takes more than {taken} for one text") from None
        if "value" in answer:
            return answer["value"]
        kind = LimitPassed if answer["limit"] else TemplateFailed
        raise kind(answer["kind"], answer["message"], answer["line"])


_own: tuple[int, _Process] | None = None
_own_lock = threading.Lock()


def _process() -> _Process:
    """The other process of this one; a new one after it was ended, and after a fork."""
    global _own
    with _own_lock:
        if _own is None or _own[0] != os.getpid() or not _own[1].is_alive:
            _own = (os.getpid(), _Process())
        return _own[1]


def serve() -> None:
    """What the other process does until its input ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not write into the answers
    while True:
        try:
            message = _read(requests)
        except EOFError:
            return
        # From the process that started this one and through its own pipe, so that unpickling is no danger.
        seconds, kind, environment, arguments, text, variables = pickle.loads(message)  # noqa: S301
        _limit_memory()  # behind the imports of what was unpickled
        signal.setitimer(signal.ITIMER_PROF, seconds)
        _write(answers, json.dumps(_answer(kind, environment, arguments, text, variables)).encode())
        signal.setitimer(signal.ITIMER_PROF, 0)


def _answer(kind: str, environment: Environment, arguments: tuple[str, ...], text: str, variables: Any) -> Any:
    try:
        template = _compiled(environment, arguments, text)
        if kind in _FINDERS:
            return {"value": sorted(_FINDERS[kind](environment(*arguments).parse(text)))}
        rendered = _joined(template.generate(variables))
    except Exception as error:
        failed = _failed(error)
        limit = isinstance(failed, LimitPassed)
        return {"kind": failed.kind, "message": failed.message[:10_000], "line": failed.line, "limit": limit}
    return {"value": rendered}


@functools.lru_cache(maxsize=16)
def _compiled(environment: Environment, arguments: tuple[str, ...], text: str) -> jinja2.Template:
    return environment(*arguments).from_string(text)


@functools.cache
def _limit_memory() -> None:
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _write(stream: IO[bytes], message: bytes) -> None:
    stream.write(struct.pack("<Q", len(message)) + message)
    stream.flush()


def _read(stream: IO[bytes]) -> bytes:
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError
    length = struct.unpack("<Q", header)[0]
    message = stream.read(length)
    if len(message) < length:
        raise EOFError
    return message
