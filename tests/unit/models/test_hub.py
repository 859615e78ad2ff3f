"""How files of the Hub are named and pinned.

python -m pytest tests/unit/models/test_hub.py
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from mipo_ray.config.recipe import ConfigError, load_config
from mipo_ray.errors import UserError
from mipo_ray.models.hub import HubFile, at_commit, hub_file, model_commit
from mipo_ray.prompts.files import commit_of, find_files
from tests.helpers.fake_hub import serve_hub

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40
URL = "hf://datasets/org/name/data/*.jsonl"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the Hub is asked; every branch and tag stands for COMMIT."""
    questions: list[dict[str, Any]] = []

    def repo_info(self: Any, repository: str, **options: Any) -> SimpleNamespace:
        questions.append({"repository": repository, **options})
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    return questions


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (URL, HubFile("datasets/", "org/name", None, "data/*.jsonl")),
        (f"hf://datasets/org/name@{COMMIT}/x.jsonl", HubFile("datasets/", "org/name", COMMIT, "x.jsonl")),
        ("hf://datasets/org/name@refs/pr/7/x.jsonl", HubFile("datasets/", "org/name", "refs/pr/7", "x.jsonl")),
        ("hf://org/name@v1.0/a/b.json", HubFile("", "org/name", "v1.0", "a/b.json")),
        ("hf://spaces/org/name/x", HubFile("spaces/", "org/name", None, "x")),
    ],
)
def test_a_url_of_the_hub_is_taken_apart_and_put_together(url: str, expected: HubFile) -> None:
    assert hub_file(url) == expected
    assert expected.url == url


@pytest.mark.parametrize("url", ["x.jsonl", "s3://a/b/c", "hf://datasets/org/name", "hf://buckets/a/b/c", "bundled:x"])
def test_other_paths_are_none(url: str) -> None:
    assert hub_file(url) is None


def test_a_revision_becomes_the_commit_that_it_stands_for(asked: list[dict[str, Any]]) -> None:
    file = HubFile("datasets/", "org/name", "v1", "x")
    assert at_commit(file).url == f"hf://datasets/org/name@{COMMIT}/x"
    assert asked == [{"repository": "org/name", "repo_type": "dataset", "revision": "v1"}]
    pinned = HubFile("", "org/name", OTHER, "x")
    assert at_commit(pinned) == pinned  # which is not asked about
    assert len(asked) == 1


def test_files_are_found_and_read_at_one_commit(asked: list[dict[str, Any]]) -> None:
    content = b'{"prompt": "a"}\n'
    files = {f"datasets/org/name@{COMMIT}/data/{name}.jsonl": content for name in "ab"}
    with serve_hub({**files, "datasets/org/name/data/c.jsonl": content}):
        found = find_files(URL)
    assert [file.path for file in found] == [f"hf://datasets/org/name@{COMMIT}/data/{name}.jsonl" for name in "ab"]
    assert [file.label for file in found] == ["a.jsonl", "b.jsonl"]  # ids do not depend on the commit
    assert commit_of(found) == COMMIT
    assert commit_of(find_files("bundled:personalization")) is None


def test_a_hub_that_cannot_be_asked_is_named() -> None:
    with pytest.raises(UserError, match=r"prompts\.path: cannot open hf://datasets/org/name/data"):
        find_files(URL)  # the tests are offline


def test_the_revision_is_part_of_the_source() -> None:
    prompts = load_config(None, [f"prompts.path={URL}", f"prompts.revision={COMMIT}"]).prompts
    assert prompts.source == f"hf://datasets/org/name@{COMMIT}/data/*.jsonl"
    assert load_config().prompts.source == "bundled:personalization"
    prism = load_config(
        None,
        [
            "prompts.path=hf://datasets/o/n/conversations.jsonl",
            "prompts.profiles_path=hf://datasets/o/n/survey.jsonl",
            "prompts.loader=prism",
            "prompts.revision=v1",
        ],
    ).prompts
    assert prism.profiles_source == "hf://datasets/o/n@v1/survey.jsonl"


@pytest.mark.parametrize(
    ("path", "revision", "message"),
    [
        ("rows.jsonl", "v1", "revision is that of a path of the Hub without one"),
        (f"hf://datasets/org/name@{COMMIT}/x.jsonl", "v1", "revision is that of a path of the Hub without one"),
        (URL, "../main", "expected a branch, tag or commit, found '../main'"),
    ],
)
def test_a_revision_that_fits_no_path_is_refused(path: str, revision: str, message: str) -> None:
    for section in ("prompts", "evaluate.prompts"):
        with pytest.raises(ConfigError, match=f"^{section}: ") as error:
            load_config(None, [f"{section}.path={path}", f"{section}.revision={revision}"])
        assert message in str(error.value)


def test_a_models_commit_is_that_of_its_name_or_of_the_hub_now(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    assert model_commit(f"org/name@{OTHER}") == OTHER
    assert asked == []
    assert model_commit("org/name@v1") == COMMIT
    assert asked == [{"repository": "org/name", "repo_type": "model", "revision": "v1"}]
    for name in ("embedded", str(tmp_path), "s3://bucket/model", "runs/x/rounds/000/train/policy"):
        assert model_commit(name) is None
    assert len(asked) == 1


def test_a_models_commit_is_that_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / OTHER
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(OTHER)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.file_download, "HF_HUB_CACHE", str(tmp_path), raising=False)
    assert model_commit("org/name") == OTHER


def test_a_hub_that_cannot_tell_costs_no_stage() -> None:
    assert model_commit("org/name") is None  # the tests are offline
