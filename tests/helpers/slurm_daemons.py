"""Slurm's own daemons on this machine: a controller and two nodes, as Debian's packages slurmctld and slurmd have them.

Without authentication and cgroups, which a cluster has: for tests alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scancel", "squeue", "scontrol", "sinfo")
NODES = ("n1", "n2")
CPUS = 6


def missing() -> str:
    """Why Slurm cannot be started here; empty where it can."""
    names = [name for name in PROGRAMS if shutil.which(name) is None]
    if names:
        return f"no {', '.join(names)} (Debian: slurmctld, slurmd)"
    return "" if os.geteuid() == 0 else "slurmd needs root"


@contextlib.contextmanager
def slurm_daemons(place: Path) -> Iterator[dict[str, str]]:
    """The daemons, below `place`; yields the environment in which Slurm's commands reach them."""
    host, ports = socket.gethostname().split(".")[0], _free_ports(1 + len(NODES))
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={ports[0]}",
        "SlurmUser=root",
        "AuthType=auth/none",
        "CredType=cred/none",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "MpiDefault=none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        f"StateSaveLocation={place}/state",
        f"SlurmdSpoolDir={place}/spool-%n",
        f"SlurmctldPidFile={place}/slurmctld.pid",
        f"SlurmdPidFile={place}/slurmd-%n.pid",
        "SlurmdParameters=config_overrides",
        "ReturnToService=2",
        "JobCompType=jobcomp/none",
        "AccountingStorageType=accounting_storage/none",
    ]
    for name, port in zip(NODES, ports[1:], strict=True):
        lines.append(f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} State=UNKNOWN")
        (place / f"spool-{name}").mkdir()
    lines.append("PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
    (place / "state").mkdir()
    configuration = place / "slurm.conf"
    configuration.write_text("\n".join(lines) + "\n")
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    commands = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", name] for name in NODES)]
    daemons = []
    try:
        for command in commands:
            with (place / f"{'-'.join(command)}.log").open("w") as log:
                daemons.append(subprocess.Popen([*command, "-f", configuration], stdout=log, stderr=log))
        _wait_for_nodes(environment)
        yield environment
    finally:
        _end_jobs(environment)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=60)


def _end_jobs(environment: dict[str, str]) -> None:
    """Ends what still runs: without the daemons nobody would."""
    subprocess.run(["scancel", "--user=root"], env=environment)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if not subprocess.run(["squeue", "--noheader"], env=environment, capture_output=True).stdout:
            return
        time.sleep(1)


def _wait_for_nodes(environment: dict[str, str]) -> None:
    deadline, states = time.monotonic() + 60, ""
    while states.split() != ["idle"] * len(NODES):
        if time.monotonic() > deadline:
            raise TimeoutError(f"Slurm's nodes are not ready: {states}")
        time.sleep(1)
        command = ["sinfo", "--Node", "--noheader", "--format=%T"]
        states = subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_sockets:
        probes = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
