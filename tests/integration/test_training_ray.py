"""Training on a Ray cluster: shares of steps, lost workers, and drivers that come back.

python -m pytest tests/integration/test_training_ray.py
"""

from __future__ import annotations

import json
import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import ray.data
import torch
from pyarrow.fs import LocalFileSystem

from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.monitoring import events as monitoring
from mipo_ray.pairs.label_control import has_swapped_labels
from mipo_ray.pairs.schema import SAMPLER_LOGPROB, pair_columns, write_form
from mipo_ray.ray_cluster.blocks import ordered_context
from mipo_ray.session import Session, Stage
from mipo_ray.storage.manifests import TrainSummary
from mipo_ray.storage.pair_statistics import PairStatistics
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import open_run
from mipo_ray.training import stage as stage_module
from mipo_ray.training.agreement import SamplerDisagrees
from mipo_ray.training.layout import read_pairs
from mipo_ray.training.shares import StepShares, own_steps, stream_kept_pairs
from mipo_ray.training.trainer import AllPairs, ArrivingPairs, Models
from tests.helpers.covering import by_night
from tests.helpers.ray_training import (
    KILLED_STEP,
    ON_CPU,
    PAIRS,
    SCHEMA,
    STAGE,
    STEPS_WITH_A_KILL,
    TRAIN,
    Outcome,
    assert_equal_outcomes,
    in_this_process,
    on_ray,
    steps_done,
)
from tests.helpers.stages import commit
from tests.helpers.tiny_training import KillsItsWorker, ragged_pairs, save_tied_llama


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_tied_llama(tmp_path_factory.mktemp("model") / "initial")


@pytest.fixture(scope="module")
def uninterrupted(ray_cluster, model_dir, tmp_path_factory) -> Outcome:
    run = open_run(str(tmp_path_factory.mktemp("uninterrupted")))
    return on_ray(model_dir, run, monitoring.start(run))


def test_two_ray_workers_equal_one_plain_process(uninterrupted, model_dir, tmp_path):
    assert_equal_outcomes(uninterrupted, in_this_process(model_dir, tmp_path, PAIRS), tolerance=1e-5)


@pytest.mark.parametrize(("objective", "first_loss"), by_night([("infonce", math.log(3))], [("sami", None)]))
def test_several_rejected_responses_and_their_prompts_reach_the_workers(
    ray_cluster, model_dir, tmp_path, objective, first_loss
):
    pairs = [
        {
            **pair,
            "rejected_token_ids": [*pair["rejected_token_ids"], *other["rejected_token_ids"]],
            "mismatched_prompt_token_ids": [other["prompt_token_ids"], pair["prompt_token_ids"][::-1]],
        }
        for pair, other in zip(PAIRS, ragged_pairs(11, seed=1), strict=True)
    ]
    run = open_run(str(tmp_path / "run"))
    events = monitoring.start(run)
    found = on_ray(model_dir, run, events, pairs=pairs, objective=objective, checkpoint_steps=None)
    expected = in_this_process(model_dir, tmp_path, pairs, objective=objective)
    keys = ("pairs", "tokens", "loss", "gradient_norm", "chosen_logprob", "rejected_logprob")
    for step, same in zip(found.steps, expected.steps, strict=True):
        assert {key: step[key] for key in keys} == pytest.approx({key: same[key] for key in keys}, rel=1e-5, abs=1e-5)
    if first_loss is not None:
        assert found.summary.first_loss == pytest.approx(first_loss, abs=1e-5)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("reference_mode", by_night(["colocated"], ["cached"]))
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint_only(
    uninterrupted, model_dir, tmp_path, reference_mode
):
    run = open_run(str(tmp_path / "run"))
    events = KillsItsWorker(monitoring.start(run), KILLED_STEP, tmp_path / "killed")
    outcome = on_ray(model_dir, run, events, reference_mode=reference_mode, max_failures=1)
    assert [step["step"] for step in outcome.steps] == STEPS_WITH_A_KILL
    assert_equal_outcomes(outcome, uninterrupted, tolerance=1e-6)
    cache = sorted((tmp_path / "run" / STAGE / "reference_logprobs" / "float32").glob("*"))
    assert len(cache) == (2 if reference_mode == "cached" else 0)
    for file in cache:
        assert file.stat().st_mtime_ns < (tmp_path / "killed").stat().st_mtime_ns


def test_checkpoints_that_cannot_be_gone_on_from_are_named(ray_cluster, model_dir, tmp_path):
    books = tmp_path / STAGE / "ray_train" / "checkpoint_manager_snapshot.json"
    books.parent.mkdir(parents=True)
    # Of another version of Ray; one that is cut off is dropped (tests/unit/training/test_stored_checkpoints.py).
    books.write_text('{"ray_version": "2.0.0", "checkpoint_results": [], "checkpoint_report_indices": "other"}')
    run = open_run(str(tmp_path))
    with pytest.raises(UserError, match=rf"Remove {books.parent} to train this round from its beginning"):
        on_ray(model_dir, run, monitoring.start(run))


def test_a_failed_worker_is_reported_with_its_own_message_first(ray_cluster, model_dir, tmp_path):
    run = open_run(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"^training worker 0: epoch 0, step 2: expected 4 pairs .*, found 3"):
        on_ray(model_dir, run, monitoring.start(run), pair_count=12, num_workers=1)


def test_pairs_of_another_sampler_end_the_training_on_all_workers_and_are_not_tried_again(
    ray_cluster, model_dir, tmp_path
):
    sampled = [{**pair, SAMPLER_LOGPROB: -1.0} for pair in PAIRS]
    run = open_run(str(tmp_path))
    events = monitoring.start(run)
    message = "pair '[0-9a-f]{16}': the engine that sampled it gave it a log-prob of -1.0000, the model that is trained"
    with pytest.raises(SamplerDisagrees, match=message) as caught:
        on_ray(model_dir, run, events, pairs=sampled, max_failures=3)
    assert "4 of 4 answers" in str(caught.value)  # those of both workers
    assert not steps_done(run, events)
    assert not (tmp_path / STAGE / "policy").exists()


def test_no_pairs_are_refused(ray_cluster, model_dir, tmp_path):
    run = open_run(str(tmp_path))
    with pytest.raises(UserError, match="expected at least one pair"):
        on_ray(model_dir, run, monitoring.start(run), pair_count=0)


def write_pair_files(directory: Path, rejected: int, without: tuple[str, ...] = ()) -> list[str]:
    """PAIRS in two files as the generate stage writes them, the last ones first, every fourth of them dropped."""
    rows = [
        {
            **pair,
            "rejected_token_ids": [*pair["rejected_token_ids"]] * rejected,
            "mismatched_prompt_token_ids": [pair["prompt_token_ids"][::-1]] * rejected,
            "mismatched_messages": [],
            "mismatched_prompt_id": [],
            "rejected": ["tea"] * rejected,
            "rejected_finish_reason": ["stop"] * rejected,
            "rejected_logprob": [-1.0] * rejected,
            SAMPLER_LOGPROB: -float(index),
            "dropped": "empty" if index % 4 == 3 else "",
        }
        for index, pair in enumerate(PAIRS)
    ]
    files = []
    for name, part in (("a", rows[:4:-1]), ("b", rows[4::-1])):
        files.append(str(directory / f"{name}.parquet"))
        pyarrow.parquet.write_table(write_form(part, rejected).drop_columns(list(without)), files[-1])
    return files


@pytest.mark.parametrize(("objective", "rejected"), [("sft", 2), ("dpo", 1), ("sami", 1), ("sami", 2)])
def test_kept_pairs_come_from_their_files_in_training_order(ray_cluster, tmp_path, objective, rejected):
    files = write_pair_files(tmp_path, rejected)
    kept = [pair for index, pair in enumerate(PAIRS) if index % 4 != 3]
    table = pa.concat_tables(ray.get(stream_kept_pairs(files, LocalFileSystem(), objective).to_arrow_refs()))
    assert table.column_names == [*pair_columns(objective), SAMPLER_LOGPROB]
    found = read_pairs(table, objective)
    assert [pair.pair_id for pair in found] == [pair["pair_id"] for pair in kept]
    assert [pair.sampler_logprob for pair in found] == [-float(index) for index in range(len(PAIRS)) if index % 4 != 3]
    for trees, pair in zip((pair.trees for pair in found), kept, strict=True):
        prompts = [pair["prompt_token_ids"]] + [pair["prompt_token_ids"][::-1]] * (objective == "sami") * rejected
        responses = [pair["chosen_token_ids"], *pair["rejected_token_ids"] * (objective != "sft") * rejected]
        assert [tree.prompt.tolist() for tree in trees] == [prompt.tolist() for prompt in prompts]
        for tree in trees:
            assert [ids.tolist() for ids in tree.responses] == [ids.tolist() for ids in responses]


def test_only_the_named_pairs_are_kept_and_the_labels_of_some_are_swapped(ray_cluster, tmp_path):
    files = write_pair_files(tmp_path, rejected=1)
    only = frozenset(pair["pair_id"] for pair in PAIRS[:8])
    rows = stream_kept_pairs(files, LocalFileSystem(), "dpo", only=only, shuffle_seed=5).take_all()
    kept = [pair for index, pair in enumerate(PAIRS[:8]) if index % 4 != 3]
    assert [row["pair_id"] for row in rows] == [pair["pair_id"] for pair in kept]
    swapped = [has_swapped_labels(5, row["pair_id"]) for row in rows]
    assert len(set(swapped)) == 2
    for row, pair, is_swapped in zip(rows, kept, swapped, strict=True):
        sides = [pair["chosen_token_ids"].tolist(), pair["rejected_token_ids"][0].tolist()]
        found = [list(row["chosen_token_ids"]), list(row["rejected_token_ids"][0])]
        assert found == (sides[::-1] if is_swapped else sides)


def test_pairs_without_a_column_of_the_objective_are_refused_by_name(ray_cluster, tmp_path):
    """They were written by a release before there was the column."""
    files = write_pair_files(tmp_path, rejected=1, without=("mismatched_prompt_token_ids",))
    message = (
        r"a.parquet: train.objective sami: expected the columns mismatched_prompt_token_ids too, found pair_id, .*"
    )
    with pytest.raises(UserError, match=f"{message}; generate these pairs again"):
        stream_kept_pairs(files, LocalFileSystem(), "sami")
    assert stream_kept_pairs(files, LocalFileSystem(), "dpo").count() == 9


def test_the_sort_of_pairs_does_not_cut_their_steps(ray_cluster, tmp_path):
    config = Config.model_validate({"train": TRAIN})
    kept = [pair["pair_id"] for index, pair in enumerate(PAIRS) if index % 4 != 3]
    pairs = stream_kept_pairs(write_pair_files(tmp_path, 1), LocalFileSystem(), "dpo")
    (shard,) = StepShares(config).configure({"pairs": pairs}, 1, None, None)
    steps = [[pair.pair_id for pair in step] for step in own_steps(shard["pairs"], config.train, 1)]
    assert [sorted(step) for step in steps] == [kept[:4], kept[4:8], kept[8:]]


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_workers_stream_every_step_whole_and_in_order(ray_cluster, workers):
    config = Config.model_validate({"train": TRAIN})
    with ordered_context() as context:
        context.target_max_block_size = 64  # bytes: every row would be a block of its own
        dataset = ray.data.from_arrow(pa.Table.from_pylist(PAIRS, SCHEMA)).repartition(3)
    shards = [shard["pairs"] for shard in StepShares(config).configure({"pairs": dataset}, workers, None, None)]
    with ThreadPoolExecutor(workers) as pool:  # each waits for all the others
        for _ in range(2):
            own = list(pool.map(lambda shard: list(own_steps(shard, config.train, workers)), shards))
            assert [len(steps) for steps in own] == [3] * workers
            for index, expected in enumerate([PAIRS[:4], PAIRS[4:8], PAIRS[8:]]):
                shares = [steps[index] for steps in own]
                sizes = {len(share) for share in shares}
                assert max(sizes) - min(sizes) <= 1
                found = {pair.pair_id: pair for share in shares for pair in share}
                assert sum(map(len, shares)) == len(found) == len(expected)
                for pair in expected:
                    (tree,) = found[pair["pair_id"]].trees
                    assert tree.prompt.tolist() == pair["prompt_token_ids"].tolist()
                    responses = [pair["chosen_token_ids"], *pair["rejected_token_ids"]]
                    assert [ids.tolist() for ids in tree.responses] == [ids.tolist() for ids in responses]


def session_with_pairs(config: Config, directory: Path, round: Round, finished: str) -> Session:
    """A session whose round has a finished generate stage, as the train stage reads it."""
    session = Session(config, open_run(str(directory)), ON_CPU, monitoring.start(open_run(str(directory))))
    stage = session.stage(round, "generate").directory
    statistics = PairStatistics(rows=1, kept=1, dropped={})
    manifest = commit(session.run, stage, config, files=[], statistics=statistics)
    session.run.write_text(f"{stage}/manifest.json", json.dumps(replace(manifest, finished=finished).to_json()))
    return session


@pytest.mark.parametrize("reference", ["round_start", "initial"])
def test_the_reference_of_a_later_round_is_the_one_asked_for(ray_cluster, monkeypatch, tmp_path, reference):
    used: list[Models] = []

    def remember(stage: Stage, models: Models, *_: Any) -> TrainSummary:
        used.append(models)
        return TrainSummary(steps=1, pairs=1, tokens=1, first_loss=0.0, last_loss=0.0, seconds=0.0)

    monkeypatch.setattr(stage_module, "train_policy", remember)
    monkeypatch.setattr(stage_module, "_kept_pairs", lambda *_: None)
    config = Config.model_validate({"model": {"path": "initial"}, "train": {"reference": reference}})
    session = session_with_pairs(config, tmp_path, Round(1), "monday")
    stage_module.train(session, Round(1))
    trained = session.policy(Round(0))
    assert trained == str(tmp_path / "rounds/000/train/policy")
    assert used == [Models(trained, "initial" if reference == "initial" else trained)]


@pytest.mark.parametrize(
    ("generated", "kept"),
    [("monday", ["pairs.txt", "ray_train/books", "reference_logprobs/worker"]), ("tuesday", ["pairs.txt"])],
)
def test_a_stage_keeps_what_an_interruption_left_as_long_as_its_pairs_are_the_same(
    ray_cluster, monkeypatch, tmp_path, generated, kept
):
    session = session_with_pairs(Config(), tmp_path, Round(0), generated)
    run, stage = session.run, STAGE
    run.write_text(f"{stage}/pairs.txt", "monday")
    for name in ("policy/config.json", "ray_train/books", "reference_logprobs/worker"):
        run.write_text(f"{stage}/{name}", "from before")
    found: list[str] = []

    def fails(*_: Any, **__: Any) -> None:
        found.extend(run.list_files(stage))
        raise RuntimeError("as before")

    monkeypatch.setattr(stage_module, "train_policy", fails)
    monkeypatch.setattr(stage_module, "_kept_pairs", lambda *_: None)
    with pytest.raises(RuntimeError, match="as before"):
        stage_module.train(session, Round(0))
    assert found == kept


@pytest.mark.parametrize(
    ("begun", "streams", "kind"),
    [
        ("monday", True, AllPairs),  # by pair_id, before streaming was asked for
        ("as written, of x_000000-0", False, ArrivingPairs),  # streamed, before it was no longer asked for
        ("as written, of another", True, ArrivingPairs),
        ("as written, of another", False, AllPairs),
    ],
)
def test_a_training_goes_on_in_the_order_that_it_was_begun_in(ray_cluster, monkeypatch, tmp_path, begun, streams, kind):
    session = session_with_pairs(Config(), tmp_path, Round(0), "monday")
    session.run.write_text("rounds/000/generate/conditioned/x_000000-0.parquet", "rows")
    session.run.write_text(f"{STAGE}/pairs.txt", begun)
    session.run.write_text(f"{STAGE}/ray_train/books", "from before")
    found: list[Any] = []

    def remember(stage: Stage, models: Models, pairs: Any) -> None:
        found.extend([type(pairs), "ray_train/books" in session.run.list_files(STAGE)])
        raise RuntimeError("as before")

    monkeypatch.setattr(stage_module, "train_policy", remember)
    monkeypatch.setattr(stage_module, "_kept_pairs", lambda *_: None)
    generated: Future[None] = Future()
    generated.set_result(None)
    with pytest.raises(RuntimeError, match="as before"):
        stage_module.train(session, Round(0), generated=generated if streams else None)
    assert found == [kind, begun != "as written, of another"]
