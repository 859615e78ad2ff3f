"""From conditioned rows to the requests that the engine gets.

python -m pytest tests/unit/generation/test_requests.py
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mipo_ray.config.recipe import load_config
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.generation.requests import (
    EQUAL_PROMPTS,
    TooManyDroppedError,
    add_requests,
    check_dropped,
    refuse_equal_prompts,
)
from mipo_ray.prompts.rows import MESSAGES
from mipo_ray.storage.pair_statistics import PairStatistics
from tests.helpers.chat_templates import LOSING
from tests.helpers.tiny_model import make_tiny_model

LONG = "word " * 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


def chat(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def rows_of(model: str, prompts: list[str], partners: list[list[int]], dropped: list[str], *overrides: str) -> Any:
    """add_requests over rows that reuse the responses of `partners`, or without partners get a prompt of their own."""
    config: Config = load_config(None, [f"model.path={model}", "model.max_model_len=128", *overrides])
    mismatched = [
        []
        if reason
        else ([chat(prompts[other]) for other in row] or [chat("And now?")] * config.generation.negatives_per_prompt)
        for row, reason in zip(partners, dropped, strict=True)
    ]
    block = pa.table(
        {
            "prompt_id": pa.array([f"p{row}" for row in range(len(prompts))]),
            "messages": pa.array([chat(prompt) for prompt in prompts], MESSAGES),
            "mismatched_messages": pa.array(mismatched, pa.list_(MESSAGES)),
            "partner_index": pa.array(partners, pa.list_(pa.int32())),
            "dropped": pa.array(dropped, pa.string()),
        }
    )
    return add_requests(block, config=config, policy=model, round_index=0).to_pylist()


def test_matched_requests_come_first_each_with_a_seed_of_its_own(model: str) -> None:
    numbers = ["generation.samples_per_prompt=2", "generation.negatives_per_prompt=4"]
    (row,) = rows_of(model, ["How are you?"], [[]], [""], *numbers)
    asked = [request["prompt_token_ids"] for request in row["requests"]]
    assert asked == [row["prompt_token_ids"]] * 2 + row["mismatched_token_ids"]
    assert len({request["seed"] for request in row["requests"]}) == 6


def test_a_dropped_row_is_sampled_only_for_those_that_reuse_its_response(model: str) -> None:
    # p0 uses p1, which gives no pair; p3 gives none either, and nobody uses it.
    rows = rows_of(model, ["a", "b", "c", "d"], [[1], [], [0], []], ["", "one_sentence", "", "one_sentence"])
    assert [len(row["requests"]) for row in rows] == [1, 1, 1, 0]
    assert rows[1]["requests"][0]["prompt_token_ids"] == rows[1]["prompt_token_ids"]


def test_prompts_beyond_the_window_are_dropped_or_refused(model: str) -> None:
    prompts, partners = ["a", LONG, "c", "d"], [[1], [2], [3], [0]]
    rows = rows_of(model, prompts, partners, [""] * 4, "filters.drop_too_long=true")
    assert [row["dropped"] for row in rows] == ["too_long", "too_long", "", ""]
    # p0 is dropped for its partner's length; p3 still gets its response.
    assert [len(row["requests"]) for row in rows] == [1, 0, 1, 1]
    with pytest.raises(UserError, match=r"prompt 'p0'.*filters\.drop_too_long=true"):
        rows_of(model, prompts, partners, [""] * 4)


def with_template(model: str, directory: Path, template: str) -> str:
    """A copy of the model with another chat template."""
    shutil.copytree(model, directory)
    (directory / "chat_template.jinja").write_text(template)
    return str(directory)


def test_a_row_whose_two_prompts_are_the_same_tokens_is_dropped(model: str, tmp_path: Path) -> None:
    # To this template white space and case say nothing; p1 and p2 are mismatched with each other.
    folding = "{% for m in messages %}{{ m.content | lower | trim }}<|im_end|>{% endfor %}"
    partners = [[1], [2], [1], [0]]
    rows = rows_of(
        with_template(model, tmp_path / "folding", folding), ["a", "B", "  b", "d"], partners, ["", "", "", ""]
    )
    assert rows[1]["prompt_token_ids"] == rows[2]["prompt_token_ids"]
    assert [row["dropped"] for row in rows] == ["", EQUAL_PROMPTS, EQUAL_PROMPTS, ""]
    # p0 still needs p1's response; nobody needs p2's.
    assert [len(row["requests"]) for row in rows] == [1, 1, 0, 1]


def test_one_equal_prompt_among_several_mismatched_ones_drops_the_row(model: str) -> None:
    rows = rows_of(model, ["a", "b", "a"], [[1, 2], [0, 2], []], ["", "", "x"], "generation.negatives_per_prompt=2")
    assert [row["dropped"] for row in rows] == [EQUAL_PROMPTS, "", "x"]


@pytest.mark.parametrize(("equal", "kept", "is_refused"), [(0, 9, False), (4, 5, False), (5, 4, True), (8, 0, True)])
def test_mostly_equal_prompts_stop_the_run_before_it_samples(equal: int, kept: int, is_refused: bool) -> None:
    config = load_config(None, ["prompts.path=rows.jsonl"])
    if not is_refused:
        refuse_equal_prompts(equal, kept, "org/model", config)
        return
    with pytest.raises(UserError, match=rf"rows\.jsonl: .*same token ids in {equal} of {equal + kept} .*org/model"):
        refuse_equal_prompts(equal, kept, "org/model", config)


@pytest.mark.parametrize("name", ["all lines but the first", "the end of long texts"])
def test_a_template_that_loses_text_is_refused_with_the_prompt(model: str, tmp_path: Path, name: str) -> None:
    losing = with_template(model, tmp_path / "losing", LOSING[name])
    with pytest.raises(UserError, match=r"prompt 'p0': .*losing: the chat template leaves out the user message"):
        rows_of(losing, ["a\nb " * 60, "c"], [[1], [0]], ["", ""], "model.max_model_len=1000")


def test_too_few_rows_left_stop_the_run_with_the_table() -> None:
    config = load_config(None, ["filters.max_dropped_share=0.5"])
    check_dropped(PairStatistics(rows=10, kept=5, dropped={"one_sentence": 5}), "here", config)
    with pytest.raises(TooManyDroppedError, match=r"here: more than .*\(50%\).*\n(.*\n)*dropped: one_sentence +6 +60"):
        check_dropped(PairStatistics(rows=10, kept=4, dropped={"one_sentence": 6}), "here", config)
    everything = load_config(None, ["filters.max_dropped_share=1.0"])
    with pytest.raises(TooManyDroppedError, match="here: no row was kept"):
        check_dropped(PairStatistics(rows=10, kept=0, dropped={"too_long": 10}), "here", everything)
