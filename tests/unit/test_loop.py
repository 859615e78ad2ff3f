"""The order of a run's stages, where an evaluation goes on beside the next round's generation and where not, and what
ends both; stages are fakes.

python -m pytest tests/unit/test_loop.py
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mipo_ray import loop
from mipo_ray.config.recipe import load_config
from mipo_ray.planning.schedule import Overlap, Schedule
from mipo_ray.ray_cluster.resources import resolve
from mipo_ray.session import Session
from mipo_ray.stop_signals import StopSignals, kept_handlers
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import open_run

# Longer than anything here takes: a wait that comes to its end is a failure.
LONG_SECONDS = 30.0
Act = Callable[[Round], None]


class FakeRun:
    """A run of two rounds whose stages note that they begin and end, and do in between what `acts` says of them."""

    def __init__(self, patch: pytest.MonkeyPatch, directory: Any, *, overlaps: bool, streams: bool) -> None:
        config = load_config(None, ["rounds=2"])
        run = open_run(str(directory / "run"))
        self.session = Session(config, run, resolve(config, {"CPU": 6}), events=None)  # type: ignore[arg-type]
        self.plan: Any = SimpleNamespace(
            config=config,
            run=run,
            rounds=self.session.rounds,
            prompts="prompts",
            sampled="prompts",
            held_out="held-out",
            tasks=(),
            overlap=Overlap(overlaps, "test"),
            schedule=Schedule(streams, "test"),
        )
        self.acts: dict[str, Act] = {}
        self.noted: list[str] = []
        self.shared: list[bool] = []
        self._lock = threading.Lock()
        patch.setattr(loop, "session_of", self._session_of)
        patch.setattr(loop, "refuse_what_cannot_run", lambda plan, session: None)
        patch.setattr(loop, "condition_unfinished", self._condition)
        patch.setattr(loop, "evaluate", self._evaluate)
        patch.setattr(loop, "generate", lambda session, round, prompts: self._stage("generate", round))
        patch.setattr(loop, "train", self._train)
        patch.setattr(loop, "write_report", lambda config, run: None)
        patch.setattr(loop, "closing_text", lambda run, full: "")
        patch.setattr(loop, "read_results", lambda run: {})

    def note(self, what: str) -> None:
        with self._lock:
            self.noted.append(what)

    def place(self, what: str) -> int:
        return self.noted.index(what)

    def come(self) -> None:
        """The run, to its end."""
        loop.run_rounds(self.plan)

    @contextlib.contextmanager
    def _session_of(self, plan: Any) -> Iterator[Session]:
        yield self.session

    def _condition(self, session: Session, round: Round, prompts: Any) -> bool:
        self.note(f"condition {round.key}")
        return True

    def _evaluate(self, session: Session, round: Round, held_out: Any, tasks: Any) -> None:
        self.shared.append(session.shares_engines)
        self._stage("evaluate", round)

    def _train(self, session: Session, round: Round, generated: Any = None) -> None:
        self.streamed = generated is not None
        self._stage("train", round)

    def _stage(self, name: str, round: Round) -> None:
        self.note(f"{name} {round.key} begins")
        self.acts.get(name, lambda round: None)(round)
        self.note(f"{name} {round.key} ends")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Callable[..., FakeRun]:
    return lambda **how: FakeRun(monkeypatch, tmp_path, **{"overlaps": True, "streams": False, **how})


def test_without_overlap_each_stage_waits_for_the_one_before(fake) -> None:
    run = fake(overlaps=False)
    run.come()
    stages = ["evaluate base", "generate 0", "train 0", "evaluate 0", "generate 1", "train 1", "evaluate 1"]
    assert run.noted == [f"{stage} {moment}" for stage in stages for moment in ("begins", "ends")]
    assert run.shared == [False, False, False]


@pytest.mark.parametrize("streams", [False, True])
def test_a_policy_is_measured_and_sampled_from_at_once_and_trained_on_after_that(fake, streams) -> None:
    """Each of the two waits for the other to have begun; the last policy has nobody beside it."""
    run = fake(streams=streams)
    meet = threading.Barrier(2)

    def together(round: Round) -> None:
        if "train 1 ends" not in run.noted:
            meet.wait(LONG_SECONDS)

    run.acts |= {"evaluate": together, "generate": together}
    run.come()
    for number, before in ((0, "base"), (1, "0")):
        assert run.place(f"condition {number}") < run.place(f"evaluate {before} begins")
        assert run.place(f"evaluate {before} ends") < run.place(f"train {number} begins")
        if not streams:
            assert run.place(f"generate {number} ends") < run.place(f"train {number} begins")
    # The next policy's weights are asked for by these two alone: neither begins before the policy is there.
    assert run.place("train 0 ends") < min(run.place("evaluate 0 begins"), run.place("generate 1 begins"))
    assert run.noted[-2:] == ["evaluate 1 begins", "evaluate 1 ends"]
    assert run.streamed == streams
    assert run.shared == [True, True, False]


@pytest.mark.parametrize("last", ["evaluate", "generate"])
def test_engines_take_the_next_policy_when_both_have_ended(fake, last) -> None:
    """Whichever of the two is the slower one."""
    run = fake()
    first = {"evaluate": "generate", "generate": "evaluate"}[last]
    ended = [threading.Event(), threading.Event()]  # of the faster one, by the round that is under way

    def number(stage: str, round: Round) -> int:
        return round.number + (stage == "evaluate")

    def wait_for_first(round: Round) -> None:
        if number(last, round) < len(ended):  # the last policy has nobody beside it
            assert ended[number(last, round)].wait(LONG_SECONDS)

    def end(round: Round) -> None:
        if number(first, round) < len(ended):
            ended[number(first, round)].set()

    run.acts |= {last: wait_for_first, first: end}
    run.come()
    for index, before in ((0, "base"), (1, "0")):
        trained = run.place(f"train {index} begins")
        assert max(run.place(f"evaluate {before} ends"), run.place(f"generate {index} ends")) < trained


def test_training_that_streams_begins_while_pairs_are_generated_and_not_before_the_evaluation_has_ended(fake) -> None:
    run = fake(streams=True)
    trained = threading.Event()

    def wait(round: Round) -> None:
        assert trained.wait(LONG_SECONDS)
        trained.clear()

    run.acts["generate"] = wait
    run.acts["train"] = lambda round: trained.set()
    run.come()
    assert run.place("evaluate base ends") < run.place("train 0 begins") < run.place("generate 0 ends")
    assert run.place("evaluate 0 ends") < run.place("train 1 begins") < run.place("generate 1 ends")


@pytest.mark.parametrize(("fails", "goes_on"), [("evaluate", "generate"), ("generate", "evaluate")])
@pytest.mark.parametrize("streams", [False, True])
def test_what_fails_ends_the_other_one_and_its_error_is_the_runs(fake, monkeypatch, fails, goes_on, streams) -> None:
    """The other one is in the midst of a Ray Data execution, which is told to stop; nothing comes after it."""
    run = fake(streams=streams)
    begun = threading.Event()

    def fail(round: Round) -> None:
        assert begun.wait(LONG_SECONDS)
        raise ValueError(f"{fails} of {round.key}")

    run.acts |= {fails: fail, goes_on: lambda round: until_stopped(begun)}
    with pytest.raises(ValueError, match=f"^{fails} of "):
        run.come()
    assert not [what for what in run.noted if what.startswith("train") or what.endswith("ends")]


def test_an_evaluation_that_fails_late_ends_the_run_before_training(fake) -> None:
    """The pairs are generated by then, and stay."""
    run = fake()
    generated = threading.Event()
    run.acts["generate"] = lambda round: generated.set()

    def fail(round: Round) -> None:
        assert generated.wait(LONG_SECONDS)
        while "generate 0 ends" not in run.noted:
            time.sleep(0.01)
        raise ValueError("a late verdict")

    run.acts["evaluate"] = fail
    with pytest.raises(ValueError, match=r"^a late verdict$"):
        run.come()
    assert run.noted[-1] == "generate 0 ends"


def test_a_stop_signal_ends_both(fake) -> None:
    run = fake()
    begun = [threading.Event(), threading.Event()]
    run.acts |= {
        "evaluate": lambda round: until_stopped(begun[0]),
        "generate": lambda round: until_stopped(begun[1]),
    }

    def stop() -> None:
        for event in begun:
            event.wait(LONG_SECONDS)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    with kept_handlers():
        StopSignals().listen()
        threading.Thread(target=stop).start()
        with pytest.raises(KeyboardInterrupt):
            run.come()
    assert not [what for what in run.noted if what.startswith("train") or what.endswith("ends")]


def until_stopped(begun: threading.Event) -> None:
    """As a Ray Data execution does it: it calls, at each of its steps, what its context has for it."""
    from ray.data import DataContext

    callbacks = [make() for make in DataContext.get_current().custom_execution_callback_classes]
    begun.set()
    for _ in range(round(LONG_SECONDS / 0.01)):
        for callback in callbacks:
            callback.on_execution_step(None)
        time.sleep(0.01)
    raise AssertionError("nobody stopped it")
