"""The embedded model's weights and tokens are those that its package carries.

python -m pytest tests/nightly/test_embedded_weights.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mipo_ray.models.embedded import gguf_file

QUESTIONS = ["What is the capital of Norway?", "In 2024, 3 dogs ate 12.5 kg.\nHow much each?", "naïve café, 日本 🙂"]


@pytest.fixture(scope="module")
def converted() -> Path:
    """The embedded model, made by its command in the test session's own cache."""
    result = subprocess.run([sys.executable, "-m", "mipo_ray.models.embedded"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.rsplit("embedded model: ", 1)[1].strip())


def test_logits_and_tokens_equal_those_of_the_packaged_weights(converted: Path) -> None:
    source = gguf_file()
    packaged = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    packaged_tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(converted)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text.endswith(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        tokens = tokenizer(text, return_tensors="pt").input_ids
        assert tokens.tolist() == packaged_tokenizer(text, return_tensors="pt").input_ids.tolist()
        assert tokenizer.decode(tokens[0]) == text
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, packaged(tokens).logits, rtol=0, atol=0)
