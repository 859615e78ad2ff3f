"""The rounds of a run that the guard watches: the loop itself, with stand-ins for sampling, training and measuring.

python -m pytest tests/unit/test_guarded_rounds.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mipo_ray import loop
from mipo_ray.config.recipe import load_config
from mipo_ray.evaluation.summary import closing_text, closing_values
from mipo_ray.planning.plan import Plan, check_inputs, make_plan
from mipo_ray.ray_cluster.resources import Node
from mipo_ray.run import main
from mipo_ray.session import Session
from mipo_ray.storage.configuration import record_config
from mipo_ray.storage.manifests import EvaluateFacts, GenerateFacts, GuardFacts, TrainFacts
from mipo_ray.storage.results import write_results
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory, open_run
from tests.helpers.chat_runs import make_chat_run
from tests.helpers.guard_figures import entries
from tests.helpers.stages import commit

LEARNING_RATE = 8e-6
BAD = {"self_bleu": 0.9}


@dataclass
class FakeEvents:
    """Keeps what the loop sends; stands for the writer, which is an actor."""

    sent: list[dict[str, Any]] = field(default_factory=list)

    def at(self, round: Round, stage: str) -> FakeEvents:
        return self

    def emit(self, event: dict[str, Any]) -> None:
        self.sent.append(event)

    def flush(self) -> None:
        pass


@dataclass
class FakeStages:
    """The stages of a run, each of which only notes in its manifest what it was given.

    figures: of each round in order, those that differ from the base's. done: the stages that were not finished before.
    dies_after: the stage at whose end the process is killed.
    """

    figures: Sequence[dict[str, float]]
    done: list[str] = field(default_factory=list)
    dies_after: str = ""
    events: FakeEvents = field(default_factory=FakeEvents)

    def generate(self, session: Session, round: Round, prompts: object) -> None:
        self._do(session, round, "generate", policy=session.policy(session.start(round)))

    def train(self, session: Session, round: Round) -> None:
        self._do(session, round, "train", learning_rate=session.learning_rate(round))

    def evaluate(self, session: Session, round: Round, held_out: object, tasks: object) -> None:
        changed = {} if round.is_base else self.figures[round.number]
        self._do(session, round, "evaluate", results=entries(**changed))
        write_results(session.run, session.config.rounds)

    def write_report(self, config: object, run: RunDirectory) -> None:
        run.write_text("report.html", "")
        self._end("report")

    def _do(self, session: Session, round: Round, name: str, **facts: Any) -> None:
        directory = session.run.stage(round, name)
        if not session.run.is_finished(directory):
            commit(session.run, directory, session.config, **facts)
            self.done.append(directory)
        self._end(directory)

    def _end(self, what: str) -> None:
        if what == self.dies_after:
            raise Killed

    @contextmanager
    def session_of(self, plan: Plan) -> Iterator[Session]:
        yield Session(plan.config, plan.run, plan.resources, self.events)  # type: ignore[arg-type]


class Killed(Exception):
    """The process ended there."""


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Arguments of a run of five rounds that passes every check."""
    make_chat_run(tmp_path, 0)  # for its model
    for name in ("train", "held_out"):
        rows = [{"prompt": f"{name} {index}", "context": f"I am {name} {index}."} for index in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "defaults.yaml").write_text("")
    return [
        f"{tmp_path}/defaults.yaml",
        f"run_dir={tmp_path}/guarded",
        f"model.path={tmp_path}/model",
        f"prompts.path={tmp_path}/train.jsonl",
        f"evaluate.prompts.path={tmp_path}/held_out.jsonl",
        "rounds=5",
        f"train.learning_rate={LEARNING_RATE}",
    ]


Run = Callable[..., RunDirectory]


@pytest.fixture
def run_rounds(options: list[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the loop with stand-ins; gives the run directory."""

    def run(stages: FakeStages, *overrides: str) -> RunDirectory:
        for name in ("generate", "train", "evaluate", "write_report", "session_of"):
            monkeypatch.setattr(loop, name, getattr(stages, name))
        monkeypatch.setattr(loop, "refuse_what_cannot_run", lambda plan, session: None)
        plan = plan_of([*options, *overrides])
        record_config(plan.run, plan.config)
        loop.run_rounds(plan)
        return plan.run

    return run


def plan_of(options: list[str]) -> Plan:
    config = load_config(options[0], options[1:])
    return make_plan(check_inputs(config, open_run(config.run_dir)), [Node({"CPU": 6.0})])


def starts(run: RunDirectory) -> list[str]:
    """After which round the policy stood that each round sampled from."""
    found = []
    for number in range(5):
        manifest = run.read_manifest(f"rounds/{number:03d}/generate", GenerateFacts)
        if manifest is not None:
            place = Path(str(manifest.facts.policy)).parts
            found.append(place[place.index("rounds") + 1] if "rounds" in place else "base")
    return found


def learning_rates(run: RunDirectory) -> list[float | None]:
    manifests = [run.read_manifest(f"rounds/{number:03d}/train", TrainFacts) for number in range(5)]
    return [manifest.facts.learning_rate for manifest in manifests if manifest is not None]


def verdicts_of(run: RunDirectory) -> list[int]:
    """How many bounds each round was found to have broken."""
    manifests = [run.read_manifest(f"rounds/{number:03d}/guard", GuardFacts) for number in range(5)]
    return [len(manifest.facts.broken) for manifest in manifests if manifest is not None]


def test_without_a_guard_nothing_is_compared_and_every_round_follows_the_one_before(run_rounds: Run) -> None:
    stages = FakeStages([{}, BAD, {}, {}, {}])
    run = run_rounds(stages)
    assert starts(run) == ["base", "000", "001", "002", "003"]
    assert learning_rates(run) == [LEARNING_RATE] * 5
    assert verdicts_of(run) == []
    assert stages.events.sent == []


def test_a_bad_round_ends_the_run_which_comes_to_the_last_good_policy(
    run_rounds: Run, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    stages = FakeStages([{"context_pmi_initial": 20.0}, {"context_pmi_initial": 19.0, **BAD}, {}, {}, {}])
    run = run_rounds(stages, "guard.when_bad=stop")
    assert starts(run) == ["base", "000"]
    assert verdicts_of(run) == [0, 1]
    said = capsys.readouterr().out
    why = "self-BLEU 0.900, expected at most 0.300 (the base has 0.100)"
    assert "round 0  guard     good: keeps all 9 bounds\n" in said
    assert f"round 1  guard     bad, not promoted: {why}\n" in said
    assert stages.events.sent == [
        {"event": "guard", "broken_bounds": 0, "text": ""},
        {"event": "guard", "broken_bounds": 1, "text": why},
    ]
    # What is said of the run is said of the policy that it comes to, and the bad one's figures are kept.
    end = closing_text(run, full=False).splitlines()
    assert end[0].split()[:5] == ["context", "PMI", "16.00", "->", "20.00"]
    assert end[-3:-1] == [f"round 1 was found bad and is not promoted: {why}", "the run's policy is that of round 0"]
    assert "after round 0" in end[-1]
    assert closing_values(run)[0]["value"] == 20.0
    assert json.loads(str(run.read_text("results.json")))["1"]["self_bleu"]["value"] == 0.9

    # The same command again.
    assert main([*options, "guard.when_bad=stop", "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["text"] == f"{run.url}: finished before, nothing to do"
    assert (last["policy"], last["bad_rounds"]) == ("0", {"1": why})


def test_a_first_round_that_is_bad_leaves_the_initial_model(run_rounds: Run) -> None:
    run = run_rounds(FakeStages([BAD]), "guard.when_bad=stop")
    assert closing_text(run, full=False).splitlines()[-2] == "the run's policy is the initial model"


def test_rounds_go_on_from_the_last_good_policy_with_half_the_rate_for_each_bad_one(run_rounds: Run) -> None:
    run = run_rounds(FakeStages([{}, BAD, BAD, {}, BAD]), "guard.when_bad=halve_learning_rate")
    assert starts(run) == ["base", "000", "000", "000", "003"]
    assert learning_rates(run) == [LEARNING_RATE * factor for factor in (1, 1, 0.5, 0.25, 0.25)]
    assert verdicts_of(run) == [0, 1, 1, 0, 1]
    assert "the run's policy is that of round 3" in closing_text(run, full=False)


def test_the_best_round_counts_and_a_bad_one_is_never_the_best(run_rounds: Run) -> None:
    """Round 0 has the best primary figure of the good ones, in an interval from 17 to 23; round 1 has a better one."""
    figures = [{"context_pmi_initial": value} for value in (20.0, 90.0, 16.9, 17.0, 18.0)]
    figures[1] |= BAD
    run = run_rounds(FakeStages(figures), "guard.when_bad=halve_learning_rate")
    assert verdicts_of(run) == [0, 1, 1, 0, 0]
    manifest = run.read_manifest("rounds/002/guard", GuardFacts)
    assert manifest is not None
    (one,) = manifest.facts.broken
    assert (one.bound, one.against, one.theirs) == (17.0, "0", 20.0)


@pytest.mark.parametrize(
    "when", ["rounds/001/evaluate", "report", "rounds/002/generate", "rounds/002/train", "rounds/002/evaluate"]
)
def test_a_run_that_was_killed_comes_to_the_same_policies(run_rounds: Run, options: list[str], when: str) -> None:
    figures: list[dict[str, float]] = [{}, BAD, {}, {}, {}]
    overrides = "guard.when_bad=halve_learning_rate"
    with pytest.raises(Killed):
        run_rounds(FakeStages(figures, dies_after=when), overrides)
    assert not plan_of([*options, overrides]).is_finished
    run = run_rounds(FakeStages(figures), overrides)
    assert starts(run) == ["base", "000", "000", "002", "003"]
    assert learning_rates(run) == [LEARNING_RATE * factor for factor in (1, 1, 0.5, 0.5, 0.5)]
    assert verdicts_of(run) == [0, 1, 0, 0, 0]


def test_a_kill_between_the_last_measurement_and_its_verdict_leaves_work(run_rounds: Run, options: list[str]) -> None:
    stop = [*options, "rounds=1", "guard.when_bad=stop"]
    with pytest.raises(Killed):
        run_rounds(FakeStages([BAD], dies_after="rounds/000/evaluate"), *stop[-2:])
    assert not plan_of(stop).is_finished
    again = FakeStages([BAD])
    run = run_rounds(again, *stop[-2:])
    assert again.done == []
    assert verdicts_of(run) == [1]
    assert plan_of(stop).is_finished


def test_a_verdict_that_the_report_does_not_tell_is_work_to_do(run_rounds: Run, options: list[str]) -> None:
    """A kill after the verdict on a run that was finished without a guard before."""
    run = run_rounds(FakeStages([{}]), "rounds=1")
    config = load_config(options[0], options[1:])
    commit(run, "rounds/000/guard", config)
    guarded = [*options, "rounds=1", "guard.when_bad=stop"]
    for seconds, is_finished in ((-60, False), (60, True)):
        written = Path(run.path("rounds/000/guard/manifest.json")).stat().st_mtime + seconds
        for name in ("results.json", "report.html"):
            os.utime(run.path(name), (written, written))
        assert plan_of(guarded).is_finished == is_finished


def test_a_verdict_stands_whatever_the_bounds_are_later(run_rounds: Run, options: list[str]) -> None:
    run = run_rounds(FakeStages([{}, BAD, {}, {}, {}]), "guard.when_bad=stop")
    wide = ["guard.when_bad=stop", "guard.bounds.self_bleu.max_rise=1"]
    assert plan_of([*options, *wide]).is_finished
    # It is judged anew where it is taken away.
    run.remove("rounds/001/guard")
    run_rounds(FakeStages([{}, BAD, {}, {}, {}]), *wide)
    assert starts(run) == ["base", "000", "001", "002", "003"]


def test_a_run_that_was_stopped_goes_on_where_it_is_told_to(run_rounds: Run) -> None:
    run = run_rounds(FakeStages([{}, BAD, {}, {}, {}]), "guard.when_bad=stop")
    later = FakeStages([{}, BAD, {}, {}, {}])
    run_rounds(later, "guard.when_bad=halve_learning_rate")
    assert starts(run) == ["base", "000", "000", "002", "003"]
    assert not [stage for stage in later.done if stage.startswith(("base", "rounds/000", "rounds/001"))]


def test_rounds_that_another_has_started_from_are_not_compared_later(run_rounds: Run, options: list[str]) -> None:
    """A guard that comes when two rounds are done looks at the second, from which nothing has started yet."""
    figures: list[dict[str, float]] = [BAD, {}, BAD, {}, {}]
    run = run_rounds(FakeStages(figures), "rounds=2")
    assert plan_of([*options, "rounds=2"]).is_finished
    assert not plan_of([*options, "rounds=2", "guard.when_bad=stop"]).is_finished
    run_rounds(FakeStages(figures), "guard.when_bad=halve_learning_rate")
    assert run.read_manifest("rounds/000/guard", GuardFacts) is None
    assert verdicts_of(run) == [0, 1, 0, 0]
    assert starts(run) == ["base", "000", "001", "001", "003"]


def test_a_bound_that_the_base_cannot_have_ends_the_run_before_its_first_round(run_rounds: Run) -> None:
    stages = FakeStages([{}])
    with pytest.raises(Exception, match=r"guard\.bounds: reward_margin: expected measures that the held-out prompts"):
        run_rounds(stages, "guard.when_bad=stop", "guard.bounds.reward_margin.max_fall=1")
    assert stages.done == ["base/evaluate"]


def test_the_stages_of_a_stopped_run_are_those_up_to_the_bad_round(run_rounds: Run, options: list[str]) -> None:
    run = run_rounds(FakeStages([BAD]), "guard.when_bad=stop")
    plan = plan_of([*options, "guard.when_bad=stop"])
    names = ["base/evaluate", *(f"rounds/000/{name}" for name in ("generate", "train", "evaluate"))]
    assert plan.stages == names
    assert plan.rounds == [Round(0)]
    assert run.read_manifest(run.stage(BASE, "evaluate"), EvaluateFacts) is not None
    assert len(plan_of(options).rounds) == 5  # without the guard there is more to do
