"""What is printed: no control characters of models, servers and files reach a terminal.

python -m pytest tests/unit/test_terminal.py
"""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import mipo_ray
from mipo_ray.command import run_command
from mipo_ray.errors import UserError
from mipo_ray.terminal import MOST_OF_A_LINE, plain, say, say_error

# A title, a cleared screen, a line written over, text for the clipboard, C1's introducer, a turned direction.
ESCAPES = "\x1b]0;title\x07\x1b[2J\x1b[1Aover\rwritten\x1b]52;c;cm0=\x07\x9b31m\u202egpj.exe\u2066\b\b\ud800"
# The only characters below a space that may arrive.
ALLOWED = {"\n", "\t"}


def _controls(text: str) -> set[str]:
    return {letter for letter in text if not letter.isprintable() and letter != " "}


def test_a_text_keeps_its_letters_and_loses_what_a_terminal_obeys() -> None:
    shown = plain(f"a\tb\r\nc {ESCAPES} \u00e9\u6f22\u200d\U0001f600")
    assert _controls(shown) <= {*ALLOWED, "\u200d"}
    assert shown.startswith("a\tb\nc \\x1b]0;title\\x07")
    assert shown.endswith("\u00e9\u6f22\u200d\U0001f600")


def test_a_line_is_cut() -> None:
    assert len(plain("a" * 10**6)) < MOST_OF_A_LINE + 10


def test_errors_output_and_what_libraries_print_are_guarded(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        say(f"said {ESCAPES}")
        say_error(f"said {ESCAPES}")
        print(f"printed {ESCAPES}")
        print("\x1b[36m(worker)\x1b[0m", "10%\r", end="", file=sys.stderr)
        handler = logging.StreamHandler()
        handler.emit(logging.makeLogRecord({"msg": f"logged {ESCAPES}"}))
        raise UserError(f"the server said: {ESCAPES}")

    before = sys.stdout, sys.stderr
    assert run_command(work, resumes=False) == 2
    assert (sys.stdout, sys.stderr) == before
    captured = capsys.readouterr()
    assert "error: the server said: \\x1b]0;title" in captured.err
    assert "\x1b[36m(worker)\x1b[0m 10%\r" in captured.err
    left = captured.err.replace("\x1b[36m", "").replace("\x1b[0m", "") + captured.out
    assert _controls(left) <= {*ALLOWED, "\r"}
    for word in ("said", "printed", "logged"):
        assert f"{word} \\x1b]0;title" in left


def test_a_traceback_is_guarded_too() -> None:
    code = (
        "from mipo_ray.command import run_command\n"
        "def work():\n    raise RuntimeError('the model said: \\x1b]0;title\\x07')\n"
        "run_command(work, resumes=False)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "RuntimeError: the model said: \\x1b]0;title\\x07" in done.stderr
    assert _controls(done.stderr) <= ALLOWED


def test_nothing_else_prints() -> None:
    printing = [
        f"{path.name}:{node.lineno}"
        for path in Path(mipo_ray.__file__).parent.rglob("*.py")
        if path.name != "terminal.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write"))
    ]
    assert printing == []
