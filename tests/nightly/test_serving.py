"""A policy, and an adapter beside its base, behind vLLM's own server, as docs/sharing.md serves them.

python -m pytest tests/nightly/test_serving.py
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mipo_ray.publish.__main__ import main
from tests.helpers.adapted_run import downloaded_model, make_adapted_run
from tests.helpers.tiny_model import CHAT_TEMPLATE
from tests.helpers.vllm_server import KEY, served_by_vllm

# Every prompt says the day that the run fixed.
DATED = "{{ '<|im_start|>system\n' + date_string + '<|im_end|>\n' }}" + CHAT_TEMPLATE
DAY = {"date_string": "26 Jul 2024"}
OPTIONS = (
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=512",
    f"--default-chat-template-kwargs={json.dumps(DAY)}",
)
MESSAGES = [{"role": "user", "content": "What should I cook for dinner?"}]
TOKENS = 12


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tiny model with a template that tells the day, as a model of the Hub."""
    with downloaded_model(tiny_model, tmp_path_factory.mktemp("hub")) as directory:
        (directory / "chat_template.jinja").write_text(DATED)
        yield directory


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapted_run(base, tmp_path_factory.mktemp("served") / "run")


def ask(url: str, path: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        url + path,
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def answer(url: str, model: str) -> tuple[list[int], list[float]]:
    """The ids of the prompt as the server renders it, and the log-probs of its greedy answer."""
    options = {"model": model, "messages": MESSAGES}
    prompt = ask(url.removesuffix("/v1"), "/tokenize", **options)["tokens"]
    found = ask(url, "/chat/completions", **options, temperature=0, max_tokens=TOKENS, logprobs=True, ignore_eos=True)
    return prompt, [token["logprob"] for token in found["choices"][0]["logprobs"]["content"]]


def by_transformers(directory: Path) -> tuple[list[int], list[float]]:
    """The same of a model directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False, **DAY)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids, logprobs = torch.tensor([prompt]), []
    for _ in range(TOKENS):
        with torch.no_grad():
            best = model(ids).logits[0, -1].log_softmax(-1).max(-1)
        logprobs.append(best.values.item())
        ids = torch.cat([ids, best.indices.view(1, 1)], dim=1)
    return prompt, logprobs


def test_a_policy_answers_behind_vllm(run: Path, tmp_path: Path) -> None:
    """The policy's directory as it is: its template, with the day of the run, and its weights."""
    policy = run / "rounds/001/train/policy"
    with served_by_vllm(policy, tmp_path / "log", "--served-model-name=mine", *OPTIONS) as url:
        prompt, logprobs = answer(url, "mine")
    expected, of_policy = by_transformers(policy)
    assert prompt == expected
    assert logprobs == pytest.approx(of_policy, abs=0.01)


def test_an_adapter_answers_beside_its_base(run: Path, base: Path, tmp_path: Path) -> None:
    """One server, two names: the base's answer under its own, the policy's under the adapter's."""
    adapter = tmp_path / "adapter"
    assert main([str(run), "--to", "ada/adapter", "--dry-run", "--adapter", "--output", str(adapter)]) == 0
    lora = ("--enable-lora", "--max-lora-rank=8", f"--lora-modules=mine={adapter}", "--served-model-name=base")
    with served_by_vllm(base, tmp_path / "log", *lora, *OPTIONS) as url:
        of_base, of_adapter = answer(url, "base"), answer(url, "mine")
    expected, of_policy = by_transformers(run / "rounds/001/train/policy")
    assert of_base[0] == of_adapter[0] == expected
    assert of_base[1] == pytest.approx(by_transformers(base)[1], abs=0.01)
    # The policy was merged in bfloat16, the adapter is not rounded.
    assert of_adapter[1] == pytest.approx(of_policy, abs=0.1)
    assert max(abs(one - other) for one, other in zip(of_adapter[1], of_base[1], strict=True)) > 0.3
