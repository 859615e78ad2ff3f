"""No module runs what is data: what ruff's rules (S, in pyproject.toml) do not know is looked for here.

python -m pytest tests/unit/test_data_is_data.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# What unpickles, and the only module that may.
UNPICKLES = {
    "torch.load": "training/checkpoint.py",  # where it is replaced by the restricted one
    "pickle.loads": "text/limited_templates.py",  # its own request, through its own pipe
    "pickle.load": None,
    "cloudpickle.loads": None,
    "cloudpickle.load": None,
    "dill.loads": None,
    "joblib.load": None,
    "numpy.load": None,
    "np.load": None,
    "pandas.read_pickle": None,
}

# What compiles or renders a template, and the modules that may: within limits, templates of this project, or where a
# tokenizer's class does it by code of its own.
TEMPLATES = {
    "apply_chat_template": {"generation/rendering.py"},
    "from_string": {"text/limited_templates.py", "comparison/tables.py"},
    "get_template": {"report/page.py"},
    "Template": set(),
    "render_jinja_template": set(),
    "_compile_jinja_template": set(),
    "_cached_compile_jinja_template": set(),
    "_get_control_tokens": set(),
    "_get_template_literal_text": set(),
}


def uses(source: str) -> Iterator[str]:
    """Every dotted name that a module reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def calls(source: str) -> Iterator[str]:
    """The last name of everything that a module calls."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            yield node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id


def loads_of_models(source: str) -> Iterator[set[str]]:
    """The keyword arguments of every call that loads a model's weights."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value
        if node.func.attr == "from_pretrained" and isinstance(owner, ast.Name) and owner.id.startswith("AutoModel"):
            yield {
                keyword.arg or ""
                for keyword in node.keywords
                if keyword.arg != "use_safetensors" or ast.unparse(keyword.value) == "True"
            }


def modules() -> list[Path]:
    found = sorted((REPOSITORY / "mipo_ray").rglob("*.py"))
    assert len(found) > 100
    return found


def test_nothing_is_unpickled() -> None:
    found = [
        (path.relative_to(REPOSITORY / "mipo_ray").as_posix(), name)
        for path in modules()
        for name in uses(path.read_text())
        if name in UNPICKLES
    ]
    assert [(place, name) for place, name in found if UNPICKLES[name] != place] == []


def test_weights_are_safetensors() -> None:
    """Or the embedded model's GGUF file, which has no code in it either."""
    calls = [(path, keywords) for path in modules() for keywords in loads_of_models(path.read_text())]
    assert len(calls) >= 4
    assert [path for path, keywords in calls if not keywords & {"use_safetensors", "gguf_file"}] == []


def test_templates_are_rendered_within_limits() -> None:
    found: dict[str, set[str]] = {name: set() for name in TEMPLATES}
    for path in modules():
        for name in calls(path.read_text()):
            if name in TEMPLATES:
                found[name].add(path.relative_to(REPOSITORY / "mipo_ray").as_posix())
    assert found == TEMPLATES


@pytest.mark.parametrize(
    ("line", "name"), [("state = torch.load(path)", "torch.load"), ("load = pickle.load", "pickle.load")]
)
def test_the_first_test_finds_them(line: str, name: str) -> None:
    assert name in uses(line)


@pytest.mark.parametrize("options", ["", "use_safetensors=False", "use_safetensors=other"])
def test_the_second_test_finds_them(options: str) -> None:
    (keywords,) = loads_of_models(f"AutoModelForCausalLM.from_pretrained(path, {options})")
    assert "use_safetensors" not in keywords
