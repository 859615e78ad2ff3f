"""Secrets in texts and values are known, whatever they stand in, and what is no secret stays.

python -m pytest tests/unit/test_redaction.py
"""

from __future__ import annotations

import pickle
import time

import pytest

from mipo_ray.errors import UserError, brief, cut
from mipo_ray.redaction import names_secret, read_secret, redacted, redacted_values, secret_in
from mipo_ray.terminal import plain

SECRET = "wq7Zr4Kd91Lm"
HIDDEN = [
    f"s3://me:{SECRET}@bucket/run",
    f"https://{SECRET}@host/x",
    f"simplecache::s3://AKID:{SECRET}@bucket/x",
    f"s3://AKID:ab/{SECRET}@bucket/x",
    f"https://host/x?X-Amz-Signature={SECRET}&part=1",
    f"https://host/x?a=1&X%2DAmz%2DCredential={SECRET}",
    f"https://store/x?sv=2024&sig={SECRET}",
    f"https://host/x#access_token={SECRET}",
    f"abfss://me:{SECRET}@account/x",
    f"hf_{SECRET}{SECRET}",
    f"sk-proj-{SECRET}{SECRET}",
    f"ghp_{SECRET}{SECRET}",
    f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----",
]
NAMED = [
    "{{'api_key': '{}'}}",
    "api_key={}",
    "hf_token: {}",
    "AWS_SECRET_ACCESS_KEY = {}",
    "Authorization: Bearer {}",
    '{{"password": "a {}"}}',
    "found 'Bearer {}'",
]
PLAIN = [
    "s3://bucket/run",
    "abfss://container@account.dfs.core.windows.net/x",
    "hf://datasets/openai/gsm8k@main/main/test-*.parquet",
    "hf://gpt2@main/config.json",
    "sftp://me@host/x",
    "http://[::1]:8000/v1",
    "http://host:8000/v1?part=2",
    "memory://run",
    "evaluate.judge.api_key_variable: OPENAI_API_KEY",
    "tokens          24,000 in all",
    "max_num_batched_tokens=2048, tokenizer: x",
    "runs/sk-learning-about-tokens",
    "expected the key of evaluate.judge.endpoint",
]


@pytest.mark.parametrize("text", HIDDEN)
def test_a_secret_that_shows_itself_is_known(text: str) -> None:
    assert secret_in(text) is not None
    assert secret_in(f"see {text}, please") is not None
    for shown in (redacted(text), plain(f"a {text} b"), brief(text), brief({"x": [text]}), str(UserError(text))):
        assert SECRET not in shown
    assert SECRET not in cut(f"{'a' * 150} {text}")
    assert SECRET not in str(redacted_values({"x": [{"y": (text,)}]}))


@pytest.mark.parametrize("form", NAMED)
def test_a_secret_that_is_named_is_not_shown(form: str) -> None:
    assert SECRET not in redacted(form.format(SECRET))


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_stays(text: str) -> None:
    assert secret_in(text) is None
    assert redacted(text) == text


def test_what_a_secret_stands_in_stays() -> None:
    assert redacted(f"s3://me:{SECRET}@bucket/run is full") == "s3://(not shown)@bucket/run is full"
    assert redacted(f"https://h/x?part=1&sig={SECRET}") == "https://h/x?part=1&sig=(not shown)"
    assert redacted(redacted(f"api_key: {SECRET}, beta: 0.1")) == "api_key: (not shown), beta: 0.1"


def test_values_of_the_environment_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    monkeypatch.setenv("JUDGE", f"{SECRET}2 ")
    monkeypatch.setenv("SHORT_TOKEN", "on")
    monkeypatch.setenv("WORD_TOKEN", "disabled")
    monkeypatch.setenv("PARTITION_KEY", "prompt_id")
    monkeypatch.setenv("LOCAL_API_KEY", "not-needed")
    monkeypatch.setenv("REGION_KEY", "us-east-1")
    monkeypatch.setenv("MINE_CREDENTIALS", "/home/somebody/file")
    assert redacted(f"refused: {SECRET}!") == "refused: (the value of SOME_API_KEY)!"
    assert secret_in(f"x{SECRET}") == "the value of the environment variable SOME_API_KEY"
    harmless = "on, disabled, prompt_id, not-needed, us-east-1, /home/somebody/file"
    assert redacted(harmless) == harmless
    assert secret_in(harmless) is None
    assert read_secret("JUDGE") == f"{SECRET}2"  # by no name that says so: known since it was read
    assert redacted(f"{SECRET}2") == "(the value of JUDGE)"


@pytest.mark.parametrize("key", ["api_key", "apiKey", "hf_token", "token", "aws_secret_access_key", "password", "auth"])
def test_keys_that_name_a_secret(key: str) -> None:
    assert names_secret(key)
    assert redacted_values({key: SECRET, "x": 1}) == {key: "(not shown)", "x": 1}
    assert redacted_values({key: True, "y": {key: None}}) == {key: True, "y": {key: None}}


@pytest.mark.parametrize(
    "key", ["bos_token", "max_tokens", "tokenizer_mode", "api_key_variable", "experiment_key", "author", 3, None]
)
def test_keys_that_name_none(key: object) -> None:
    assert not names_secret(key)


def test_an_error_travels_without_its_secret() -> None:
    error = pickle.loads(pickle.dumps(UserError(f"s3://me:{SECRET}@bucket")))
    assert str(error) == "s3://(not shown)@bucket"


@pytest.mark.parametrize(
    "text", ["a", "a:", "eyJ-", "sk-", "a://", "&a", "s3://a:/b", "x.-", "access_key=", "bearer ", "'", "http://a?&b"]
)
def test_the_time_is_linear_in_the_length(text: str) -> None:
    started = time.process_time()
    redacted(text * (1_000_000 // len(text)))
    assert time.process_time() - started < 10
