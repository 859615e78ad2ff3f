"""The pages: one README that fits, links that lead somewhere, and names that the code still has."""

import ast
import re
from pathlib import Path

import pytest

from tests.helpers.model_zoo import ZOO

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
CLUSTER_PAGES = sorted((ROOT / "cluster").rglob("*.md"))
READMES = [ROOT / "README.md", *(ROOT / room / "README.md" for room in ("benchmarks", "jobs"))]
EVERY_PAGE = [*READMES, *CLUSTER_PAGES, *PAGES]
every_page = pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))

LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")
# A file of the repository, as it stands between backticks or in a command.
NAMED_FILE = re.compile(r"(?<![\w/.-])(?:mipo_ray|tests|benchmarks|jobs|cluster|docs|requirements)/[\w./-]+\.[a-z]+\b")
MODULE = re.compile(r"python -m ((?:mipo_ray|benchmarks)[\w.]*)")
STEP = re.compile(r"^\d+\. `([\w/]+\.py)` `(\w+)`", re.MULTILINE)


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names under which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_first_page_links_to_every_other_one() -> None:
    linked = {link for link, _ in LINK.findall((ROOT / "README.md").read_text())}
    assert len(PAGES) >= 10
    assert {f"docs/{page.name}" for page in PAGES} <= linked


def test_the_first_page_names_every_room_and_module() -> None:
    text = (ROOT / "README.md").read_text()
    rooms = [f"{path.parent.name}/" for path in (ROOT / "mipo_ray").glob("*/__init__.py")]
    modules = [path.name for path in (ROOT / "mipo_ray").glob("*.py") if path.name != "__init__.py"]
    assert len(rooms) > 10
    assert [name for name in rooms + modules if f"`{name}`" not in text] == []


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    links = [link or image for link, image in LINK.findall(without_code(page.read_text()))]
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@every_page
def test_files_and_modules_that_are_named_are_there(page: Path) -> None:
    text = page.read_text()
    # jobs/NAME.yaml stands for any recipe.
    files = [name for name in NAMED_FILE.findall(text) if "NAME" not in name]
    modules = [name.replace(".", "/") for name in MODULE.findall(text)]
    assert [name for name in files if not (ROOT / name).exists()] == []
    missing = [name for name in modules if not list(ROOT.glob(f"{name}.py")) + list(ROOT.glob(f"{name}/__main__.py"))]
    assert missing == []


def test_the_walks_name_functions_that_are_there() -> None:
    steps = STEP.findall((ROOT / "docs" / "development.md").read_text())
    assert len(steps) > 20
    for file, function in steps:
        tree = ast.parse((ROOT / "mipo_ray" / file).read_text())
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert function in defined, f"{file}: {function}"


def test_the_walks_say_how_long_they_are() -> None:
    text = (ROOT / "docs" / "development.md").read_text()
    heading = r"^### [^\n]+: (\d+) (functions|files)(?: \(aim: \d+\))?\n"
    walks = re.findall(rf"{heading}(.*?)(?=^##)", text, flags=re.MULTILINE | re.DOTALL)
    assert len(walks) == 3
    for length, what, section in walks:
        steps = STEP.findall(section)
        assert len(steps) == int(length)
        assert len({file for file, _ in steps}) == len(steps) or what == "functions"


def test_the_page_shows_the_floors_that_the_import_test_holds() -> None:
    rule = (ROOT / "tests" / "unit" / "test_imports.py").read_text()
    floors = [line.strip() for line in re.search(r'FLOORS = """\n(.*?)"""', rule, re.DOTALL).group(1).splitlines()]
    assert "\n".join(floors) in (ROOT / "docs" / "development.md").read_text()


def test_the_page_counts_the_families_of_the_model_zoo() -> None:
    text = " ".join((ROOT / "docs/training.md").read_text().split())
    families, settings = len({member.family for member in ZOO.values()}), len(ZOO)
    agreeing = sum(member.refused is None for member in ZOO.values())
    assert {member.family for member in ZOO.values() if member.refused is None} == {m.family for m in ZOO.values()}
    assert f"tiny models of {families} families in {settings} settings: in {agreeing} vLLM" in text
