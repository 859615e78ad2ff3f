"""The DPO loss against TRL's trainer, on the same token ids and models, in float32."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.training.layout import padded_batch
from mipo_ray.training.logprobs import response_logprobs
from mipo_ray.training.loss import dpo_loss, ranked_correctly

BETA = 0.3
VOCABULARY = 128
END_TOKEN = VOCABULARY - 2


def tiny_llama(seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def ragged_pairs(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return generator.integers(0, VOCABULARY, generator.integers(low, high)).astype(np.int32)

    return [
        {"prompt_token_ids": ids(2, 9), "chosen_token_ids": ids(1, 9), "rejected_token_ids": ids(1, 9)}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def reference():
    return tiny_llama(seed=0)


@pytest.fixture(scope="module")
def policy(reference):
    """The reference, moved far enough that the loss is not ln 2 and rewards differ between pairs."""
    policy = copy.deepcopy(reference)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return policy


@pytest.fixture(scope="module")
def trl_trainer(policy, reference, tmp_path_factory):
    """TRL's DPOTrainer around copies of both models, since it patches the models that it is given."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = {f"w{index}": index for index in range(END_TOKEN)} | {"<end>": END_TOKEN, "<unknown>": END_TOKEN + 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return DPOTrainer(
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(reference),
        args=DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            beta=BETA,
            use_cpu=True,
            bf16=False,
            report_to=[],
            max_length=None,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": "w1 w2", "chosen": " w3", "rejected": " w4"}]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>"),
    )


def trl_loss(trainer, pairs: list[dict[str, np.ndarray]]) -> torch.Tensor:
    examples = [{name.replace("_token_ids", "_ids"): ids.tolist() for name, ids in pair.items()} for pair in pairs]
    return trainer.compute_loss(trainer.model, trainer.data_collator(examples))


def our_loss(policy, reference, pairs: list[dict[str, np.ndarray]], label_smoothing: float) -> torch.Tensor:
    batch = padded_batch(pairs, pad_token_id=0)
    policy_chosen, policy_rejected = response_logprobs(policy, batch).chunk(2)
    with torch.no_grad():
        reference_chosen, reference_rejected = response_logprobs(reference, batch).chunk(2)
    return dpo_loss(
        policy_chosen,
        policy_rejected,
        reference_chosen,
        reference_rejected,
        beta=BETA,
        label_smoothing=label_smoothing,
    ).losses.mean()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_and_gradients_agree_with_trl(trl_trainer, policy, reference, label_smoothing):
    pairs = ragged_pairs(5, seed=2)
    swapped = [
        {**pair, "chosen_token_ids": pair["rejected_token_ids"], "rejected_token_ids": pair["chosen_token_ids"]}
        for pair in pairs
    ]
    # Conservative DPO is DPO in expectation over labels that are swapped with probability label_smoothing; TRL has no
    # such loss of its own, so that its DPO loss is taken on both labellings.
    trl_trainer.model.zero_grad()
    expected = (1 - label_smoothing) * trl_loss(trl_trainer, pairs) + label_smoothing * trl_loss(trl_trainer, swapped)
    expected.backward()

    policy.zero_grad()
    found = our_loss(policy, reference, pairs, label_smoothing)
    found.backward()

    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    assert abs(found.item() - math.log(2)) > 1e-3
    trl_gradients = {name: parameter.grad for name, parameter in trl_trainer.model.named_parameters()}
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, trl_gradients[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_first_loss_is_ln_2(reference, label_smoothing):
    loss = our_loss(copy.deepcopy(reference), reference, ragged_pairs(4, seed=3), label_smoothing)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-4)


def test_rewards_are_scaled_log_ratios_without_gradient():
    policy_chosen = torch.tensor([-3.0, -5.0], requires_grad=True)
    result = dpo_loss(
        policy_chosen,
        torch.tensor([-4.0, -5.0]),
        torch.tensor([-3.5, -4.0]),
        torch.tensor([-4.0, -5.5]),
        beta=0.2,
        label_smoothing=0.0,
    )
    torch.testing.assert_close(result.chosen_rewards, torch.tensor([0.1, -0.2]))
    torch.testing.assert_close(result.rejected_rewards, torch.tensor([0.0, 0.1]))
    assert not result.chosen_rewards.requires_grad
    assert result.losses.requires_grad
    assert {result.losses.dtype, result.chosen_rewards.dtype} == {torch.float32}


@given(st.floats(-50, 50), st.floats(0.01, 5), st.floats(0, 0.49))
def test_loss_of_a_margin_is_the_cross_entropy_of_its_label(margin, beta, label_smoothing):
    zero = torch.zeros(1, dtype=torch.float64)
    losses = dpo_loss(zero + margin, zero, zero, zero, beta=beta, label_smoothing=label_smoothing).losses
    z = beta * margin
    expected = (1 - label_smoothing) * np.logaddexp(0, -z) + label_smoothing * np.logaddexp(0, z)
    assert losses.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        dpo_loss(torch.zeros(3), torch.zeros(3), torch.zeros(1), torch.zeros(3), beta=0.1, label_smoothing=0.0)


def test_ties_count_half():
    accuracy = ranked_correctly(torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.0, 0.0, 0.0]))
    assert accuracy.tolist() == [1.0, 0.5, 0.0]
