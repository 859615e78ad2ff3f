"""Response log-probs against a plain full-logits computation, one unpadded sequence at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.training import logprobs
from mipo_ray.training.layout import pad_sequences
from mipo_ray.training.logprobs import ResponseLogprobs, response_logprobs

VOCABULARY = 128
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

token_ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=7)
ragged_sequences = st.lists(st.tuples(token_ids, token_ids), min_size=1, max_size=4)


def tiny_model(family: str = "Llama", **options):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.fixture(scope="module")
def llama():
    return tiny_model()


def full_logits_logprob(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt + response])
    every_token = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    return sum(every_token[position - 1, ids[0, position]] for position in range(len(prompt), ids.shape[1]))


@settings(max_examples=40, deadline=None)
@given(ragged_sequences, st.integers(0, VOCABULARY - 1))
def test_agrees_with_full_logits_over_ragged_lengths(llama, sequences, pad_token_id):
    with torch.no_grad():
        found = response_logprobs(llama, pad_sequences(sequences, pad_token_id))
        expected = [full_logits_logprob(llama, *sequence) for sequence in sequences]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        ("Gemma2", {"final_logit_softcapping": 0.5, "head_dim": 8}),
        ("Cohere", {"logit_scale": 0.125}),
        ("Granite", {"logits_scaling": 7.0}),
    ],
)
def test_a_familys_own_treatment_of_logits_is_kept(family, options):
    model = tiny_model(family, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options)
    sequences = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9, 10])]
    with torch.no_grad():
        found = response_logprobs(model, pad_sequences(sequences, 0))
        expected = torch.stack([full_logits_logprob(model, *sequence) for sequence in sequences])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_gradients_agree_with_full_logits_and_do_not_depend_on_chunks(llama, monkeypatch):
    monkeypatch.setattr(logprobs, "POSITIONS_PER_CHUNK", 2)
    sequences = [([1, 2, 3], [4, 5, 11]), ([6], [7, 8, 9, 10])]
    weights = torch.tensor([0.3, -1.2])
    llama.zero_grad()
    (weights * torch.stack([full_logits_logprob(llama, *sequence) for sequence in sequences])).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in llama.named_parameters()}
    batch = pad_sequences(sequences, 0)
    llama.zero_grad()
    (weights * ResponseLogprobs(llama)(batch.input_ids, batch.attention_mask, batch.response_mask)).sum().backward()
    for name, parameter in llama.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_the_output_head_sees_response_positions_only(llama):
    rows = []
    handle = llama.get_output_embeddings().register_forward_hook(lambda _head, _inputs, out: rows.append(out.shape))
    response_logprobs(llama, pad_sequences([([1] * 9, [2, 3]), ([4], [5])], 0))
    handle.remove()
    assert rows == [(1, 3, VOCABULARY)]


def test_a_failed_forward_leaves_the_model_as_it_was(llama):
    with pytest.raises(IndexError):
        response_logprobs(llama, pad_sequences([([VOCABULARY + 5], [1])], 0))
    assert llama(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, VOCABULARY)


def test_a_model_without_an_output_head_is_refused(llama):
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        response_logprobs(llama.model, pad_sequences([([1], [2])], 0))
