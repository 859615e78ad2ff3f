"""The house: imports go down only, and the rooms at the bottom stay free of torch, ray and vllm.

python -m pytest tests/unit/test_imports.py
"""

import ast
from pathlib import Path

import mipo_ray

PACKAGE = Path(mipo_ray.__file__).parent
# A room may import those of the lines below its own; two rooms of one line never import each other.
FLOORS = """
    __main__
    run evaluate compare publish chat
    comparison
    loop
    report planning
    evaluation
    training generation
    judge session
    conditioning pairs monitoring
    prompts storage ray_cluster command
    config
    models examples tables
    text measures errors paths seeds stop_signals terminal
    redaction
"""
FLOOR = {room: -number for number, line in enumerate(FLOORS.strip().splitlines()) for room in line.split()}
LIGHT = ("config", "text", "measures")
HEAVY = {"torch", "ray", "vllm", "transformers", "deepspeed"}


def imports_of(room: str) -> list[tuple[str, str]]:
    """Every import of a room's modules, also those inside functions: (file:line, dotted name)."""
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else sorted((PACKAGE / room).rglob("*.py"))
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                module = str(node.module)
                names = [f"{module}.{alias.name}" for alias in node.names] if module == "mipo_ray" else [module]
            found += [(f"{file.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}", name) for name in names]
    return found


def test_every_module_is_in_a_room_of_the_house():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == FLOOR.keys()


def test_imports_go_down_only():
    inside = [(room, *found) for room in FLOOR for found in imports_of(room) if found[1].startswith("mipo_ray.")]
    up = [
        f"{where} imports {name}"
        for room, where, name in inside
        if (other := name.split(".")[1]) != room and FLOOR[other] >= FLOOR[room]
    ]
    assert len(inside) > 300
    assert up == []


def test_the_lowest_rooms_import_no_engine():
    heavy = [
        f"{where} imports {name}" for room in LIGHT for where, name in imports_of(room) if name.split(".")[0] in HEAVY
    ]
    assert heavy == []
