"""From conditioned rows to the requests that the engine gets.

python -m pytest tests/unit/generation/test_requests.py
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from mipo_ray.config.recipe import load_config
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.generation.requests import TooManyDroppedError, add_requests, check_dropped
from mipo_ray.pairs.schema import MESSAGES
from mipo_ray.storage.pair_statistics import PairStatistics
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


def test_too_few_rows_left_stop_the_run_with_the_table() -> None:
    config = load_config(None, ["filters.max_dropped_share=0.5"])
    check_dropped(PairStatistics(rows=10, kept=5, dropped={"one_sentence": 5}), "here", config)
    with pytest.raises(TooManyDroppedError, match=r"here: more than .*\(50%\).*\n(.*\n)*dropped: one_sentence +6 +60"):
        check_dropped(PairStatistics(rows=10, kept=4, dropped={"one_sentence": 6}), "here", config)
    everything = load_config(None, ["filters.max_dropped_share=1.0"])
    with pytest.raises(TooManyDroppedError, match="here: no row was kept"):
        check_dropped(PairStatistics(rows=10, kept=0, dropped={"too_long": 10}), "here", everything)
