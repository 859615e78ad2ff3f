"""The pages for people who come from OpenRLHF and TRL: every field and every flag in their tables exists.

python -m pytest tests/unit/test_coming_from.py
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from mipo_ray.config.recipe import fields, load_config

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / "docs" / f"from-{name}.md").read_text() for name in ("openrlhf", "trl")}
FIELDS = {path for path, _ in fields()}
ROW = re.compile(r"^\| (.+?) \| (.+?) \|.*\|$", re.MULTILINE)
CODE = re.compile(r"`([^`]+)`")
# Of code in the pages: `train.beta=0.1`, `generation.pool.engine_args.max_num_seqs=64`, `filters.min_pmi`.
NAMED = re.compile(r"(?<![\w.-])(?:prompts|model|generation|filters|train|evaluate|ray|conditioning|cost)\.[a-z_.]+")


def rows(page: str) -> list[tuple[str, str]]:
    """Their flags and our fields, of every table."""
    found = ROW.findall(PAGES[page])
    return [(theirs, ours) for theirs, ours in found if "---" not in theirs and ours != "mipo-ray"]


def without_table_keys(name: str) -> str:
    """A field of a mapping takes any key: the name of the field itself."""
    return next((field for field in FIELDS if name.startswith(f"{field}.")), name)


@pytest.mark.parametrize("page", PAGES)
def test_every_field_in_the_tables_is_there_and_takes_its_value(page: str) -> None:
    named = [code for _, ours in rows(page) for code in CODE.findall(ours)]
    assert len(named) > 30
    for code in named:
        assert code.partition("=")[0] in FIELDS, code
        if "=" in code:
            load_config(None, [code])
    assert all(ours == "none" or CODE.search(ours) for _, ours in rows(page))


@pytest.mark.parametrize("page", PAGES)
def test_every_field_in_the_text_is_there(page: str) -> None:
    for name in NAMED.findall(" ".join(CODE.findall(PAGES[page]))):
        assert without_table_keys(name.rstrip(".")) in FIELDS, name


@pytest.mark.parametrize("page", PAGES)
def test_the_command_is_of_this_configuration(page: str) -> None:
    (command,) = re.findall(r"^python -m mipo_ray\.run (jobs/\S+\.yaml) ((?:.*\\\n)*.*)$", PAGES[page], re.MULTILINE)
    recipe, overrides = command
    config = load_config(ROOT / recipe, shlex.split(overrides.replace("\\\n", " ")))
    assert config.rounds > 1
    assert config.train.batch_size == 128


def annotated(file: Path) -> set[str]:
    """The fields of the dataclasses in a file, which is not imported."""
    return {
        item.target.id
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def test_every_flag_of_trl_is_one_of_the_version_that_the_page_names() -> None:
    (version,) = re.findall(r"Compared with TRL (\d+\.\d+\.\d+),", PAGES["trl"])
    assert version == importlib.metadata.version("trl")
    trl, transformers = (
        Path(str(importlib.util.find_spec(name).origin)).parent  # type: ignore[union-attr]
        for name in ("trl", "transformers")
    )
    files = ["trainer/base_config.py", "trainer/dpo_config.py", "trainer/model_config.py", "scripts/utils.py"]
    known = set().union(*(annotated(trl / file) for file in files), annotated(transformers / "training_args.py"))
    sampling = annotated(trl / "experimental" / "online_dpo" / "online_dpo_config.py")
    tables, sampled = PAGES["trl"].split("## Sampling")
    for text, names in ((tables, known), (sampled, sampling)):
        flags = [flag for theirs, _ in ROW.findall(text) for flag in re.findall(r"--(\w+)", theirs)]
        assert flags
        assert [flag for flag in flags if flag not in names] == []


def test_what_the_trl_page_says_of_defaults_holds() -> None:
    """Ours; those of TRL stand in its own source."""
    config = load_config()
    assert (config.train.learning_rate, config.train.epochs, config.train.beta) == (5e-7, 1, 0.1)
    assert (config.train.adam_betas, config.train.warmup_ratio) == ((0.9, 0.95), 0.03)
    assert (config.seed, config.generation.sampling.max_tokens, config.train.batch_size) == (0, 48, 4)
    source = importlib.util.find_spec("trl")
    assert source is not None
    text = (Path(str(source.origin)).parent / "trainer" / "dpo_config.py").read_text()
    assert re.search(r"learning_rate: float = field\(\s*default=1e-6", text)
    assert re.search(r"max_length: int \| None = field\(\s*default=1024", text)
