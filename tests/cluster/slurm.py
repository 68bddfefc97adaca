"""A Slurm on the hosts of a cluster: the controller on the first host, every host a node.

All of it is under the cluster's folder and in the hosts' own ``/run``: a Slurm of the machine outside is not touched.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.hosts import Cluster
from tests.ranks import REPO

TOOLS = ("munged=munge", "slurmctld=slurmctld", "slurmd=slurmd", "sbatch=slurm-client", "srun=slurm-client")
"""What a Slurm needs besides the hosts, for :func:`tests.cluster.hosts.reason_to_skip`."""

GPUS = 8
"""Of each node, in Slurm's books: files that no program can compute with."""

CONFIG = """
ClusterName=tests
SlurmctldHost={controller}
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
KillWait=5
SlurmdTimeout=20
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%h.log
GresTypes=gpu
NodeName={nodes} CPUs={cpus} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class BatchResult:
    """How a batch job ended: Slurm's state, the exit code of its script, and what it printed."""

    state: str
    returncode: int
    output: str

    def check(self) -> BatchResult:
        assert self.state == "COMPLETED", f"{self.state}, exit code {self.returncode}\n{self.output[-6000:]}"
        return self


class Slurm:
    """Starts with its creation, ends with the cluster."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self.folder = cluster.folder / "slurm"
        self.controller = cluster.hosts[0]
        self._num_jobs = 0
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        cpus = max(GPUS, len(os.sched_getaffinity(0)))  # a task a GPU must fit on a node
        (self.folder / "cgroup.conf").write_text("ConstrainCores=no\n")
        config = self.folder / "slurm.conf"
        nodes = ",".join(host.name for host in cluster.hosts)
        names = {"controller": self.controller.name, "folder": self.folder, "nodes": nodes, "cpus": cpus, "gpus": GPUS}
        config.write_text(CONFIG.format_map(names))
        for number in range(GPUS):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")
        cluster.environ["SLURM_CONF"] = str(config)
        for host in cluster.hosts:
            log = f"--log-file={self.folder}/munged.{host.name}.log"
            host.run(["mkdir", "--mode=755", "/run/munge"]).check()
            host.run(["munged", "--force", f"--key-file={key}", "--seed-file=/run/munge/seed", log]).check()
            if host is self.controller:
                host.run(["slurmctld", "-f", str(config)]).check()
            host.run(["slurmd", "-f", str(config)]).check()
        self._wait_for_nodes()

    def submit(self, script: str, *options: str, timeout: float) -> BatchResult:
        """Run the lines of ``script`` as a batch job, from the checkout's folder, and wait for its end.

        Args:
            script: lines of a shell script.
            options: of ``sbatch``.
            timeout: seconds until the job is cancelled.

        Raises:
            AssertionError: after ``timeout`` seconds, with what the job has printed.
        """
        self._num_jobs += 1
        path, log = (self.folder / f"job{self._num_jobs}.{kind}" for kind in ("sh", "log"))
        path.write_text(f"#!/bin/sh\n{script}\n")
        argv = ["sbatch", "--parsable", f"--chdir={REPO}", f"--output={log}", *options, str(path)]
        job = self.controller.run(argv).check().output.strip()
        deadline = time.monotonic() + timeout
        while (state := self._job(job))[0] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            if time.monotonic() > deadline:
                self.controller.run(["scancel", job])
                raise AssertionError(f"job is {state[0]} after {timeout:.0f} s\n{_tail(log)}\n{self._logs()}")
            time.sleep(0.3)
        return BatchResult(*state, log.read_text(errors="replace"))

    def queue(
        self, script: str, *arguments: str, options: tuple[str, ...], log: Path, env: Mapping[str, str] | None = None
    ) -> str:
        """Submit a script of the checkout, and return the job's number at once."""
        argv = ["sbatch", "--parsable", f"--chdir={REPO}", f"--output={log}", *options, script, *arguments]
        return self.controller.run(argv, env).check().output.strip()

    def state(self, job: str) -> str:
        """Slurm's word for where a job is: PENDING, RUNNING, COMPLETED and so on."""
        return self._job(job)[0]

    def start_again(self, job: str) -> None:
        """Let a job that was queued again begin now. It would wait for two minutes.

        The hosts still refuse credentials that were made in the second in which the last start was revoked, and Slurm
        then holds the job for good.
        """
        time.sleep(2)
        self.controller.run(["scontrol", "update", f"JobId={job}", "StartTime=now"]).check()

    def wait_for(self, what: Callable[[], bool], job: str, log: Path, seconds: float) -> None:
        """Wait until something is true.

        Raises:
            AssertionError: after ``seconds``, with what Slurm and the job have to say.
        """
        deadline = time.monotonic() + seconds
        while not what():
            if time.monotonic() > deadline:
                shown = self.controller.run(["scontrol", "show", "job", job]).output
                raise AssertionError(f"not after {seconds:.0f} s\n{shown}\n{_tail(log)}\n{self._logs()}")
            time.sleep(0.2)

    def _job(self, job: str) -> tuple[str, int]:
        shown = self.controller.run(["scontrol", "--oneliner", "show", "job", job]).check().output
        found = re.search(r"\bJobState=(\w+) .*\bExitCode=(\d+):", shown)
        assert found, shown
        return found[1], int(found[2])

    def _wait_for_nodes(self, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        while (answer := self.controller.run(idle).output.strip()) != str(len(self.cluster.hosts)):
            if time.monotonic() > deadline:
                raise RuntimeError(f"idle nodes after {seconds:.0f} s: {answer!r}\n{self._logs()}")
            time.sleep(0.1)

    def _logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{_tail(path, 1500)}" for path in sorted(self.folder.glob("*.log")))


def _tail(path: Path, characters: int = 4000) -> str:
    return path.read_text(errors="replace")[-characters:] if path.exists() else ""
