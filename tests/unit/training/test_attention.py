"""Attention over packed rows: masks from first principles, sliding windows, families, and what is refused.

python -m pytest tests/unit/training/test_attention.py
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mipo_ray.config.train import TrainConfig
from mipo_ray.errors import UserError
from mipo_ray.training.attention import (
    SegmentMasks,
    attention_inputs,
    block_mask,
    segment_mask,
    segmented_attention,
    use_attention,
)
from mipo_ray.training.layout import Segment, lay_out
from mipo_ray.training.logprobs import check_logprobs, response_logprobs
from mipo_ray.training.trainable import check_trainable
from tests.helpers.packed_rows import drawn_trees, places, visible
from tests.helpers.tiny_families import (
    FAMILIES,
    assert_gradients_agree,
    gradients,
    plain_logprobs,
    random_trees,
    tiny_model,
)

LAYOUTS = ("padded", "packed", "shared")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # of log-probs of some tens of nats, in float32
packed_layouts = pytest.mark.parametrize("layout", ["packed", "shared"])
WINDOW = 4

# Prompts and responses of 1 token, shorter and longer than the window, 1 to 3 rejected responses.
TREES = random_trees([(5, (3, 1, 4, 8)), (1, (1, 1)), (9, (6, 2)), (2, (9,))])


def for_layout(model: Any, layout: str, attention: str = "sdpa") -> Any:
    """A copy of the model, set up for the layout."""
    model = copy.deepcopy(model)
    use_attention(model, attention, layout)
    return model


def masks_of(*segments: Segment) -> SegmentMasks:
    return SegmentMasks(segments, torch.float32, torch.device("cpu"))


def logprobs_by_dense_mask(model: Any, trees: list, layout: str, window: int | None) -> Tensor:
    """[responses], from a packed row under eager attention with an explicit [tokens, tokens] mask."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    row = places(trees, layout)
    hidden = torch.zeros(len(row), len(row)).masked_fill(~visible(trees, layout, window), float("-inf"))
    logits = model(
        input_ids=torch.tensor([[place.token for place in row]]),
        position_ids=torch.tensor([[place.position for place in row]]),
        attention_mask=hidden[None, None],
        use_cache=False,
    ).logits[0]
    batch = lay_out(trees, layout)
    tokens = logits.log_softmax(-1)[batch.predicting, batch.targets]
    return torch.stack([tokens[batch.response_index == number].sum() for number in range(batch.response_count)])


# One row, one mask.


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model()


@packed_layouts
@settings(max_examples=20)
@given(trees=drawn_trees())
def test_segments_attend_as_a_dense_mask_says(llama, layout, trees):
    with torch.no_grad():
        found = response_logprobs(for_layout(llama, layout), lay_out(trees, layout))
        expected = logprobs_by_dense_mask(llama, trees, layout, window=None)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("family", ["Mistral", "Phi3", "Mixtral"])
@packed_layouts
def test_segments_with_a_window_attend_as_a_dense_mask_says(family, layout):
    model = tiny_model(family, sliding_window=WINDOW)
    with torch.no_grad():
        found = response_logprobs(for_layout(model, layout), lay_out(TREES, layout))
        expected = logprobs_by_dense_mask(model, TREES, layout, WINDOW)
        without = logprobs_by_dense_mask(model, TREES, layout, None)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (expected - without).abs().max() > 0.1  # the window does matter


def test_layers_share_the_masks_of_their_window():
    masks = masks_of(Segment(0, 6), Segment(6, 9, 0, 6))
    assert masks.of(None, 2)[0] is None
    assert masks.of(WINDOW, 2)[0].shape == (12, 6)
    assert masks.of(None, 2)[1].shape == masks.of(WINDOW, 2)[1].shape == (6, 9)
    assert not torch.equal(masks.of(None, 2)[1], masks.of(WINDOW, 2)[1])


def test_masks_of_one_window_are_in_memory_once():
    """What backward keeps of a row grows with layers by no mask, with and without a window."""
    for options in ({}, {"sliding_window": WINDOW}):
        masks = []
        for layers in (1, 3):
            model = for_layout(tiny_model("Mistral", num_hidden_layers=layers, **options), "shared")
            made = attention_inputs(model, lay_out(TREES, "shared"))
            kept: set[int] = set()

            def see(tensor: Tensor, kept: set[int] = kept) -> Tensor:
                if (tensor == float("-inf")).any():
                    kept.add(tensor.untyped_storage().data_ptr())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
                batch = lay_out(TREES, "shared")
                model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **made)
            masks.append(len(kept))
        assert masks[0] == masks[1] > 0


@packed_layouts
@settings(max_examples=30)
@given(trees=drawn_trees(most_pairs=3))
def test_block_masks_hide_and_show_the_same_as_a_dense_mask(layout, trees):
    from torch.nn.attention.flex_attention import create_mask

    tokens = lay_out(trees, layout).input_ids.shape[1]
    mask = block_mask(lay_out(trees, layout))
    assert mask.shape == (1, 1, tokens, tokens)
    dense = create_mask(mask.mask_mod, B=1, H=1, Q_LEN=tokens, KV_LEN=tokens, device="cpu")
    assert torch.equal(dense[0, 0], visible(trees, layout))


@packed_layouts
def test_blocks_that_are_hidden_whole_are_skipped(layout):
    size = 128  # of FlexAttention's blocks
    trees = random_trees([(200, (150, 20)), (100, (300,)), (40, (50, 60))])
    dense = visible(trees, layout)
    tokens = -(-len(dense) // size) * size
    padded = torch.zeros(tokens, tokens, dtype=torch.bool)
    padded[: len(dense), : len(dense)] = dense
    expected = padded.view(tokens // size, size, tokens // size, size).any(3).any(1)
    found = block_mask(lay_out(trees, layout)).to_dense()[0, 0].bool()
    assert torch.equal(found, expected)
    assert not expected.all()


@packed_layouts
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_agrees_with_segments(llama, layout):
    """Without its kernel: torch's own formula, which has no gradient on a CPU."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        found = response_logprobs(for_layout(llama, layout, "flex_attention"), lay_out(TREES, layout))
        expected = plain_logprobs(llama, TREES)
    torch.testing.assert_close(found, expected, **CLOSE)


@given(st.integers(0, 9), st.integers(1, 9), st.none() | st.integers(1, 12))
def test_the_mask_of_one_segment(prefix, length, window):
    segment = Segment(20, 20 + length, 3, 3 + prefix)
    mask = segment_mask(segment, window, dtype=torch.float32, device="cpu")
    distance = (prefix + torch.arange(length))[:, None] - torch.arange(prefix + length)
    seen = (distance >= 0) & (distance < (window or 1000))
    if mask is None:
        assert prefix == 0
        assert torch.equal(seen, torch.ones(length, length).tril().bool())
    else:
        assert torch.equal(mask, torch.zeros(mask.shape).masked_fill(~seen, float("-inf")))


# Families.

IN_ALL_LAYOUTS = [family for family in FAMILIES if family not in ("Gemma2", "Bloom")]
CASES = [(family, {}) for family in IN_ALL_LAYOUTS]
CASES += [
    *((family, {"sliding_window": WINDOW}) for family in ("Mistral", "Phi3", "Mixtral")),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),  # one layer of two
]


@pytest.mark.parametrize(
    ("family", "options"), CASES, ids=[f"{family}{' with a window' if options else ''}" for family, options in CASES]
)
def test_families_give_the_same_in_all_layouts(family, options):
    model = tiny_model(family, **options)
    expected = plain_logprobs(model, TREES)
    expected_gradients = gradients(model, expected)
    for layout in LAYOUTS:
        use_attention(model, "sdpa", layout)
        check_logprobs(model, layout, "cpu")
        found = response_logprobs(model, lay_out(TREES, layout))
        torch.testing.assert_close(found, expected, **CLOSE, msg=lambda text, name=layout: f"{name} {text}")
        assert_gradients_agree(gradients(model, found), expected_gradients)


@pytest.mark.parametrize("family", ["Gemma2", "Bloom"])
def test_a_family_that_cannot_be_packed_trains_padded(family):
    """Gemma 2 soft-caps attention scores, which scaled dot product attention cannot, and logits, which works here."""
    model = tiny_model(family)
    expected = plain_logprobs(model, TREES)
    expected_gradients = gradients(model, expected)
    use_attention(model, "sdpa", "padded")
    check_logprobs(model, "padded", "cpu")
    found = response_logprobs(model, lay_out(TREES, "padded"))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert_gradients_agree(gradients(model, found), expected_gradients)


@packed_layouts
@pytest.mark.parametrize("family", ["Gemma2", "Bloom"])
def test_a_family_that_cannot_be_packed_is_refused(family, layout):
    model = tiny_model(family)

    def set_up_and_check() -> None:
        use_attention(model, "sdpa", layout)
        check_logprobs(model, layout, "cpu")

    with pytest.raises(UserError, match=f"train.(layout|attention): .*{family}ForCausalLM") as raised:
        set_up_and_check()
    assert layout in str(raised.value)


# Backends that are refused by name.


@packed_layouts
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Mistral", {"sliding_window": WINDOW}),
        ("Phi3", {"sliding_window": WINDOW}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    ],
)
def test_flex_attention_does_not_drop_sliding_windows_silently(family, options, layout):
    with pytest.raises(UserError, match=f"flex_attention cannot honour the sliding windows of {family}ForCausalLM"):
        use_attention(tiny_model(family, **options), "flex_attention", layout)


def test_flex_attention_takes_families_whose_windows_are_off():
    for family, options in [("Mistral", {}), ("Qwen2", {"use_sliding_window": False, "sliding_window": WINDOW})]:
        use_attention(tiny_model(family, **options), "flex_attention", "shared")


@packed_layouts
def test_layers_with_another_kind_of_attention_are_refused_in_packed_layouts(layout):
    model = tiny_model("Llama")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(UserError, match=f"cannot honour {layout}: it has layers with chunked_attention; choose"):
        use_attention(model, "sdpa", layout)
    use_attention(model, "sdpa", "padded")


def test_a_backend_that_a_model_refuses_is_named(monkeypatch):
    model = tiny_model()

    def refuse(name: str) -> None:
        raise ValueError("not here")

    monkeypatch.setattr(model, "set_attn_implementation", refuse)
    with pytest.raises(
        UserError, match=r"^train\.attention: flex_attention cannot run LlamaForCausalLM here: not here"
    ):
        use_attention(model, "flex_attention", "packed")


def test_a_model_that_was_not_set_up_is_refused(llama):
    with pytest.raises(ValueError, match="expected a model set up by use_attention"):
        response_logprobs(llama, lay_out(TREES, "packed"))


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_scaled_dot_product_attention_cannot_express_is_refused(name):
    states = torch.zeros(1, 2, 3, 4)
    segments = {"segment_masks": masks_of(Segment(0, 3))}
    segmented_attention(torch.nn.Module(), states, states, states, None, **segments, **{name: None})
    with pytest.raises(ValueError, match=f"Module uses {name}"):
        segmented_attention(torch.nn.Module(), states, states, states, None, **segments, **{name: 1.0})


def test_segments_that_do_not_arrive_are_missed():
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="Module does not hand the segments"):
        segmented_attention(torch.nn.Module(), states, states, states, None)


# The check before anything is sampled, without weights.


@pytest.mark.parametrize(
    ("family", "options", "train", "message"),
    [
        ("Gemma2", {}, {}, "sdpa cannot soft-cap attention scores, as Gemma2ForCausalLM does, in layout shared"),
        ("Bloom", {}, {"layout": "packed"}, "BloomForCausalLM did not accept sdpa for layout packed"),
        ("Mistral", {"sliding_window": WINDOW}, {"attention": "flex_attention"}, "cannot honour the sliding windows"),
        ("Llama", {}, {"lora": {"rank": 2, "target_modules": ["q_porj"]}}, "found 'q_porj'"),
    ],
)
def test_what_a_model_cannot_honour_is_found_without_its_weights(tmp_path, family, options, train, message):
    tiny_model(family, **options).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        check_trainable(str(tmp_path), TrainConfig(**train), trust_remote_code=False)
    check_trainable(str(tmp_path), TrainConfig(layout="padded"), trust_remote_code=False)


# The check before training.


def with_unknown_treatment() -> Any:
    from transformers import LlamaForCausalLM

    class Scaled(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = 0.9 * outputs.logits
            return outputs

    model = tiny_model()
    model.__class__ = Scaled
    return model


def test_an_unknown_treatment_of_logits_is_found_in_every_layout():
    for layout in LAYOUTS:
        model = with_unknown_treatment()
        use_attention(model, "sdpa", layout)
        with pytest.raises(UserError, match=f"train.layout: Scaled cannot honour {layout}: .* nats"):
            check_logprobs(model, layout, "cpu")


def ignoring_positions(family: str) -> Any:
    model = tiny_model(family)
    forward = model.base_model.forward

    def without_positions(*args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model.base_model.forward = without_positions
    return model


def mixing_the_tokens_of_a_row() -> Any:
    """As a recurrent layer does, which no attention mask stops."""
    model = tiny_model()
    model.model.layers[0].register_forward_hook(lambda _layer, _inputs, states: states + states.cumsum(dim=1) / 10)
    return model


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        # Rotary positions are relative: those of a sequence may all be shifted, but not those of a branch.
        (lambda: ignoring_positions("Llama"), "shared"),
        (lambda: ignoring_positions("OPT"), "packed"),
        (lambda: ignoring_positions("OPT"), "shared"),
        (mixing_the_tokens_of_a_row, "packed"),
        (mixing_the_tokens_of_a_row, "shared"),
    ],
    ids=["rotary shared", "absolute packed", "absolute shared", "recurrent packed", "recurrent shared"],
)
def test_what_only_goes_wrong_in_packed_rows_is_found_there(make, layout):
    model = make()
    use_attention(model, "sdpa", "padded")
    check_logprobs(model, "padded", "cpu")
    use_attention(model, "sdpa", layout)
    with pytest.raises(UserError, match=f"ForCausalLM cannot honour {layout}"):
        check_logprobs(model, layout, "cpu")


@packed_layouts
def test_a_mask_that_crosses_a_boundary_is_found(layout, monkeypatch):
    from mipo_ray.training import logprobs

    def one_segment(model: Any, batch: Any) -> dict[str, Any]:
        return {"segment_masks": masks_of(Segment(0, batch.input_ids.shape[1]))}

    model = for_layout(tiny_model(), layout)
    monkeypatch.setattr(logprobs, "attention_inputs", one_segment)
    with pytest.raises(UserError, match=f"cannot honour {layout}"):
        check_logprobs(model, layout, "cpu")


def test_branches_that_do_not_see_their_prompt_are_found(monkeypatch):
    from mipo_ray.training import logprobs

    def without_prefixes(model: Any, batch: Any) -> dict[str, Any]:
        return {"segment_masks": masks_of(*(Segment(segment.start, segment.end) for segment in batch.segments))}

    model = for_layout(tiny_model(), "shared")
    monkeypatch.setattr(logprobs, "attention_inputs", without_prefixes)
    with pytest.raises(UserError, match="cannot honour shared"):
        check_logprobs(model, "shared", "cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_that_are_no_numbers_are_found(layout):
    model = for_layout(tiny_model(), layout)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(UserError, match=f"cannot honour {layout}: .* differ by nan nats"):
        check_logprobs(model, layout, "cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_passes_the_check(layout):
    check_logprobs(for_layout(tiny_model().to(torch.bfloat16), layout), layout, "cpu")
