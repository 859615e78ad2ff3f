"""Stand-ins for Slurm and Ray, to run cluster/slurm/run.sbatch without either. Fakes: they note how they were called.

A fake `srun` stays until it is stopped, as `ray start --block` does; a fake `python` says how many nodes joined, and is
the driver. Nothing of Slurm's own behaviour is in them.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm" / "run.sbatch"

_SRUN = """#!/bin/bash
trap 'echo "srun stopped" >>"$FAKE_LOG"; exit 0' TERM
echo "srun $*" >>"$FAKE_LOG"
echo "token of srun $RAY_AUTH_TOKEN ${RAY_ADDRESS:-no address}" >>"$FAKE_LOG"
[ "${FAKE_RAY:-}" != dies ] || exit 1
for _ in {1..600}; do sleep 0.05; done # not for ever, where nobody stops it
"""
_PYTHON = """#!/bin/bash
if [ "$1" = -c ]; then
    # Nodes join after they were started, on a busy machine too.
    touch "$FAKE_LOG"
    for _ in {1..400}; do
        [ "$(grep --count "token of srun" "$FAKE_LOG")" -lt "$FAKE_STEPS" ] || break
        sleep 0.05
    done
    echo "$FAKE_JOINED"
    exit 0
fi
echo "python $*" >>"$FAKE_LOG"
echo "token of driver $RAY_AUTH_TOKEN $RAY_ADDRESS" >>"$FAKE_LOG"
if [ "${FAKE_DRIVER:-}" = stays ]; then
    trap 'sleep 0.3; echo "driver stopped" >>"$FAKE_LOG"; exit 143' TERM
    echo "driver listens" >>"$FAKE_LOG"
    for _ in {1..600}; do sleep 0.05; done
fi
exit "${FAKE_CODE:-0}"
"""


@dataclass(frozen=True)
class FakeSlurm:
    """A job of so many nodes, on fakes in `place`."""

    place: Path
    nodes: int = 3
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> str:
        """What the fakes noted so far."""
        file = self.place / "log"
        return file.read_text() if file.exists() else ""

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The batch script, as Slurm would call it on the job's first node."""
        folder = self.place / ".venv" / "bin"
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in {"srun": _SRUN, "python": _PYTHON, "ray": "#!/bin/bash\n"}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        job = {
            "SLURM_JOB_ID": "123456",
            "SLURM_SUBMIT_DIR": str(self.place),
            "SLURM_JOB_NUM_NODES": str(self.nodes),
            "SLURM_CPUS_ON_NODE": "16",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURMD_NODENAME": "node-a",
            "MIPO_RAY_HEAD_ADDRESS": "10.0.0.1",
            "FAKE_LOG": str(self.place / "log"),
            "FAKE_JOINED": str(self.nodes),
            "FAKE_STEPS": "1" if self.nodes == 1 else "2",
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env={"PATH": os.environ["PATH"], **job, **self.variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        """Its exit code and output."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output
