"""A tiny model for tests, made on the spot: a random Llama and a byte-level tokenizer with a ChatML template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

END = "<|im_end|>"
START = "<|im_start|>"
PAD = "<|pad|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_SENTENCES = [
    "The user asks a question and the assistant answers it.",
    "A short answer to a simple question about the weather in the mountains.",
    "Write a letter to a friend who lives in another town.",
    "What should I cook for dinner when there is no time?",
    "The system explains how to water the plants in the garden.",
    "My name is Ada and I like to play the violin in the evening.",
]


def make_tiny_model(directory: Path, *, seed: int = 0, chat_template: bool = True) -> Path:
    """Write a model directory: safetensors (float32), tokenizer, chat template, config and generation config.

    The model is a Llama of 2 layers and 150 thousand parameters with random weights, the same for the same seed. Its
    answers depend on the prompt, vary between samples, and end with the end token now and then: with seed 0 in about a
    fifth of the samples of 16 tokens. Heads have 32 dimensions, the fewest that vLLM's attention on CPUs takes.

    Args:
        directory: made where it does not exist.
        seed: of the weights.
        chat_template: without it, the tokenizer is that of a base model.

    Returns:
        `directory`.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(CHAT_TEMPLATE if chat_template else None)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
        with torch.no_grad():
            # As initialised, every prompt would get the same answers. These sizes make attention look at some tokens
            # more than at others, and the logits vary with what it sees: by about 1, of the end token by about 2.
            for name, weight in model.named_parameters():
                if name.endswith("proj.weight"):
                    weight.normal_(0.0, 0.2)
            model.model.embed_tokens.weight.normal_(0.0, 0.5)
            model.lm_head.weight.normal_(0.0, 0.12)
            model.lm_head.weight[tokenizer.eos_token_id].normal_(0.0, 0.25)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """The tiny model's tokenizer, with a chat template or without."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[START, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    if chat_template:
        fast.chat_template = chat_template
    return fast
