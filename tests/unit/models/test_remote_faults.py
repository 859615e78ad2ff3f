"""A model on an S3 server that fails: what passes is not noticed, what stays is named, and no half copy is used.

python -m pytest tests/unit/models/test_remote_faults.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mipo_ray import paths
from mipo_ray.errors import UserError
from mipo_ray.models.source import local_model_directory
from tests.helpers.faulty_proxy import Fault, always, no_faults, seeded
from tests.helpers.s3_server import Bucket


@pytest.fixture
def bucket(bucket: Bucket, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """With a model in it, and an empty cache."""
    monkeypatch.setenv("MIPO_RAY_CACHE", str(tmp_path / "cache"))
    for path in tiny_model.iterdir():
        if path.is_file():
            bucket.ask("PUT", f"model/{path.name}", path.read_bytes())
    return bucket


def check_complete(found: str, tiny_model: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert Path(found, name).read_bytes() == (tiny_model / name).read_bytes()


def test_a_store_that_fails_in_one_of_five_requests_gives_the_whole_model(
    bucket: Bucket, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.retries.standard import ExponentialBackoff

    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.0)
    bucket.proxy.plan = seeded(1, 1 / 5, ["unavailable", "slow_down", "cut_answer", "cut_request"])
    check_complete(local_model_directory(f"{bucket.url}/model"), tiny_model)
    assert bucket.proxy.injected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer_config.json", "/tokenizer_config.json: cannot be read"),  # while the model is checked
        ("notes.txt", "/notes.txt: cannot be read"),  # while it is fetched
    ],
)
@pytest.mark.parametrize(("fault", "found"), [("denied", "PermissionError"), ("unavailable", "OSError")])
def test_a_store_that_stops_in_the_middle_is_named_and_leaves_no_half_model(
    fault: Fault,
    found: str,
    name: str,
    message: str,
    bucket: Bucket,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {"retries": {"mode": "standard", "total_max_attempts": 1}}
    monkeypatch.setattr(paths, "S3_CLIENT", paths.S3_CLIENT | {"config_kwargs": config})
    bucket.ask("PUT", "model/notes.txt", b"a file that is brought along and not looked at")
    bucket.proxy.plan = always(fault, "GET", name)
    with pytest.raises(UserError, match=rf"^{bucket.url}/model{message}: {found}: "):
        local_model_directory(f"{bucket.url}/model")
    finished = [path for path in tmp_path.glob("cache/models/*") if path.is_dir() and path.suffix != ".partial"]
    assert finished == []
    bucket.proxy.plan = no_faults
    check_complete(local_model_directory(f"{bucket.url}/model"), tiny_model)
