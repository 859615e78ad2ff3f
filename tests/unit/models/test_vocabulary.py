"""Every token that a tokenizer can make has a row in the embeddings, or the model is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mipo_ray.errors import UserError
from mipo_ray.models.source import check_model
from mipo_ray.run import main
from tests.unit.models.test_models import TEMPLATE, write_model

ROWS = 8


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return vocabulary_model(tmp_path / "model")


def vocabulary_model(directory: Path) -> Path:
    write_model(directory)
    write(directory, "config.json", model_type="llama", vocab_size=ROWS)
    save_file({"model.embed_tokens.weight": numpy.zeros((ROWS, 2), numpy.float32)}, directory / "model.safetensors")
    write(directory, "tokenizer.json", model={"vocab": {letter: number for number, letter in enumerate("abcdef")}})
    return directory


def write(directory: Path, name: str, **content: Any) -> None:
    (directory / name).write_text(json.dumps(content))


def added(number: int, *, special: bool = False, token: str = "<new>") -> dict[str, Any]:
    return {"id": number, "content": token, "special": special}


def test_a_tokenizer_that_fits_passes(model: Path) -> None:
    write(model, "tokenizer.json", model={"vocab": {"a": 0}}, added_tokens=[added(ROWS - 1)])
    check_model(str(model))


BEYOND: dict[str, tuple[str, dict[str, Any], str]] = {
    "ordinary token": ("tokenizer.json", {"model": {"vocab": {"a": 0, "b": ROWS}}}, "'b'"),
    "unigram": ("tokenizer.json", {"model": {"vocab": [[str(n), 0.0] for n in range(ROWS + 1)]}}, "'8'"),
    "added token": ("tokenizer.json", {"added_tokens": [added(ROWS)]}, "'<new>'"),
    "added in the settings": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"8": {"content": "<new>", "special": False}}},
        "'<new>'",
    ),
    "added in the old file": ("added_tokens.json", {"<new>": ROWS}, "'<new>'"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_a_token_beyond_the_embeddings_is_refused_by_name(case: str, model: Path) -> None:
    file, content, token = BEYOND[case]
    write(model, file, **content)
    with pytest.raises(UserError, match=rf"{file}: token {token}: expected an id below 8, .*found 8"):
        check_model(str(model))


def test_a_special_token_counts_where_the_template_or_a_role_uses_it(model: Path) -> None:
    write(model, "tokenizer.json", added_tokens=[added(ROWS, special=True)])
    check_model(str(model))  # as of models whose eyes were taken out
    (model / "chat_template.jinja").write_text(TEMPLATE + "<new>")
    with pytest.raises(UserError, match="token '<new>': expected an id below 8"):
        check_model(str(model))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    for role in ("eos_token", "pad_token"):
        write(model, "tokenizer_config.json", **{role: "<new>"})
        with pytest.raises(UserError, match="token '<new>'"):
            check_model(str(model))
        write(model, "tokenizer_config.json", **{role: {"content": "<new>"}})
        with pytest.raises(UserError, match="token '<new>'"):
            check_model(str(model))


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("config.json", "eos_token_id", 8),
        ("generation_config.json", "eos_token_id", [1, 9]),
        ("config.json", "pad_token_id", 8),
    ],
)
def test_a_named_id_beyond_the_embeddings_is_refused(file: str, field: str, value: Any, model: Path) -> None:
    content = json.loads((model / "config.json").read_text()) if file == "config.json" else {}
    write(model, file, **content, **{field: value})
    with pytest.raises(UserError, match=rf"{file}: field {field}: expected an id below 8"):
        check_model(str(model))


def test_fewer_rows_than_the_configuration_says_are_refused(model: Path) -> None:
    write(model, "config.json", model_type="llama", vocab_size=ROWS + 1)
    with pytest.raises(UserError, match="field vocab_size: expected at most 8, the rows of the embeddings, found 9"):
        check_model(str(model))
    write(model, "config.json", model_type="llama", vocab_size=ROWS - 3)  # more rows than used: padding
    with pytest.raises(UserError, match="token 'f': expected an id below 5"):
        check_model(str(model))


@given(number=st.integers(0, 3 * ROWS), special=st.booleans())
def test_exactly_the_ids_beyond_are_refused(
    number: int, special: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = vocabulary_model(tmp_path_factory.mktemp("ids") / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE + "<new>")
    write(model, "tokenizer.json", added_tokens=[added(number, special=special)])
    if number < ROWS:
        check_model(str(model))
    else:
        with pytest.raises(UserError, match=f"expected an id below 8, .*found {number}"):
            check_model(str(model))


def test_the_dry_run_refuses_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(model, "tokenizer.json", added_tokens=[added(ROWS)])
    assert main(["--dry-run", f"run_dir={tmp_path}/run", f"model.path={model}"]) == 2
    assert "token '<new>': expected an id below 8" in capsys.readouterr().err
