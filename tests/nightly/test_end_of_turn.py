"""Answers of an engine whose model calls another token its end than its chat template writes.

python -m pytest tests/nightly/test_end_of_turn.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray.data

from mipo_ray.config.recipe import load_config
from mipo_ray.generation.engine import DEFAULT_SAMPLING, REQUESTS, Sampling
from mipo_ray.generation.rendering import load_tokenizer, render_prompts
from mipo_ray.generation.sampler import policy_engines, sample_responses
from mipo_ray.monitoring.events import recording
from mipo_ray.ray_cluster.resources import Resources
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import open_run
from tests.helpers.tiny_model import END, PAD, START

pytestmark = pytest.mark.usefixtures("ray_cluster")

ON_CPU = Resources(on_gpu=False, dtype="float32", gpus_per_engine=0.0, gpus_per_worker=0.0)
SAMPLES = 96
SPECIAL = range(370, 400)


@pytest.fixture(scope="module")
def unended_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model, whose template ends turns with <|im_end|>, with <|pad|> as the only end token of its files.

    The last tokens of its vocabulary, which it samples now and then, are special ones.
    """
    directory = tmp_path_factory.mktemp("models") / "unended"
    shutil.copytree(tiny_model, directory)
    pad = load_tokenizer(str(tiny_model)).convert_tokens_to_ids(PAD)
    for name, fields in {
        "config.json": {"eos_token_id": pad},
        "generation_config.json": {"eos_token_id": pad},
        "tokenizer_config.json": {"eos_token": PAD},
    }.items():
        values = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(values | fields))
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    names = {number: name for name, number in tokenizer["model"]["vocab"].items()}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [{"id": number, "content": names[number], **special} for number in SPECIAL]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(directory)


def sampled(model: str, directory: Path) -> list[dict[str, Any]]:
    """Answers of up to 24 tokens to one prompt, each with its own seed."""
    sampling = ["generation.sampling.max_tokens=24", "generation.sampling.temperature=1.0"]
    config = load_config(None, [f"model.path={model}", "model.max_model_len=128", *sampling])
    messages = [{"role": "user", "content": "4 + 4 = ?"}]  # none of the words that are special tokens
    (token_ids,) = render_prompts(load_tokenizer(model), [messages], config.prompts.chat)
    requests = [{"prompt_token_ids": token_ids, "seed": seed} for seed in range(SAMPLES)]
    rows = ray.data.from_arrow(pa.table({"requests": pa.array([requests], REQUESTS)}))
    with recording(open_run(str(directory))) as events:
        engines = policy_engines(config, model, ON_CPU)
        answers = sample_responses(
            rows, engines, Sampling({DEFAULT_SAMPLING: config.generation.sampling}), events.at(Round(0), "generate")
        )
        (row,) = answers.take_all()
    return list(row["responses"])


def test_an_answer_ends_where_the_template_ends_a_turn(unended_model: str, tmp_path: Path) -> None:
    end, start, pad = load_tokenizer(unended_model).convert_tokens_to_ids([END, START, PAD])
    answers = sampled(unended_model, tmp_path)
    assert len(answers) == SAMPLES
    ended = [answer for answer in answers if answer["token_ids"][-1] == end]
    assert ended
    for answer in answers:
        token_ids = list(answer["token_ids"])
        assert end not in token_ids[:-1]
        assert (answer["finish_reason"] == "stop") == (token_ids[-1] in (end, pad))
        assert answer["control_tokens"] == sum(token == start or token in SPECIAL for token in token_ids)
    assert any(answer["control_tokens"] for answer in answers)
