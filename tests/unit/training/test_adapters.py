"""LoRA adapters: where they go, what they train, the base behind them, and the plain model that is exported.

python -m pytest tests/unit/training/test_adapters.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mipo_ray.config.train import LoraConfig
from mipo_ray.errors import UserError
from mipo_ray.training.adapters import Adapter, adapters_off, merged_weight, plain_weights, with_adapters
from mipo_ray.training.export import export_policy
from mipo_ray.training.logprobs import ResponseLogprobs

VOCABULARY = 64
LORA = LoraConfig(rank=4, alpha=12.0)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Of logits of a few units: float32, and the 8 bits of bfloat16 through two layers.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 0.25}


def tiny_llama(dtype: torch.dtype = torch.float32, *, tied: bool = False, seed: int = 0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_experts():
    """A mixture of experts: a dense layer, then one with experts in one tensor and a shared expert of linear layers."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return DeepseekV3ForCausalLM(config).eval()


def tiny_gpt2():
    """Its weights are [in, out], in layers of a class of their own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, bos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=tokens()).logits


def trained_names(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def move_adapters(model, size: float = 0.1) -> None:
    """Takes the adapters away from their start, as training does."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn_like(parameter))


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def export(model, tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    model.config.save_pretrained(source)
    export_policy(ResponseLogprobs(model), source, tmp_path / "exported")
    return tmp_path / "exported"


def load(directory: Path, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_policy_starts_as_its_base(dtype, tied):
    base = tiny_llama(dtype, tied=tied)
    expected = logits(base)
    policy = with_adapters(base, LORA)
    assert policy is base
    torch.testing.assert_close(logits(policy), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_adapters_train_on_every_linear_layer_but_the_head(dtype):
    plain = tiny_llama(dtype)
    weight_shapes = {name: tuple(weight.shape) for name, weight in plain.named_parameters() if "proj" in name}
    policy = with_adapters(plain, LORA)
    assert len(trained_names(policy)) == 2 * len(weight_shapes) == 2 * 2 * len(LINEAR)
    for name, (outputs, inputs) in weight_shapes.items():
        layer = policy.get_submodule(name.removesuffix(".weight"))
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        assert sorted(tuple(parameter.shape) for parameter in trained) == sorted([(4, inputs), (outputs, 4)])
        assert {parameter.dtype for parameter in trained} == {dtype}
        assert not layer.base_layer.weight.requires_grad
    assert not any(isinstance(module, torch.nn.Dropout) for module in policy.modules())


def test_gradients_reach_the_adapters_and_nothing_else():
    policy = with_adapters(tiny_llama(), LORA)
    before = weights_of(policy)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # B starts at zero, so that A gets its first gradient in the second step
        optimizer.zero_grad()
        policy(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    changed = {name for name, tensor in policy.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained_names(policy)


def test_the_model_keeps_its_class_head_and_backbone():
    model = tiny_llama()
    kind, head, backbone = type(model), model.get_output_embeddings(), model.base_model
    policy = with_adapters(model, LORA)
    assert type(policy) is kind
    assert policy.get_output_embeddings() is head
    assert policy.base_model is backbone


def test_adapters_depend_on_the_seed_only():
    def adapters(seed: int) -> list[torch.Tensor]:
        base = tiny_llama()
        torch.manual_seed(seed)
        policy = with_adapters(base, LORA)
        return [parameter.detach() for parameter in policy.parameters() if parameter.requires_grad]

    first, again, other = adapters(5), adapters(5), adapters(6)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_adapters_off_the_model_is_its_base_to_the_bit(dtype):
    base = tiny_llama(dtype)
    expected = logits(base)
    policy = with_adapters(base, LORA)
    move_adapters(policy)
    adapted = logits(policy)
    assert (adapted - expected).abs().max() > 0.1
    with adapters_off(policy):
        assert torch.equal(logits(policy), expected)
        assert torch.equal(policy(input_ids=tokens()).logits, expected)  # with gradients recorded, too
    assert torch.equal(logits(policy), adapted)
    assert len(trained_names(policy)) == 2 * 2 * len(LINEAR)


def test_adapters_come_back_after_an_error_and_after_the_outermost_context():
    policy = with_adapters(tiny_llama(), LORA)
    base = logits(policy)
    move_adapters(policy)
    adapted, trained = logits(policy), trained_names(policy)
    with pytest.raises(RuntimeError, match="inside"), adapters_off(policy):
        raise RuntimeError("inside")
    assert torch.equal(logits(policy), adapted)
    with adapters_off(policy):
        with adapters_off(policy):
            pass
        assert torch.equal(logits(policy), base)
    assert torch.equal(logits(policy), adapted)
    assert trained_names(policy) == trained


def test_a_reference_pass_between_forward_and_backward_leaves_the_gradient_as_it_is():
    policy = with_adapters(tiny_llama(), LORA)
    move_adapters(policy)

    def gradients(*, with_reference: bool) -> list[torch.Tensor]:
        policy.zero_grad()
        loss = policy(input_ids=tokens(), labels=tokens()).loss
        if with_reference:
            with torch.no_grad(), adapters_off(policy):
                policy(input_ids=tokens())
        loss.backward()
        return [parameter.grad.clone() for parameter in policy.parameters() if parameter.requires_grad]

    plain, beside_reference = gradients(with_reference=False), gradients(with_reference=True)
    assert len(plain) == 2 * 2 * len(LINEAR)
    assert all(torch.equal(one, two) for one, two in zip(plain, beside_reference, strict=True))


def test_a_model_without_adapters_has_none_to_turn_off():
    with pytest.raises(ValueError, match="expected a model with adapters"), adapters_off(tiny_llama()):
        pass


def test_targets_are_names_of_layers_or_ends_of_them():
    lora = LoraConfig(rank=2, target_modules=("q_proj", "mlp.up_proj", "model.layers.1.self_attn.o_proj"))
    policy = with_adapters(tiny_llama(), lora)
    layers = {name.partition(".lora_")[0] for name in trained_names(policy)}
    assert layers == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.o_proj",
    }


@pytest.mark.parametrize("target", ["c_attn", "proj", "lm_head", "embed_tokens", "self_attn", ""])
def test_targets_that_are_no_linear_layer_are_refused(target):
    model = tiny_llama()
    with pytest.raises(UserError) as raised:
        with_adapters(model, LoraConfig(rank=2, target_modules=("q_proj", target)))
    message = str(raised.value)
    assert "train.lora.target_modules" in message
    assert message.endswith(f"found {target!r}")
    assert "LlamaForCausalLM" in message
    assert "(" + ", ".join(sorted(LINEAR)) + ")" in message
    assert all(parameter.requires_grad for parameter in model.parameters())  # nothing was done to it


def test_no_targets_are_refused():
    with pytest.raises(UserError, match=r"target_modules: .* found nothing"):
        with_adapters(tiny_llama(), LoraConfig(rank=2, target_modules=()))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exported_model_is_plain_and_equals_the_adapted_one(dtype, tied, tmp_path):
    base = tiny_llama(dtype, tied=tied)
    plain_names, base_weights, base_logits = set(base.state_dict()), weights_of(base), logits(base)
    policy = with_adapters(base, LORA)
    move_adapters(policy)
    adapted, before = logits(policy), weights_of(policy)

    directory = export(policy, tmp_path)

    saved = load_file(directory / "model.safetensors")
    assert set(saved) == plain_names - ({"lm_head.weight"} if tied else set())
    assert {tensor.dtype for tensor in saved.values()} == {dtype}
    files = {path.name for path in directory.iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json"}
    assert "peft" not in (directory / "config.json").read_text()
    for name, tensor in saved.items():
        assert torch.equal(tensor, base_weights[name]) == ("proj" not in name), name

    plain = load(directory, dtype)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) is tied
    torch.testing.assert_close(logits(plain), adapted, rtol=0, atol=TOLERANCE[dtype])
    assert (adapted - base_logits).abs().max() > 5 * TOLERANCE[dtype]  # the adapters did matter

    after = weights_of(policy)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(policy), adapted)


@pytest.mark.parametrize("build", [tiny_experts, tiny_gpt2])
def test_other_families_are_merged_too(build, tmp_path):
    base = build()
    head = base.get_output_embeddings()
    linear = {n for n, m in base.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and m is not head}
    untouched = {n: t for n, t in weights_of(base).items() if n.removesuffix(".weight") not in linear}
    base_logits = logits(base)
    policy = with_adapters(base, LORA)
    assert {name.partition(".lora_")[0] for name in trained_names(policy)} == linear
    move_adapters(policy)
    adapted = logits(policy)
    assert (adapted - base_logits).abs().max() > 0.01

    plain = load(export(policy, tmp_path), torch.float32)

    torch.testing.assert_close(logits(plain), adapted, rtol=0, atol=1e-4)
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in untouched.items())


def test_full_fine_tuning_is_exported_as_it_is(tmp_path):
    model = tiny_llama()
    weights = weights_of(model)
    assert [(weight.name, weight.adapter) for weight in plain_weights(model)] == [(name, None) for name in weights]
    saved = load_file(export(model, tmp_path) / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_rounds_once(dtype, transposed):
    torch.manual_seed(3)
    weight, a, b = torch.randn(40, 24).to(dtype), torch.randn(6, 24).to(dtype), torch.randn(40, 6).to(dtype)
    exact = weight.double() + 0.75 * b.double() @ a.double()
    given = weight.T.contiguous() if transposed else weight
    merged = merged_weight(given, Adapter(a=a, b=b, scaling=0.75, weight_is_transposed=transposed))
    found = merged.T if transposed else merged
    assert found.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)
    else:
        # Half a step of bfloat16, which has 8 bits, and a little for the float32 sum before it.
        assert ((found.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-5).all()
