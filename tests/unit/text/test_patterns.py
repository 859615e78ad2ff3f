"""Regular expressions of users: linear in time, and no others are compiled anywhere.

python -m pytest tests/unit/text/test_patterns.py
"""

from __future__ import annotations

import ast
import json
import time
from pathlib import Path

import pytest

import mipo_ray
from mipo_ray.config.recipe import ConfigError, load_config
from mipo_ray.text.patterns import MOST_CHARACTERS, is_found

# Patterns for which an engine that goes back and tries again needs more steps than there is time.
SLOW = [
    (r"(a+)+$", "a" * 30_000 + "b"),
    (r"(a|aa)+$", "a" * 30_000 + "b"),
    (r"(?:(a*)*)*b", "a" * 30_000),
    (r"(x+x+)+y", "x" * 30_000),
    (r"^(([a-z])+.)+[A-Z]([a-z])+$", "a" * 30_000),
    (r"(\w+\s?)+$", "word " * 6000 + "!"),
    (r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)x$", "a" * 30_000),
    (r"(?:a?){1000}a{1000}$", "a" * 30_000 + "b"),
]


@pytest.mark.parametrize(("pattern", "text"), SLOW)
def test_a_search_is_linear_in_the_text(pattern: str, text: str) -> None:
    started = time.process_time()
    assert not is_found(pattern, text)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (r"(?i)\bi cannot\b", "Well, I CANNOT do that.", True),
        (r"(?i)\bi cannot\b", "cannoted", False),
        ("[\u4e00-\u9fff]", "ab\u6f22", True),
        (r"\p{Han}", "ab\u6f22", True),
        (r"\p{Cyrillic}{3}", "da \u0434\u0430", False),
        (r"(?m)^Answer: (A|B)$", "so\nAnswer: B\nbye", True),
        (r"(?s)a.b", "a\nb", True),
        ("tea", "half of a surrogate pair \ud83d and tea", True),
    ],
)
def test_what_is_found(pattern: str, text: str, expected: bool) -> None:
    assert is_found(pattern, text) is expected


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"(sorry", "missing \\)"),
        (r"a(?!b)", "look-ahead"),
        (r"(?<=a)b", "look-behind"),
        (r"(a)\1", "invalid escape sequence"),
        (r"((a{1,1000}){1,1000}){1,1000}", "repetition"),
        ("a|" * MOST_CHARACTERS, "expected at most"),
        ("\ud83d", "surrogate"),
    ],
)
def test_a_pattern_that_is_not_taken_is_named_before_anything_starts(pattern: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"filters\.patterns\.0\.regex: not a regular expression: .*{reason}"):
        load_config(None, [f"filters.patterns=[{{name: mine, regex: {json.dumps(pattern)}}}]"])


def test_no_other_module_compiles_a_pattern_that_is_not_its_own() -> None:
    foreign = []
    for path in Path(mipo_ray.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)]
        for function in functions:
            for call in ast.walk(function):
                if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.args):
                    continue
                if not (isinstance(call.func.value, ast.Name) and call.func.value.id in ("re", "regex")):
                    continue
                escaped = {
                    inner
                    for node in ast.walk(call.args[0])
                    if isinstance(node, ast.Call) and ast.unparse(node.func) == "re.escape"
                    for inner in ast.walk(node)
                }
                names = {
                    node.id for node in ast.walk(call.args[0]) if isinstance(node, ast.Name) and node not in escaped
                }
                if call.func.attr != "escape" and not all(name.isupper() for name in names):
                    foreign.append(f"{path.name}:{call.lineno}")
    assert foreign == []
