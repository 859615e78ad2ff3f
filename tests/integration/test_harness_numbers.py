"""The final numbers of responses, read by lm-evaluation-harness and by this project.

The same model on the same items, in both: tests/nightly/test_lm_evaluation_harness.py.

python -m pytest tests/integration/test_harness_numbers.py
"""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

from mipo_ray.text.final_answers import final_number

CASES = Path(__file__).resolve().parents[1] / "unit" / "text" / "extraction_cases.jsonl"


@pytest.fixture(scope="module")
def harness() -> Path:
    """Where the package lm_eval lies."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (package lm-eval)")
    return Path(lm_eval.__file__).parent


def by_the_harness(task: dict[str, Any], name: str, response: str) -> str:
    """What the harness's own filter extracts from a response, and then makes of it before it compares."""
    from lm_eval.filters.extraction import RegexFilter

    steps = next(steps["filter"] for steps in task["filter_list"] if steps["name"] == name)
    options = {option: value for option, value in steps[0].items() if option != "function"}
    (found,) = next(iter(RegexFilter(**options).apply([[response]], [{}])))
    for ignored in task["metric_list"][0]["regexes_to_ignore"]:
        found = re.sub(ignored, "", found)
    return found


@pytest.mark.parametrize("name", ["strict-match", "flexible-extract"])
def test_numbers_are_read_at_least_as_well_as_by_the_harness(harness: Path, name: str) -> None:
    """On the cases labelled by hand, which were written to be tricky and for these readers.

    A case without an answer is right where the harness finds none either.

    An extracted number counts as right for the harness by its value, which is milder than its exact match of texts.
    """
    task = yaml.safe_load((harness / "tasks/gsm8k/gsm8k.yaml").read_text())
    cases = [json.loads(line) for line in CASES.read_text().splitlines()]
    cases = [case for case in cases if case["kind"] == "number"]
    right_here = right_there = 0
    for case in cases:
        expected = None if case["expected"] is None else Fraction(case["expected"])
        extracted = by_the_harness(task, name, case["response"])
        try:
            there = Fraction(extracted)
        except ValueError:
            there = None
        right_there += there == expected
        right_here += final_number(case["response"]) == expected
    print(f"{name}: {right_there} of {len(cases)} right, here {right_here}")
    assert right_here == len(cases)
    assert 0 < right_there <= right_here
