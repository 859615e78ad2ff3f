"""Log-probs and gradients of all layouts against full logits of single sequences, and what is never in memory.

python -m pytest tests/unit/training/test_logprobs.py
"""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mipo_ray.training import logprobs
from mipo_ray.training.attention import use_attention
from mipo_ray.training.layout import Tree, lay_out
from mipo_ray.training.logprobs import ResponseLogprobs, response_logprobs
from tests.helpers.packed_rows import drawn_trees
from tests.helpers.tiny_families import (
    VOCABULARY,
    assert_gradients_agree,
    gradients,
    plain_logprobs,
    random_trees,
    tiny_model,
)

LAYOUTS = ("padded", "packed", "shared")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # of log-probs of some tens of nats, in float32
every_layout = pytest.mark.parametrize("layout", LAYOUTS)

# Prompts and responses of 1 token, 1 to 3 rejected responses, equal and different prompts.
TREES = [
    *random_trees([(5, (3, 1, 4)), (1, (1, 1)), (9, (6,)), (4, (2, 7))]),
    *random_trees([(5, (2, 2))]),  # the same prompt as the first tree's
]


def for_layout(model: Any, layout: str) -> Any:
    """A copy of the model, set up for the layout."""
    model = copy.deepcopy(model)
    use_attention(model, "sdpa", layout)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def llamas(request) -> dict[str, Any]:
    """The same model for each layout, and for plain full logits."""
    model = tiny_model(tie_word_embeddings=request.param)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is request.param
    return {layout: for_layout(model, layout) for layout in LAYOUTS} | {"plain": model}


# The layouts.

ones = np.ones(1, dtype=np.int64)


@settings(max_examples=25)
@example(trees=[Tree(ones, (ones,))])
@example(trees=[Tree(ones, (ones, ones)), Tree(ones, (ones, ones))])
@example(trees=TREES)
@given(trees=drawn_trees())
def test_layouts_agree_with_full_logits_in_logprobs_and_in_every_gradient(llamas, trees):
    expected = plain_logprobs(llamas["plain"], trees)
    expected_gradients = gradients(llamas["plain"], expected)
    for layout in LAYOUTS:
        found = response_logprobs(llamas[layout], lay_out(trees, layout))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, **CLOSE, msg=lambda text, name=layout: f"{name} {text}")
        assert_gradients_agree(gradients(llamas[layout], found), expected_gradients)


@every_layout
@settings(max_examples=20)
@given(trees=drawn_trees(most_pairs=3), data=st.data())
def test_a_token_changes_what_follows_it_and_no_other_response(llamas, layout, trees, data):
    """Also where another tree has the same prompt: it has its own copy."""
    model = llamas[layout]
    number = data.draw(st.integers(0, len(trees) - 1))
    tree = trees[number]
    # Token 0 is this model's padding, and has no embedding: after nothing else every token is as likely as every other.
    assume(tree.prompt.any())
    part = data.draw(st.sampled_from([None, *range(len(tree.responses))]))  # None: the prompt
    ids = (tree.prompt if part is None else tree.responses[part]).copy()
    position = data.draw(st.integers(0, len(ids) - 1))
    ids[position] = (ids[position] + data.draw(st.integers(1, VOCABULARY - 1))) % VOCABULARY
    if part is None:
        changed = replace(tree, prompt=ids)
    else:
        changed = replace(tree, responses=(*tree.responses[:part], ids, *tree.responses[part + 1 :]))
    is_touched = torch.tensor(
        [
            other == number and part in (None, response)
            for other, one in enumerate(trees)
            for response in range(len(one.responses))
        ]
    )
    with torch.no_grad():
        before, after = (
            response_logprobs(model, lay_out(given, layout))
            for given in (trees, [*trees[:number], changed, *trees[number + 1 :]])
        )
    torch.testing.assert_close(before[~is_touched], after[~is_touched], rtol=1e-6, atol=1e-6)
    assert (before[is_touched] != after[is_touched]).all()


# The output head.


@every_layout
@pytest.mark.parametrize("positions", [1, 3, 1000])
def test_the_size_of_chunks_changes_nothing(llamas, layout, positions, monkeypatch):
    expected = response_logprobs(llamas[layout], lay_out(TREES, layout))
    expected_gradients = gradients(llamas[layout], expected)
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 4 * VOCABULARY * positions)
    found = response_logprobs(llamas[layout], lay_out(TREES, layout))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert_gradients_agree(gradients(llamas[layout], found), expected_gradients)


def stub_model(head: nn.Linear, states: Tensor, **config: Any) -> Any:
    """A model whose backbone returns `states`, whatever it is given, so that the head is what is tested."""
    text = SimpleNamespace(**config)
    return SimpleNamespace(
        get_output_embeddings=lambda: head,
        base_model=lambda **inputs: SimpleNamespace(last_hidden_state=states),
        config=SimpleNamespace(get_text_config=lambda: text),
    )


TREATMENTS: dict[str, dict[str, Any]] = {
    "none": {},
    "scale": {"logit_scale": 0.3},
    "divisor": {"logits_scaling": 7.0},
    "softcap": {"final_logit_softcapping": 1.5},
    "scale and softcap": {"logit_scale": 2.5, "final_logit_softcapping": 1.5},
}


def by_autograd(head: nn.Linear, states: Tensor, batch: Any, options: dict[str, Any]) -> Tensor:
    """[responses], from the formulas of Cohere (scale), Granite (divisor) and Gemma 2 (softcap)."""
    logits = nn.functional.linear(states, head.weight, head.bias)
    logits = logits * options.get("logit_scale", 1.0) / options.get("logits_scaling", 1.0)
    if softcap := options.get("final_logit_softcapping"):
        logits = softcap * torch.tanh(logits / softcap)
    tokens = logits.flatten(0, 1).log_softmax(-1)[batch.predicting, batch.targets]
    return torch.stack([tokens[batch.response_index == number].sum() for number in range(batch.response_count)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", TREATMENTS.values(), ids=TREATMENTS)
def test_the_heads_gradients_are_those_of_autograd_in_float64(options, bias, dtype, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 4 * VOCABULARY * 3)
    batch = lay_out(TREES, "padded")
    torch.manual_seed(0)
    head = nn.Linear(16, VOCABULARY, bias=bias).to(dtype)
    states = torch.randn(*batch.input_ids.shape, 16).to(dtype).requires_grad_()
    exact_head, exact_states = copy.deepcopy(head).double(), states.detach().double().requires_grad_()
    weights = torch.linspace(-1.3, 0.9, batch.response_count, dtype=torch.float64)

    found = response_logprobs(stub_model(head, states, **options), batch)
    expected = by_autograd(exact_head, exact_states, batch, options)
    (weights * found).sum().backward()
    (weights * expected).sum().backward()

    # bfloat16 logits, of a few units at most, are rounded to 8 bits, and so are their gradients.
    in_logprobs, relative = (1e-5, 1e-5) if dtype == torch.float32 else (2e-2, 2e-2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=in_logprobs, atol=in_logprobs)
    pairs = [(states, exact_states), *zip(head.parameters(), exact_head.parameters(), strict=True)]
    for parameter, exact in pairs:
        assert parameter.grad.dtype == dtype
        atol = relative * exact.grad.abs().max().item()
        torch.testing.assert_close(parameter.grad.double(), exact.grad, rtol=0, atol=atol)


@pytest.mark.parametrize("frozen", ["states", "weight", "bias"])
def test_frozen_parts_get_no_gradient_and_the_others_the_same(frozen):
    batch = lay_out(TREES, "padded")

    def found(frozen: str | None) -> dict[str, Tensor | None]:
        torch.manual_seed(0)
        head = nn.Linear(16, VOCABULARY)
        states = torch.randn(*batch.input_ids.shape, 16)
        parts = {"states": states, "weight": head.weight, "bias": head.bias}
        for name, part in parts.items():
            part.requires_grad_(name != frozen)
        response_logprobs(stub_model(head, states), batch).sum().backward()
        return {name: part.grad for name, part in parts.items()}

    expected, partly = found(None), found(frozen)
    assert partly.pop(frozen) is None
    for name, gradient in partly.items():
        torch.testing.assert_close(gradient, expected[name])


@every_layout
def test_bfloat16_stays_close_to_float32_on_the_same_weights(layout):
    rounded = tiny_model().to(torch.bfloat16)
    exact = for_layout(rounded, layout).float()
    rounded = for_layout(rounded, layout)
    batch = lay_out(TREES, layout)
    found, expected = (response_logprobs(model, batch) for model in (rounded, exact))
    assert found.dtype == torch.float32
    # Nats, of up to 7 tokens with a log-prob of around 5 each.
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.3)
    directions = [
        torch.cat([gradient.flatten().float() for gradient in gradients(model, logprob).values()])
        for model, logprob in ((rounded, found), (exact, expected))
    ]
    assert torch.nn.functional.cosine_similarity(*directions, dim=0) > 0.99


# Memory.


class LargestLogits(TorchDispatchMode):
    """Rows of the largest tensor of [.., vocabulary], or [vocabulary, rows], that anything makes inside it."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.vocabulary, self.hidden, self.rows = vocabulary, hidden, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            # Not the head's weight, its gradient, or their transposes.
            if isinstance(tensor, Tensor) and self.vocabulary in tensor.shape and self.hidden not in tensor.shape:
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return made


@every_layout
def test_logits_exist_for_one_chunk_of_response_tokens_only(layout, monkeypatch):
    vocabulary, hidden, prompt, chunk = 131, 40, 50, 4
    model = tiny_model(vocab_size=vocabulary, hidden_size=hidden, head_dim=8)
    trees = random_trees([(prompt, (6, 3)), (prompt, (5, 2))], vocabulary=vocabulary)
    with LargestLogits(vocabulary, hidden) as plain:
        plain_logprobs(model, trees).sum().backward()
    assert plain.rows == prompt + 6  # a plain forward has those of the longest sequence
    use_attention(model, "sdpa", layout)
    for positions, most in [(chunk, chunk), (10_000, 6 + 3 + 5 + 2)]:
        monkeypatch.setattr(logprobs, "CHUNK_BYTES", 4 * vocabulary * positions)
        with LargestLogits(vocabulary, hidden) as ours:
            response_logprobs(model, lay_out(trees, layout)).sum().backward()
        assert ours.rows == most


def test_only_hidden_states_and_one_number_a_token_are_kept_for_backward():
    """Between forward and backward: nothing of [tokens, vocabulary]."""
    batch = lay_out(random_trees([(3, (7, 8))]), "padded")
    head = nn.Linear(16, VOCABULARY)
    states = torch.randn(*batch.input_ids.shape, 16, requires_grad=True)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        response_logprobs(stub_model(head, states), batch)
    assert (15, 16) in kept
    assert not [shape for shape in kept if VOCABULARY in shape and shape not in {(VOCABULARY, 16), (VOCABULARY,)}]


# What is refused, and what is left behind.


def test_a_failed_forward_leaves_the_model_as_it_was(llamas):
    with pytest.raises(IndexError):
        response_logprobs(llamas["padded"], lay_out([Tree(ones + VOCABULARY, (ones,))], "padded"))
    assert llamas["padded"](input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, VOCABULARY)


def test_targets_outside_the_vocabulary_fail_and_leave_the_head_as_it_was(llamas):
    with pytest.raises(RuntimeError, match="out of bounds"):
        response_logprobs(llamas["packed"], lay_out([Tree(ones, (ones + VOCABULARY,))], "packed"))
    assert llamas["packed"].lm_head(torch.zeros(1, 1, 32)).shape == (1, 1, VOCABULARY)


def test_a_model_without_an_output_head_is_refused(llamas):
    with pytest.raises(ValueError, match="LlamaModel: expected a linear output head, found NoneType"):
        response_logprobs(llamas["padded"].model, lay_out(TREES, "padded"))


def test_a_model_without_a_backbone_of_its_own_is_refused(llamas, monkeypatch):
    monkeypatch.setattr(type(llamas["padded"]), "base_model_prefix", "language_model")
    with pytest.raises(ValueError, match="LlamaForCausalLM: expected a backbone 'language_model', found none"):
        response_logprobs(llamas["padded"], lay_out(TREES, "padded"))


def test_the_module_is_the_function(llamas):
    batch = lay_out(TREES, "shared")
    found = ResponseLogprobs(llamas["shared"])(batch)
    torch.testing.assert_close(found, response_logprobs(llamas["shared"], batch), rtol=0, atol=0)
