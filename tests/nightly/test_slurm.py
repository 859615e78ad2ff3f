"""cluster/slurm/run.sbatch under Slurm's own daemons: a real run of the tiny model on two nodes, stopped and resumed.

Both nodes are this machine. Skipped where Debian's packages slurmctld and slurmd are not installed. 4 minutes on two
busy cores.

python -m pytest tests/nightly/test_slurm.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.runs import arguments, events, write_prompts
from tests.helpers.slurm_daemons import missing, slurm_daemons

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm" / "run.sbatch"
pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@dataclass(frozen=True)
class Slurm:
    """How to submit a job, and what it said."""

    environment: dict[str, str]
    place: Path

    def call(self, *words: str) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def submit(self, *words: str) -> str:
        """The job's number."""
        log = f"--output={self.place}/job-%j.log"
        return self.call("sbatch", "--parsable", "--nodes=2", log, str(SCRIPT), *words)

    def log(self, job: str) -> str:
        """What the job printed so far."""
        file = self.place / f"job-{job}.log"
        return file.read_text() if file.exists() else ""

    def wait(self, job: str, until: Callable[[], bool]) -> None:
        """Returns when something holds of a job that is still there, or the job ended."""
        deadline = time.monotonic() + 600
        while not until():
            assert time.monotonic() < deadline, self.log(job)
            time.sleep(0.2)

    def exit_code(self, job: str) -> int:
        """Of a job, once it has ended."""
        self.wait(job, lambda: "JobState=COMPLE" in self.shown(job) or "JobState=FAILED" in self.shown(job))
        return int(self.shown(job).split("ExitCode=")[1].split(":")[0])

    def shown(self, job: str) -> str:
        """What Slurm knows of it."""
        return self.call("scontrol", "show", "job", job)


@pytest.fixture
def slurm(test_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """Two nodes; jobs use the environment of the tests."""
    monkeypatch.setenv("MIPO_RAY_ENVIRONMENT", str(Path(sys.executable).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "slurm").mkdir()
    with slurm_daemons(tmp_path / "slurm") as environment:
        yield Slurm(environment, tmp_path)


def test_a_job_on_two_nodes_is_stopped_in_order_and_the_same_line_resumes_it(
    slurm: Slurm, tiny_model: Path, tmp_path: Path
) -> None:
    """Slurm's SIGTERM to the batch script, as before a time limit, ends the run with 143 in the middle of its stages;
    the next job finishes it, and a wrong recipe is the job's exit code 2."""
    write_prompts(tmp_path / "train.jsonl", "train", 32)
    (tmp_path / "recipe.yaml").write_text("rounds: 1\nevaluate: {enabled: false}\n")
    run = tmp_path / "run"
    words = arguments(run, tiny_model, tmp_path, "train.num_workers=2")
    first = slurm.submit(*words)
    slurm.wait(first, lambda: any(event["event"] == "generated" for event in events(run)))
    assert "Ray runs on 2 nodes with 6 CPUs and 0 GPUs each, head n1" in slurm.log(first)
    assert "the nodes have room for 12" in slurm.log(first)
    slurm.call("scancel", "--batch", "--signal=TERM", first)
    assert slurm.exit_code(first) == 143, slurm.log(first)
    assert "stopped by SIGTERM: the same command resumes this run" in slurm.log(first)

    second = slurm.submit(*words)
    assert slurm.exit_code(second) == 0, slurm.log(second)
    assert (run / "rounds/000/train/manifest.json").exists()
    assert "finished in " in slurm.log(second)
    wrong = slurm.submit(*words, "train.bata=1")
    assert slurm.exit_code(wrong) == 2
    assert "did you mean train.beta?" in slurm.log(wrong)
