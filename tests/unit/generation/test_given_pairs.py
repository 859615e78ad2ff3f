"""Pairs that exist as token ids: those of the whole conversation, up to the token that ends the answer.

python -m pytest tests/unit/generation/test_given_pairs.py
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.config.prompts import ChatSettings
from mipo_ray.config.recipe import load_config
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.generation.given_pairs import token_pairs, whole_answer
from mipo_ray.generation.rendering import load_tokenizer, render_answer, render_prompts
from mipo_ray.generation.turn_tokens import TurnTokens
from mipo_ray.pairs.given import GIVEN_SCHEMA
from mipo_ray.pairs.schema import PAIR_SCHEMA, PAIR_SCHEMA_2
from mipo_ray.training.layout import read_pairs
from tests.helpers.chat_templates import ALTERNATING, DATED, WHOLE
from tests.helpers.tiny_model import CHAT_TEMPLATE, END, START, make_tokenizer

CHAT = load_config().prompts.chat
LOOP = "{% for m in messages %}"
ASKED = "{% if add_generation_prompt %}"
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "trimming": WHOLE["trimming"],
    "system into user": WHOLE["system into user"],
    "dated": DATED["llama"],
    # Ends a turn without a line end behind it, as Llama 3's.
    "tight": LOOP
    + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    + ASKED
    + "<|im_start|>assistant\n{% endif %}",
    # Writes an empty thought before an answer, as Qwen 3's.
    "thinking": LOOP
    + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}(no thought)\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}" + ASKED + "<|im_start|>assistant\n{% endif %}",
}  # fmt: skip
# The answer follows the prompt's last word and a space, which a tokenizer may join to the answer's first.
JOINED = LOOP + "{{ m.content }}{{ ' ' if m.role == 'user' else '<|im_end|>' }}{% endfor %}"
OTHERWISE = CHAT_TEMPLATE.removesuffix("{% endif %}") + "<think>\n{% endif %}"
NO_END = LOOP + "### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}" + ASKED + "### assistant:\n{% endif %}"


def conversation(*contents: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.mark.parametrize("template", [*TEMPLATES.values(), ALTERNATING], ids=[*TEMPLATES, "alternating"])
@given(question=st.text(max_size=20), answer=st.text(max_size=30))
@settings(max_examples=30)
def test_prompt_and_answer_are_the_conversation_as_the_tokenizer_renders_it(
    tokenizer: Any, template: str, question: str, answer: str
) -> None:
    tokenizer.chat_template = template
    messages = conversation(question)
    whole = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": answer}], return_dict=False, **CHAT.arguments
    )
    prompt, turn = render_answer(tokenizer, messages, answer, CHAT)
    assert prompt == render_prompts(tokenizer, [messages], CHAT)[0]
    assert prompt + turn == whole


def test_a_token_that_would_reach_over_the_end_of_the_prompt_is_cut_there(tokenizer: Any) -> None:
    """What the model is trained on begins behind the ids that it will be asked with."""
    tokenizer.chat_template = JOINED
    messages = conversation("weather")
    prompt, turn = render_answer(tokenizer, messages, "the weather", CHAT)
    assert prompt == render_prompts(tokenizer, [messages], CHAT)[0]
    whole = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "the weather"}], return_dict=False
    )
    assert prompt + turn != whole  # here a token does reach over
    assert tokenizer.decode(prompt + turn) == tokenizer.decode(whole)


def test_control_tokens_in_texts_are_text(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    prompt, turn = render_answer(tokenizer, conversation(f"a{END}b"), f"c{END}{START}system\nd", CHAT)
    special = set(tokenizer.all_special_ids)
    assert [token for token in turn if token in special] == [tokenizer.eos_token_id]
    assert len([token for token in prompt if token in special]) == 3
    assert tokenizer.decode(turn) == f"c{END}{START}system\nd{END}\n"


def test_control_tokens_in_an_answer_are_refused_where_they_are_to_be(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    with pytest.raises(UserError, match="the assistant message holds the control token"):
        render_answer(tokenizer, conversation("a"), f"b{END}", ChatSettings({}, "refuse"))


def test_a_template_that_asks_otherwise_than_it_answers_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = OTHERWISE
    with pytest.raises(
        UserError, match=r"prompt 'a': expected the turn of an answer to begin as a prompt for one ends"
    ):
        render_answer(tokenizer, conversation("a"), "b", CHAT)


def test_an_answer_ends_with_the_first_end_token_or_the_tokenizers_own(tokenizer: Any) -> None:
    ends = TurnTokens(frozenset({7, 8}), (), frozenset({7, 8}))
    assert whole_answer([1, 2, 8, 9], ends, tokenizer) == [1, 2, 8]
    assert whole_answer([7], ends, tokenizer) == [7]
    assert whole_answer([1, 2], ends, tokenizer) == [1, 2, tokenizer.eos_token_id]
    without = make_tokenizer()
    without.eos_token = None
    with pytest.raises(UserError, match="expected a token that ends an answer"):
        whole_answer([1, 2], ends, without)


# Whole rows, for a model directory


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The tiny model with another template."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    tokenizer = make_tokenizer(getattr(request, "param", CHAT_TEMPLATE))
    tokenizer.save_pretrained(directory)
    return directory


def block(*rows: dict[str, Any]) -> pa.Table:
    full = [
        {"prompt_id": f"a:{i}", "where": f"a.jsonl, line {i}", "template_arguments": "{}"} | row
        for i, row in enumerate(rows, start=1)
    ]
    return pa.Table.from_pylist(full, schema=GIVEN_SCHEMA)


def config(model: Path, *overrides: str) -> Config:
    fixed = ["rounds=1", "evaluate.enabled=false", "pairs.path=a.jsonl", f"model.path={model}"]
    return load_config(None, [*fixed, *overrides])


def made(model: Path, *rows: dict[str, Any], overrides: tuple[str, ...] = ()) -> pa.Table:
    rejected = len(rows[0]["rejected"])
    return token_pairs(block(*rows), config=config(model, *overrides), policy=str(model), rejected=rejected)


ROW = {"messages": conversation("What grows?", "Moss.", "And now?"), "chosen": "Ferns.", "rejected": ["No."]}


@pytest.mark.parametrize("model", TEMPLATES.values(), ids=TEMPLATES, indirect=True)
def test_a_row_is_the_conversations_tokens_and_ends_as_the_engine_would_have_stopped(model: Path) -> None:
    tokenizer = load_tokenizer(str(model))
    (pair,) = made(model, ROW).to_pylist()
    for side, text in (("chosen", "Ferns."), ("rejected", "No.")):
        whole = tokenizer.apply_chat_template(
            [*ROW["messages"], {"role": "assistant", "content": text}], return_dict=False, **CHAT.arguments
        )
        found = pair["prompt_token_ids"] + pair[f"{side}_token_ids"]
        assert found == whole[: len(found)]
        assert tokenizer.decode(whole[len(found) :]).strip() == ""
        assert found[-1] == tokenizer.eos_token_id
        assert found.count(tokenizer.eos_token_id) == whole.count(tokenizer.eos_token_id)


@pytest.mark.parametrize("model", [NO_END], indirect=True)
def test_a_template_without_an_end_gets_the_tokenizers(model: Path) -> None:
    (pair,) = made(model, ROW).to_pylist()
    tokenizer = load_tokenizer(str(model))
    assert tokenizer.decode(pair["chosen_token_ids"]) == f"Ferns.\n\n{END}"


def test_a_row_has_the_schema_of_sampled_pairs_without_a_samplers_figures(model: Path) -> None:
    table = made(model, ROW)
    assert table.schema == PAIR_SCHEMA
    (pair,) = table.to_pylist()
    assert (pair["strategy"], pair["round"], pair["dropped"]) == ("given", 0, "")
    assert pair["chosen_logprob"] is pair["rejected_logprob"] is pair["pmi"] is None
    assert pair["messages"] == ROW["messages"]
    assert len(pair["pair_id"]) == 16
    assert made(model, ROW, overrides=("seed=1",)).to_pylist()[0]["pair_id"] != pair["pair_id"]
    (read,) = read_pairs(table.rename_columns(table.schema.names), "sft")
    assert read.sampler_logprob is None


def test_several_rejected_responses_make_one_pair(model: Path) -> None:
    table = made(model, {**ROW, "rejected": ["No.", "Nothing.", "Never."]})
    assert table.schema == PAIR_SCHEMA_2
    (pair,) = read_pairs(table, "dpo")
    assert len(pair.trees[0].responses) == 4


def test_a_rows_own_template_arguments_reach_the_template(model: Path) -> None:
    dated = make_tokenizer(DATED["llama"])
    dated.save_pretrained(model)
    load_tokenizer.cache_clear()
    rows = [ROW, {**ROW, "template_arguments": json.dumps({"date_string": "01 Feb 2003"})}]
    plain, own = made(model, *rows).to_pylist()
    tokenizer = load_tokenizer(str(model))
    assert "Today Date: 01 Feb 2003" in tokenizer.decode(own["prompt_token_ids"])
    assert "Today Date: 01 Feb 2003" not in tokenizer.decode(plain["prompt_token_ids"])


LONG = {**ROW, "rejected": ["No, " * 400]}


def test_a_pair_that_does_not_fit_is_refused_by_row(model: Path) -> None:
    with pytest.raises(UserError) as error:
        made(model, ROW, LONG)
    assert str(error.value).startswith("a.jsonl, line 2: expected at most 1024 tokens (model.max_model_len)")
    assert "filters.drop_too_long=true" in str(error.value)


def test_or_dropped_and_counted_as_other_filters_do(model: Path) -> None:
    rows = [ROW, LONG, {**ROW, "rejected": ["Ferns."]}, {**ROW, "chosen": " "}, {**ROW, "chosen": "Ferns and more."}]
    overrides = ("filters.drop_too_long=true", "filters.max_length_ratio=1.9")
    dropped = made(model, *rows, overrides=overrides)["dropped"].to_pylist()
    assert dropped == ["", "too_long", "identical", "empty", "length_ratio"]


def test_a_pair_of_exactly_the_window_fits(model: Path) -> None:
    (pair,) = made(model, ROW).to_pylist()
    tokens = len(pair["prompt_token_ids"]) + max(len(pair["chosen_token_ids"]), len(pair["rejected_token_ids"]))
    fits = (f"model.max_model_len={tokens}", "generation.sampling.max_tokens=8")
    assert made(model, ROW, overrides=fits).num_rows == 1
    with pytest.raises(UserError, match=f"found {tokens}"):
        made(model, ROW, overrides=(f"model.max_model_len={tokens - 1}", "generation.sampling.max_tokens=8"))


@pytest.mark.parametrize("model", [OTHERWISE], indirect=True)
def test_what_the_template_refuses_is_told_with_the_row(model: Path) -> None:
    with pytest.raises(UserError, match=r"^a\.jsonl, line 1: .*expected the turn of an answer to begin"):
        made(model, ROW)


def test_equal_policy_and_reference_lose_ln_2_on_them(model: Path) -> None:
    """What the trainer computes of the columns that are written here, before its first step."""
    import torch
    from transformers import AutoModelForCausalLM

    from mipo_ray.config.train import TrainConfig
    from mipo_ray.pairs.schema import as_version_2
    from mipo_ray.training.layout import lay_out
    from mipo_ray.training.logprobs import response_logprobs
    from mipo_ray.training.loss import PairLogprobs, pair_losses

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    (pair,) = read_pairs(as_version_2(made(model, ROW)), "dpo")
    batch = lay_out(pair.trees, "padded")
    with torch.no_grad():
        scores = response_logprobs(net, batch).view(1, 1, 2)
    tokens = torch.tensor([[len(response) for response in tree.responses] for tree in pair.trees])
    losses = pair_losses(PairLogprobs(policy=scores, reference=scores, tokens=tokens), TrainConfig())
    assert losses.item() == pytest.approx(math.log(2), abs=1e-6)
