"""The sampler's log-probs beside the trainer's: what is let pass, what stops a run, and on which responses they meet.

python -m pytest tests/unit/training/test_agreement.py
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PretrainedConfig

from mipo_ray.config.train import TrainConfig
from mipo_ray.errors import UserError
from mipo_ray.evaluation.held_out.scorer import Scorer, ScorerSettings
from mipo_ray.evaluation.held_out.stage import RESPONSE_SCHEMA
from mipo_ray.pairs.label_control import has_swapped_labels, shuffle_labels
from mipo_ray.training.agreement import Bound, Comparison, SamplerDisagrees, bound_for, check_agreement
from mipo_ray.training.deepspeed_engine import join_process_group
from mipo_ray.training.layout import Pair, read_pairs
from mipo_ray.training.logprobs import ResponseLogprobs
from mipo_ray.training.reference import colocated_reference
from mipo_ray.training.step import optimizer_step
from tests.helpers.tiny_families import plain_logprobs, tiny_model
from tests.helpers.tiny_training import ragged_pairs, read_all, save_tied_llama


def model_like(dtype: torch.dtype, **config: int) -> Any:
    """As much of a model as decides about its bound."""
    return SimpleNamespace(dtype=dtype, config=PretrainedConfig(**config))


CPU, GPU = torch.device("cpu"), torch.device("cuda")
EXACT = bound_for(model_like(torch.float32), CPU)
ROUNDED = {
    "experts in float32": bound_for(model_like(torch.float32, num_local_experts=4), CPU),
    "float32 on a GPU": bound_for(model_like(torch.float32), GPU),
    "bfloat16": bound_for(model_like(torch.bfloat16), CPU),
    "bfloat16 on a GPU": bound_for(model_like(torch.bfloat16), GPU),
}


def far(bound: Bound, share: float, tokens: int = 24, logprob: float = -50.0) -> Comparison:
    """A comparison of which the two values are `share` of what the bound allows apart."""
    one = Comparison("far", tokens, logprob, logprob)
    return replace(one, sampler=logprob + share * bound.allows(one))


@given(
    tokens=st.integers(1, 4000),
    logprob=st.floats(-5000, 0),
    bound=st.sampled_from([EXACT, *ROUNDED.values()]),
    share=st.floats(0, 3),
)
def test_the_bound_decides_and_nothing_else(tokens: int, logprob: float, bound: Bound, share: float) -> None:
    compared = [far(bound, share, tokens, logprob)] * 2
    if share < 0.99:
        check_agreement(compared, bound)
    elif share > 1.01:
        with pytest.raises(SamplerDisagrees, match="far: the engine that sampled it"):
            check_agreement(compared, bound)


@given(near=st.integers(0, 20), beyond=st.integers(0, 20))
def test_one_answer_is_enough_where_nothing_is_rounded_and_more_than_half_elsewhere(near: int, beyond: int) -> None:
    for bound, are_too_many in ((EXACT, beyond > 0), *((bound, beyond > near) for bound in ROUNDED.values())):
        compared = [far(bound, 0.5)] * near + [far(bound, 5.0)] * beyond
        if not are_too_many:
            check_agreement(compared, bound)
            continue
        with pytest.raises(SamplerDisagrees, match=f"; {beyond} of {near + beyond} answers"):
            check_agreement(compared, bound)


def test_the_faults_that_were_found_are_beyond_the_bounds() -> None:
    # nats of an answer of 24 tokens: LongRoPE's factors, and micro-batches that change a sequence's own positions
    for difference in (26.9, 0.24, 0.09):
        with pytest.raises(SamplerDisagrees):
            check_agreement([Comparison("x", 24, -50.0, -50.0 + difference)], EXACT)
    check_agreement([Comparison("x", 24, -50.0, -50.0 + 1e-3)], EXACT)
    for bound in ROUNDED.values():
        with pytest.raises(SamplerDisagrees):
            check_agreement([Comparison("x", 24, -50.0, -50.0 + 26.9)], bound)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bound", [EXACT, *ROUNDED.values()], ids=["float32", *ROUNDED])
def test_what_is_no_number_disagrees(value: float, bound: Bound) -> None:
    with pytest.raises(SamplerDisagrees):
        check_agreement([Comparison("x", 3, -1.0, value)], bound)


def test_the_message_names_the_worst_pair_both_values_and_causes() -> None:
    near, far = Comparison("pair 'near'", 10, -20.0, -20.5), Comparison("pair 'far'", 10, -20.0, -29.0)
    with pytest.raises(UserError) as caught:
        check_agreement([near, far, near], EXACT)
    message = str(caught.value)
    assert message.startswith("pair 'far': the engine that sampled it gave it a log-prob of -20.0000, the model")
    for part in ("gives -29.0000 (nats, 10 tokens; expected at most 0.03 ", "float32", "rope_scaling", "engine_args"):
        assert part in message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message  # it travels from a worker to the driver
    check_agreement([], EXACT)


class PlainEngine:
    """As much of a DeepSpeed engine as one optimizer step calls, on one model in this process."""

    device = torch.device("cpu")

    def __init__(self, model: Any) -> None:
        self.module = ResponseLogprobs(model)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        self.steps = 0

    def __call__(self, batch: Any) -> torch.Tensor:
        return self.module(batch)

    def backward(self, loss: torch.Tensor, **_: Any) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1

    def set_gradient_accumulation_boundary(self, _: bool) -> None: ...

    def zero_optimization(self) -> bool:
        return False


def sampled_pairs(model: Any, objective: Any = "dpo", error: float = 0.0) -> list[Pair]:
    """Pairs of random ids that carry the model's own log-probs of the chosen responses; the last one is off."""
    pairs = read_all(ragged_pairs(5) if objective != "sami" else sami_rows(), objective)
    with torch.no_grad():
        found = [float(plain_logprobs(model, [replace(p.trees[0], responses=p.trees[0].responses[:1])])) for p in pairs]
    found[-1] += error
    return [replace(pair, sampler_logprob=logprob) for pair, logprob in zip(pairs, found, strict=True)]


def sami_rows() -> list[dict[str, Any]]:
    return [{**row, "mismatched_prompt_token_ids": [row["prompt_token_ids"][::-1]]} for row in ragged_pairs(5)]


@pytest.mark.parametrize("objective", ["dpo", "ipo", "infonce", "sami", "sft"])
@pytest.mark.parametrize("reference", ["round_start", "initial"])
def test_a_first_step_is_refused_before_the_update(objective: Any, reference: Any) -> None:
    join_process_group("cpu")
    train = TrainConfig(objective=objective, reference=reference, layout="padded", length_normalized=objective == "ipo")
    policy, other = tiny_model(), tiny_model(seed=1)
    frozen = None
    if train.needs_reference:  # another model than the policy, as the initial one is in later rounds
        frozen = colocated_reference(ResponseLogprobs(other if reference == "initial" else tiny_model()))
    engine = PlainEngine(policy)
    with pytest.raises(SamplerDisagrees, match="pair '0000000000000004'"):
        optimizer_step(engine, frozen, sampled_pairs(policy, objective, error=0.5), train, 1e-3, 0)
    assert engine.steps == 0
    optimizer_step(engine, frozen, sampled_pairs(policy, objective), train, 1e-3, 0)
    assert engine.steps == 1


def test_later_steps_are_compared_with_a_reference_that_sampled() -> None:
    join_process_group("cpu")
    policy, start = tiny_model(seed=1), tiny_model()
    frozen = colocated_reference(ResponseLogprobs(start))
    right, wrong = sampled_pairs(start), sampled_pairs(start, error=-0.5)
    train = TrainConfig(layout="padded")
    optimizer_step(PlainEngine(policy), frozen, right, train, 1e-3, 7)
    with pytest.raises(SamplerDisagrees, match="pair '0000000000000004'"):
        optimizer_step(PlainEngine(policy), frozen, wrong, train, 1e-3, 7)
    # The initial model did not sample the pairs of later rounds, and the policy has moved: nothing to compare with.
    optimizer_step(PlainEngine(policy), frozen, wrong, TrainConfig(layout="padded", reference="initial"), 1e-3, 7)


def test_pairs_without_the_samplers_word_are_trained_on() -> None:
    join_process_group("cpu")
    policy = tiny_model()
    pairs = read_all(ragged_pairs(3))
    assert {pair.sampler_logprob for pair in pairs} == {None}
    frozen = colocated_reference(ResponseLogprobs(tiny_model()))
    optimizer_step(PlainEngine(policy), frozen, pairs, TrainConfig(layout="padded"), 1e-3, 0)


def test_the_column_is_read_and_null_for_swapped_labels() -> None:
    rows = [{**row, "chosen_logprob": -float(number)} for number, row in enumerate(ragged_pairs(8))]
    ids = pa.list_(pa.int32())
    types = {"pair_id": pa.string(), "chosen_logprob": pa.float32(), "rejected_token_ids": pa.list_(ids)}
    schema = pa.schema(list((types | {"prompt_token_ids": ids, "chosen_token_ids": ids}).items()))
    table = pa.Table.from_pylist(rows, schema=schema)
    assert [pair.sampler_logprob for pair in read_pairs(table, "dpo")] == [-float(number) for number in range(8)]
    shuffled = read_pairs(shuffle_labels(table, seed=3), "dpo")
    swapped = [has_swapped_labels(3, pair.pair_id) for pair in shuffled]
    assert set(swapped) == {True, False}
    for number, (pair, is_swapped) in enumerate(zip(shuffled, swapped, strict=True)):
        assert pair.sampler_logprob == (None if is_swapped else -float(number))


class DeafEvents:
    def emit(self, event: dict[str, Any]) -> None: ...

    def tell(self, event: dict[str, Any]) -> None: ...


@pytest.mark.parametrize("judges", [["initial"], ["initial", "policy"]])
def test_held_out_answers_are_compared_by_the_scorer(judges: list[str], tmp_path: Path) -> None:
    directory = str(save_tied_llama(tmp_path / "model"))
    settings = ScorerSettings(
        dict.fromkeys(judges, directory), "float32", batch_size=2, on_gpu=False, trust_remote_code=False
    )
    scorer = Scorer(settings, DeafEvents())  # type: ignore[arg-type]

    def asked(logprobs: list[float | None]) -> pa.Table:
        rows = [
            {
                "prompt_id": f"row {number}",
                "kind": "answer",
                "conditionings": [[1, 2, 3 + number], [4, 5]],
                "response_token_ids": [6, 7, 8],
                "models": judges,
                "sampler_logprob": logprob,
            }
            for number, logprob in enumerate(logprobs)
        ]
        return pa.Table.from_pylist(rows, schema=RESPONSE_SCHEMA)

    scored = scorer(asked([None, None]))
    own = [values[0] for values in scored[f"logprobs_{judges[-1]}"].to_pylist()]
    assert scorer(asked([own[0], own[1]])).num_rows == 2
    with pytest.raises(SamplerDisagrees, match="held-out answer to 'row 1'"):
        scorer(asked([own[0], own[1] - 0.5]))
