"""A question to two policies by real engines: their greedy answers and the context PMI are what transformers gives.

python -m pytest tests/nightly/test_chat.py
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mipo_ray.storage.run_directory import RunDirectory
from tests.helpers.engine_processes import wait_until_nothing_is_left
from tests.helpers.two_policies import make_two_policies, plain_logprob

QUESTION, CONTEXT, TOKENS = "What should I cook for dinner?", "My name is Ada and I have no time.", 12


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_two_policies(tiny_model, tmp_path_factory.mktemp("chat") / "run")


def start(run: RunDirectory, address: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mipo_ray.chat", run.url, f"ray.address={address}"]
    greedy = ["--temperature", "0", "--max-tokens", str(TOKENS)]
    return subprocess.Popen(
        [*command, *words, *greedy, "--context", CONTEXT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def by_transformers(run: RunDirectory, initial: Path) -> dict[str, tuple[list[int], float]]:
    """Of each policy: its greedy answer, and what the context adds to its log-prob under the initial model, nats."""
    tokenizer = AutoTokenizer.from_pretrained(initial)
    prompt, plain = (
        list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
        )
        for text in (f"{CONTEXT}\n\n{QUESTION}", QUESTION)
    )
    judge = AutoModelForCausalLM.from_pretrained(initial, dtype=torch.float32).eval()
    found = {}
    for key, directory in (("base", initial), ("0", Path(run.path("rounds/000/train/policy")))):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        answer: list[int] = []
        while len(answer) < TOKENS and tokenizer.eos_token_id not in answer:
            with torch.no_grad():
                answer.append(int(model(torch.tensor([[*prompt, *answer]])).logits[0, -1].argmax()))
        found[key] = answer, plain_logprob(judge, prompt, answer) - plain_logprob(judge, plain, answer)
    return found


def test_answers_and_pmi_are_those_of_transformers(run: RunDirectory, ray_address: str, tiny_model: Path) -> None:
    process = start(run, ray_address, "--once", QUESTION, "--json")
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "starting engines for base, 0 (one each)" in errors
    wait_until_nothing_is_left()
    told: dict[str, Any] = json.loads(output)
    expected, end = by_transformers(run, tiny_model), AutoTokenizer.from_pretrained(tiny_model).eos_token_id
    assert [answer["round"] for answer in told["answers"]] == ["base", "0"]
    for answer in told["answers"]:
        token_ids, pmi = expected[answer["round"]]
        assert answer["token_ids"] == token_ids
        assert answer["context_pmi_nats"] == pytest.approx(pmi, abs=1e-3)
        assert answer["cut"] == (token_ids[-1] != end)
    assert expected["base"][0] != expected["0"][0]


def test_policies_that_share_an_engine_say_the_same_and_ctrl_c_ends_it(
    run: RunDirectory, ray_address: str, tiny_model: Path
) -> None:
    """One engine takes the weights of each, to and fro, and the second question gets what the first got."""
    process = start(run, ray_address, "generation.pool.cpus_per_engine=4")
    assert process.stdin is not None
    assert process.stdout is not None
    expected = by_transformers(run, tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for _ in range(2):
        process.stdin.write(f"{QUESTION}\n")
        process.stdin.flush()
        shown = read_answers(process)
        figures = re.findall(r"^(\d+) tokens.*; context PMI (\S+) nats$", shown, flags=re.MULTILINE)
        for (token_ids, pmi), found in zip(expected.values(), figures, strict=True):
            assert int(found[0]) == len(token_ids)
            assert float(found[1]) == pytest.approx(pmi, abs=0.01)  # as it is shown
            text = tokenizer.decode(token_ids, skip_special_tokens=True)
            # A character that a cut answer leaves half is shown by one and left out by the other.
            assert text.replace("\ufffd", "") in shown.replace("\ufffd", "")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "starting engines for base, 0 (1 for all of them, with weights that change)" in errors
    assert "stopped by SIGINT" in errors
    assert "did not take the weights" not in errors
    assert "Traceback" not in errors
    wait_until_nothing_is_left()


def read_answers(process: subprocess.Popen[str]) -> str:
    """What it prints until both answers have their figures."""
    assert process.stdout is not None
    deadline, text = time.monotonic() + 300, ""
    while text.count("context PMI ") < 2:
        assert time.monotonic() < deadline, text
        line = process.stdout.readline()
        assert line, (text, process.communicate()[1])
        text += line
    return text
