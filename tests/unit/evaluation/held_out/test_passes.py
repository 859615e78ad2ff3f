"""Which sequences share a forward pass when held-out answers are scored.

python -m pytest tests/unit/evaluation/held_out/test_passes.py
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.evaluation.held_out.passes import scoring_passes

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=3).map(lambda ids: np.array(ids, dtype=np.int64))
ROWS = st.lists(
    st.fixed_dictionaries({"conditionings": st.lists(TOKENS, max_size=4), "response_token_ids": TOKENS}), max_size=12
)


@settings(max_examples=200, deadline=None)
@given(ROWS, st.integers(1, 5))
def test_every_score_has_its_place_and_no_sequence_is_run_twice(rows: list, most: int) -> None:
    passes = scoring_passes(rows, most)
    found = {}
    sequences = []
    for trees in passes:
        assert 1 <= sum(len(scored.places) for scored in trees) <= most
        for scored in trees:
            for response, places in zip(scored.tree.responses, scored.places, strict=True):
                sequences.append((scored.tree.prompt.tobytes(), response.tobytes()))
                for place in places:
                    assert place not in found
                    found[place] = sequences[-1]
    assert len(sequences) == len(set(sequences))
    assert found == {
        (index, position): (prompt.tobytes(), row["response_token_ids"].tobytes())
        for index, row in enumerate(rows)
        for position, prompt in enumerate(row["conditionings"])
    }


def test_a_prompt_stands_once_for_all_responses_under_it() -> None:
    prompt, other = np.array([1, 2, 3]), np.array([4])
    rows = [{"conditionings": [prompt, other], "response_token_ids": np.array([5, index])} for index in range(6)]
    trees = [scored.tree for trees in scoring_passes(rows, 8) for scored in trees]
    assert sorted(len(tree.responses) for tree in trees) == [6, 6]
    assert sorted(len(tree.prompt) for tree in trees) == [1, 3]


@pytest.mark.parametrize(("prompt", "response", "part"), [([], [1], "conditioning"), ([1], [], "response")])
def test_nothing_without_tokens_is_scored(prompt: list, response: list, part: str) -> None:
    row = {
        "conditionings": [np.array(prompt, dtype=np.int64)],
        "response_token_ids": np.array(response, dtype=np.int64),
    }
    with pytest.raises(ValueError, match=f"row 0: expected at least one {part} token"):
        scoring_passes([row], 8)
