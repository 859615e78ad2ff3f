"""Judges over a finished run of the tiny model: an endpoint with faults, and the tiny model itself in the vLLM pool.

vLLM's own server as a judge: tests/nightly/test_judge_server.py.

python -m pytest tests/integration/test_judging.py
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mipo_ray import run
from mipo_ray.conditioning.needs import check_held_out
from mipo_ray.config.recipe import load_config
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.evaluation.judge.stage import judge_policy, reach_judge
from mipo_ray.monitoring import events as monitoring
from mipo_ray.ray_cluster.resources import resolve
from mipo_ray.session import Session
from mipo_ray.storage.records import to_json
from mipo_ray.storage.results import gather_evaluation
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import RunDirectory, StorageError
from tests.helpers.fake_judge_endpoint import MODEL, FakeJudgeEndpoint, always_first, garbage, longer
from tests.helpers.golden_run import HELD_OUT, JUDGE_KEY, SAMPLES, GoldenRun
from tests.helpers.runs import has_traceback, joined_cluster, read_directory
from tests.helpers.stages import edit_manifest

PAIRS = HELD_OUT * SAMPLES


@pytest.fixture
def run_dir(golden_run: GoldenRun, tmp_path: Path) -> Path:
    """A copy of the finished run, which no judge has judged."""
    return golden_run.copy(tmp_path / "run")


@pytest.fixture(autouse=True)
def errors_as_they_are(ray_cluster: Any) -> Iterator[None]:
    """As the command has it: a UserError of an actor reaches the driver as what it is."""
    import ray.data

    context = ray.data.DataContext.get_current()
    before, context.raise_original_map_exception = context.raise_original_map_exception, True
    yield
    context.raise_original_map_exception = before


def with_judge(golden_run: GoldenRun, run_dir: Path, endpoint: FakeJudgeEndpoint, *more: str) -> Config:
    recipe, *options = golden_run.options
    judge = [f"evaluate.judge.model={MODEL}", f"evaluate.judge.endpoint={endpoint.url}"]
    return load_config(recipe, [*options, f"run_dir={run_dir}", *judge, *more])


def judge(config: Config) -> dict[str, Any]:
    """Judges round 0; returns its entries of evaluation.json."""
    directory = RunDirectory(config.run_dir)
    resources, held_out = resolve(config, {"CPU": 6.0}), check_held_out(config)
    with monitoring.recording(directory) as events:
        judge_policy(Session(config, directory, resources, events), Round(0), held_out)
    return judge_results(directory)


def judge_results(directory: RunDirectory) -> dict[str, Any]:
    """Round 0's entries of evaluation.json, from its manifests: what there is."""
    entries = gather_evaluation(directory).get("0", {})
    return {name: to_json(entry) for name, entry in entries.items() if name.startswith("judge_")}


def values(entry: dict[str, Any]) -> dict[str, float]:
    return {name: figures["value"] for name, figures in entry["metrics"].items()}


def answers(run_dir: Path, policy: str) -> dict[tuple[str, int], str]:
    rows = read_directory(run_dir / policy / "evaluate/responses")
    return {(row["prompt_id"], row["sample"]): row["response"] for row in rows if row["kind"] == "answer"}


def test_the_run_is_judged_by_both_protocols(
    golden_run: GoldenRun, ray_address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, endpoint, output = golden_run.directory, golden_run.judge, golden_run.output
    assert f"fake-judge at {endpoint.url}: pairwise {2 * PAIRS} of each round" in output
    assert "win - loss" in output
    assert "mean rating" in output
    assert len(endpoint.judged) == 7 * PAIRS  # each pair of two rounds twice, each answer of three policies once
    assert {request["temperature"] for request in endpoint.judged} == {0.0}

    # Nothing is left to do: the same command asks nobody.
    monkeypatch.setenv("JUDGE_KEY", JUDGE_KEY)
    options = [*golden_run.options, *golden_run.judge_options, f"run_dir={run_dir}", f"ray.address={ray_address}"]
    assert run.main(options) == 0
    assert "finished before, nothing to do" in capsys.readouterr().out
    assert len(endpoint.judged) == 7 * PAIRS
    # Another judge is another definition.
    assert run.main([*options, "evaluate.judge.model=other"]) == 2
    refusal = capsys.readouterr().err
    assert "rounds/000/judge/pairwise: was judged by another definition" in refusal or "base/judge" in refusal
    assert "model: 'fake-judge' there, 'other' now" in refusal

    base, policy = answers(run_dir, "base"), answers(run_dir, "rounds/000")
    manifest = json.loads((run_dir / "rounds/000/judge/pairwise/manifest.json").read_text())
    evaluation = manifest["evaluation"]
    # The judge prefers the longer answer in both orders, so that lengths alone say what must come out.
    margins = [len(policy[key].strip("\r\n")) - len(base[key].strip("\r\n")) for key in base]
    assert evaluation["metrics"]["win"]["value"] == pytest.approx(sum(margin > 0 for margin in margins) / PAIRS)
    assert evaluation["metrics"]["loss"]["value"] == pytest.approx(sum(margin < 0 for margin in margins) / PAIRS)
    assert 0 < evaluation["metrics"]["win"]["value"] < 1
    assert evaluation["metrics"]["self_consistency"]["value"] == 1.0
    assert evaluation["metrics"]["position_bias"]["value"] == 0.0
    assert "{{ answer_a }}" in evaluation["prompt"]
    assert (manifest["name"], evaluation["kind"], evaluation["version"]) == ("judge_pairwise", "judge", 1)

    rows = read_directory(run_dir / "rounds/000/judge/pairwise")
    assert Counter(row["order"] for row in rows) == {"base_first": PAIRS, "policy_first": PAIRS}
    for row in rows:
        key = row["prompt_id"], row["sample"]
        pair = [base[key], policy[key]]
        assert row["answers"] == (pair if row["order"] == "base_first" else pair[::-1])
        assert f"I am user {row['prompt_id'].split('-')[-1]} " in row["prompt"]
        assert row["judgement"].startswith("Well.")

    ratings = {}
    for name in ("base", "rounds/000"):
        rated = read_directory(run_dir / name / "judge/pointwise")
        assert all(row["reference"] in row["prompt"] and row["reference"].startswith("All about") for row in rated)
        ratings[name] = [1 + len(row["answers"][0].strip("\r\n")) % 5 for row in rated]
        assert [row["parsed"] for row in rated] == [str(rating) for rating in ratings[name]]
    rating = judge_results(RunDirectory(str(run_dir)))["judge_pointwise"]["metrics"]["rating"]
    assert rating["value"] == pytest.approx(sum(ratings["rounds/000"]) / PAIRS)
    assert rating["change"] == pytest.approx((sum(ratings["rounds/000"]) - sum(ratings["base"])) / PAIRS)

    # The key is nowhere: not in the run, not in what was printed, not in the logs of the cluster.
    import ray

    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    for path in [*run_dir.rglob("*"), *logs.rglob("*")]:
        assert not path.is_file() or JUDGE_KEY.encode() not in path.read_bytes(), path
    assert JUDGE_KEY not in output


def test_a_judge_that_always_says_first_finds_no_winner(golden_run, run_dir: Path) -> None:
    with FakeJudgeEndpoint(always_first).running() as endpoint:
        entry = judge(with_judge(golden_run, run_dir, endpoint))["judge_pairwise"]
    found = values(entry)
    assert (found["win"], found["tie"], found["loss"]) == (0.0, 1.0, 0.0)
    assert found["win"] + found["tie"] / 2 == 0.5
    assert found["position_bias"] == 0.5
    assert entry["metrics"]["net_win"]["verdict"] == "not distinguishable"


def test_a_judge_that_says_garbage_is_refused_and_not_asked_again(golden_run, run_dir: Path) -> None:
    with FakeJudgeEndpoint(garbage).running() as endpoint:
        config = with_judge(golden_run, run_dir, endpoint)
        for _ in range(2):
            with pytest.raises(UserError, match=f"{2 * PAIRS} of {2 * PAIRS} judgements name no verdict") as error:
                judge(config)
            assert "As a language model I like both" in str(error.value)
            assert len(endpoint.judged) == 2 * PAIRS
    assert not (run_dir / "rounds/000/judge/pairwise/manifest.json").exists()
    # Unfinished work of another definition makes room.
    with FakeJudgeEndpoint(longer).running() as endpoint:
        config = with_judge(golden_run, run_dir, endpoint, "evaluate.judge.temperature=0.5")
        assert values(judge(config)["judge_pairwise"])["unreadable"] == 0.0
        assert {request["temperature"] for request in endpoint.judged} == {0.5}


def test_faults_of_a_server_are_outlived(golden_run, run_dir: Path) -> None:
    with FakeJudgeEndpoint(longer, statuses=(500, 429, -1)).running() as endpoint:
        config = with_judge(golden_run, run_dir, endpoint, "evaluate.judge.timeout_seconds=5")
        found = values(judge(config)["judge_pairwise"])
        assert min(endpoint.attempts.values()) >= 4  # more where two answers are the same text: one prompt, two orders
        assert len(endpoint.judged) == 2 * PAIRS
    assert (found["unreadable"], found["self_consistency"]) == (0.0, 1.0)


def test_a_server_that_stays_broken_stops_the_run_and_the_next_call_goes_on(golden_run, run_dir: Path) -> None:
    with FakeJudgeEndpoint(longer, statuses=(500,) * 100).running() as endpoint:
        config = with_judge(golden_run, run_dir, endpoint, "evaluate.judge.max_retries=1")
        with pytest.raises(UserError, match=r"injected fault 500.* \(sent again 1 times\)\. Judgements made so far"):
            judge(config)
    # Elsewhere the same judge goes on: where it runs is no part of the definition.
    with FakeJudgeEndpoint(longer).running() as endpoint:
        found = values(judge(with_judge(golden_run, run_dir, endpoint))["judge_pairwise"])
    assert found["unreadable"] == 0.0
    rows = read_directory(run_dir / "rounds/000/judge/pairwise")
    assert len({row["judgement_id"] for row in rows}) == len(rows) == 2 * PAIRS


def test_a_judge_that_moves_into_the_engines_of_the_run_goes_on(
    golden_run, run_dir: Path, ray_address: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model says garbage as a judge, so that what it said is counted and named."""
    template = run_dir.parent / "short.txt.j2"  # its window is short, and a byte is often a token
    template.write_text("Q: {{ question }}\nA: {{ answer_a }}\nB: {{ answer_b }}\nVerdict: A, B or tie?")
    more = [f"evaluate.judge.model={tiny_model}", f"evaluate.judge.pairwise_template={template}"]
    more += ["evaluate.judge.max_tokens=16"]
    with FakeJudgeEndpoint(longer, statuses=(500,) * 100).running() as endpoint:
        window = [*more, "evaluate.judge.max_model_len=512", "evaluate.judge.max_retries=0"]
        with pytest.raises(UserError, match="injected fault 500"):
            judge(with_judge(golden_run, run_dir, endpoint, *window))

    options = [*golden_run.options, f"run_dir={run_dir}", f"ray.address={ray_address}", *more]
    with joined_cluster():
        assert run.main([*options, "evaluate.judge.max_model_len=64"]) == 2
    assert "do not fit the judge's window: expected at most 48 prompt tokens" in capsys.readouterr().err
    with joined_cluster():
        assert run.main([*options, "evaluate.judge.max_model_len=512"]) == 2
    said = capsys.readouterr()
    assert not has_traceback(said.err)
    assert f"round 0  pairwise by {tiny_model}" in said.err
    assert f"of {2 * PAIRS} judgements name no verdict that can be read" in said.err
    rows = read_directory(run_dir / "rounds/000/judge/pairwise")
    assert len({row["judgement_id"] for row in rows}) == len(rows) == 2 * PAIRS
    assert all(row["tokens"] > 0 and row["finish_reason"] in ("stop", "length") for row in rows)


def test_a_server_that_never_answers_is_given_up(golden_run, run_dir: Path) -> None:
    with FakeJudgeEndpoint(longer, statuses=(-1,) * 100).running() as endpoint:
        more = ["evaluate.judge.timeout_seconds=1", "evaluate.judge.max_retries=0"]
        with pytest.raises(UserError, match="no answer within 1 seconds"):
            judge(with_judge(golden_run, run_dir, endpoint, *more))


def test_a_judge_that_cannot_be_reached_is_told_before_anything_starts(golden_run, run_dir: Path, monkeypatch) -> None:
    with FakeJudgeEndpoint(longer, key=JUDGE_KEY).running() as endpoint:
        config = with_judge(golden_run, run_dir, endpoint)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-another-key")
        with pytest.raises(UserError, match="refuses the key in the environment variable OPENAI_API_KEY") as error:
            reach_judge(config.evaluate.judge)
        assert "sk-another-key" not in str(error.value)
        monkeypatch.setenv("OPENAI_API_KEY", JUDGE_KEY)
        reach_judge(config.evaluate.judge)
        other = with_judge(golden_run, run_dir, endpoint, "evaluate.judge.model=nobody").evaluate.judge
        with pytest.raises(UserError, match="serves fake-judge; found 'nobody'"):
            reach_judge(other)
    with pytest.raises(UserError, match=r"evaluate\.judge\.endpoint http://127.*cannot be reached"):
        reach_judge(config.evaluate.judge)


def test_prompts_that_changed_since_they_were_answered_are_refused(golden_run, run_dir: Path, tmp_path: Path) -> None:
    rows = (golden_run.data / "held_out.jsonl").read_text()
    (tmp_path / "held_out.jsonl").write_text(rows.replace("about tea", "about coffee"))
    with FakeJudgeEndpoint(longer).running() as endpoint:
        more = f"evaluate.prompts.path={tmp_path}/held_out.jsonl"
        expected = "prompt 'held-out-4': expected what the policies answered, found other text"
        with pytest.raises(UserError, match=expected):
            judge(with_judge(golden_run, run_dir, endpoint, more))
        assert not endpoint.judged


def test_answers_made_again_are_not_taken_for_judged(golden_run, run_dir: Path) -> None:
    with FakeJudgeEndpoint(longer).running() as endpoint:
        config = with_judge(golden_run, run_dir, endpoint)
        judge(config)
        edit_manifest(
            run_dir / "rounds/000/evaluate/manifest.json", lambda values: values.update(finished="2031-01-01T00:00:00Z")
        )
        with pytest.raises(StorageError, match=r"answers: .*2031-01-01"):
            judge(config)
