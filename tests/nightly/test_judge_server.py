"""The tiny model behind vLLM's own server judges a finished run.

python -m pytest tests/nightly/test_judge_server.py
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.golden_run import HELD_OUT, SAMPLES, GoldenRun
from tests.helpers.runs import read_directory, run_command
from tests.helpers.vllm_server import KEY, served_by_vllm

PAIRS = HELD_OUT * SAMPLES


@pytest.fixture
def run_dir(golden_run: GoldenRun, tmp_path: Path) -> Path:
    """A copy of the finished run, which no judge has judged."""
    return golden_run.copy(tmp_path / "run")


def test_vllms_own_server_judges(
    golden_run: GoldenRun, run_dir: Path, tiny_model: Path, ray_address: str, monkeypatch
) -> None:
    template = run_dir.parent / "short.txt.j2"
    template.write_text("Q: {{ question }}\nA: {{ answer_a }}\nB: {{ answer_b }}\nVerdict: A, B or tie?")
    options = [*golden_run.options, f"run_dir={run_dir}", f"evaluate.judge.pairwise_template={template}"]
    with served_by_vllm(
        tiny_model, run_dir.parent / "server.log", "--served-model-name=judge", "--max-model-len=512"
    ) as url:
        options += ["evaluate.judge.model=judge", f"evaluate.judge.endpoint={url}"]
        monkeypatch.setenv("OPENAI_API_KEY", "sk-another-key")
        code, output = run_command(ray_address, *options)
        assert code == 2, output
        assert "refuses the key in the environment variable OPENAI_API_KEY" in output
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        code, output = run_command(ray_address, *options, "evaluate.judge.max_tokens=500")
        assert code == 2, output
        assert "This model's maximum context length is 512 tokens" in output
        assert not (run_dir / "rounds/000/judge/pairwise/manifest.json").exists()
        code, output = run_command(ray_address, *options, "evaluate.judge.max_tokens=16")
    # A random model's judgements are no verdicts.
    assert code == 2, output
    assert "round 0  pairwise by judge" in output
    assert f"of {2 * PAIRS} judgements name no verdict that can be read" in output
    rows = read_directory(run_dir / "rounds/000/judge/pairwise")
    assert Counter(row["order"] for row in rows) == {"base_first": PAIRS, "policy_first": PAIRS}
    assert all(0 < row["tokens"] <= 16 and row["finish_reason"] in ("stop", "length") for row in rows)
