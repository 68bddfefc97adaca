"""Several hosts on one machine, for tests of launchers and networks. Needs root and Linux.

A host is a process tree with its own network, host name, process table, mounts and shared memory; its first process is
its SSH server. The file system is shared, as on most clusters, except for ``/run`` and ``/dev/shm``. The hosts reach
each other by name (``n1``, ``n2``, ...) and nothing else: their network has no way out, and the machine that they run
on gets no link, address or mount. So any number of clusters can live side by side with the same names and addresses.

A cluster ends with its context. It also ends, by the kernel's hand, when the process that made it is killed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil

from tests.ranks import REPO

BIN = Path(sys.executable).parent
PATH = f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGE_OF_TOOL = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "pdsh": "pdsh",
    "pkill": "procps",
    "setpriv": "util-linux",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
    "unshare": "util-linux",
}
"""What the hosts and their launchers need, and the Debian package that has it."""

UNSHARE = ("unshare", "--fork", "--kill-child", "--pid", "--mount-proc", "--mount", "--uts", "--ipc", "--net")

SWITCH_PROBE = "ip link add probe0 type veth peer name probe1 && ip link add probe2 type bridge"

# Arguments: name of the host, folder of the cluster, path of sshd, root's home.
# The mounts exist in this host alone. The line on standard input comes when the network is there.
INIT = r"""
hostname "$1"
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir /run/sshd
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
mount --bind "$2/shadow" /etc/shadow
if [ -d "$4/.ssh" ]; then mount -t tmpfs -o mode=700 tmpfs "$4/.ssh"; fi
ip link set lo up
echo ready
read -r _
exec "$3" -D -f "$2/sshd_config" -E "$2/sshd.$1.log" >/dev/null 2>&1 </dev/null
"""


@functools.cache
def reason_to_skip(tools: tuple[str, ...] = ()) -> str:
    """Why hosts cannot be made here; empty when they can.

    Args:
        tools: ``tool=package`` pairs that are needed besides :data:`PACKAGE_OF_TOOL`.
    """
    if not sys.platform.startswith("linux"):
        return "needs Linux"
    if os.geteuid() != 0:
        return "needs root"
    needed = PACKAGE_OF_TOOL | dict(pair.split("=") for pair in tools)
    missing = sorted({package for tool, package in needed.items() if not shutil.which(tool, path=PATH)})
    if missing:
        return f"needs packages that are not installed: {' '.join(missing)}"
    probe = subprocess.run([*UNSHARE, "sh", "-c", SWITCH_PROBE], env={"PATH": PATH}, capture_output=True, text=True)
    if probe.returncode:
        return f"this root may not make namespaces and network links: {probe.stderr.strip() or probe.returncode}"
    return ""


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it printed (standard output and error together)."""

    returncode: int
    output: str

    def check(self) -> Result:
        assert self.returncode == 0, f"ended with {self.returncode}\n{self.output[-6000:]}"
        return self


class Command:
    """A command that runs on a host."""

    def __init__(self, what: str, argv: Sequence[str], environ: Mapping[str, str], log: Path):
        self.what, self.log = what, log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(environ),
                start_new_session=True,
            )

    def wait(self, timeout: float) -> Result:
        """Wait for the end.

        Raises:
            AssertionError: after ``timeout`` seconds, with what the command has printed; it is killed by then.
        """
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.what}: running after {timeout:.0f} s\n{self.output()[-6000:]}") from None
        return Result(self._process.returncode, self.output())

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """Kill the command with its process group; what it started on other hosts ends with their cluster."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@dataclass
class Host:
    """One host of a :class:`Cluster`."""

    name: str
    address: str
    folder: Path
    environ: dict[str, str]
    holder: subprocess.Popen[str]  # waits for the host's first process, and shares its end
    pid: int  # of the host's first process, as seen from outside
    commands: list[Command] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def start(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> Command:
        """Start a command in the checkout's folder, with the cluster's environment and ``env`` on top."""
        entered = ["nsenter", "--target", str(self.pid), "--all", "--", "env", f"--chdir={REPO}", *argv]
        log = self.folder / f"{self.name}.{next(self._numbers)}.log"
        command = Command(f"{argv[0]} on {self.name}", entered, self.environ | dict(env or {}), log)
        self.commands.append(command)
        return command

    def run(self, argv: Sequence[str], env: Mapping[str, str] | None = None, *, timeout: float = 20.0) -> Result:
        """:meth:`start` a command and wait for its end."""
        command = self.start(argv, env)
        result = command.wait(timeout)
        self.commands.remove(command)
        command.log.unlink()
        return result

    def ip(self, *lines: str) -> None:
        """Run lines of ``ip`` in this host's network, with the process numbers of the machine outside."""
        subprocess.run(
            ["nsenter", "--target", str(self.pid), "--net", "ip", "-batch", "-"],
            input="\n".join(lines) + "\n",
            env=self.environ,
            check=True,
            text=True,
        )


class Cluster:
    """``num_hosts`` hosts, up inside the ``with`` block.

    Attributes:
        folder: that all hosts see; it holds the keys, and what commands and servers print.
        hosts: in the order of their names.
        environ: the environment of commands. Nothing of the caller's is in it, above all no launcher's variables.
    """

    def __init__(self, folder: Path, num_hosts: int = 2):
        self.folder = folder
        self.num_hosts = num_hosts
        self.hosts: list[Host] = []
        self.home = pwd.getpwuid(0).pw_dir
        self.environ = {
            "PATH": PATH,
            "HOME": self.home,
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(REPO),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }

    def __enter__(self) -> Cluster:
        try:
            self._write_files()
            for index in range(1, self.num_hosts + 1):
                self._boot(f"n{index}", f"10.77.0.{index}")
            self._connect()
            self._wait_for_ssh()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill every process of every host. Returns when they are gone, and networks and mounts with them."""
        for host in self.hosts:
            with contextlib.suppress(ProcessLookupError):
                os.kill(host.pid, signal.SIGKILL)  # the kernel then kills all others of the host
        for host in self.hosts:
            host.holder.communicate()
            for command in host.commands:
                command.kill()
        self.hosts = []

    def hostfile(self, slots: int = 1) -> Path:
        """A file for ``deepspeed --hostfile`` that names every host."""
        path = self.folder / f"hostfile.{slots}"
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in self.hosts))
        return path

    def _write_files(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for key in ("user_key", "host_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)],
                env=self.environ,
                check=True,
            )
        names = "".join(f"10.77.0.{n} n{n}\n" for n in range(1, self.num_hosts + 1))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (self.folder / "shadow").write_text("root:*:19000:0:99999:7:::\n")  # a key opens it, no password does
        (self.folder / "ssh_config").write_text(
            f"IdentityFile {self.folder}/user_key\n"
            "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\nBatchMode yes\n"
        )
        (self.folder / "sshd_config").write_text(
            f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/user_key.pub\n"
            "PermitRootLogin prohibit-password\nStrictModes no\nUsePAM no\nUseDNS no\nPidFile none\nMaxStartups 100\n"
        )

    def _boot(self, name: str, address: str) -> None:
        """Start a host without a network; it waits for one before it starts its SSH server."""
        sshd = shutil.which("sshd", path=PATH)
        assert sshd
        # setpriv: should this process be killed, the kernel kills the holder, and with it the host.
        argv = ["setpriv", "--pdeathsig", "KILL", "--", *UNSHARE]
        log = self.folder / f"init.{name}.log"
        with log.open("w") as errors:
            holder = subprocess.Popen(
                [*argv, "sh", "-euc", INIT, "init", name, str(self.folder), sshd, self.home],
                env=self.environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        assert holder.stdout
        try:
            if holder.stdout.readline() != "ready\n":
                raise RuntimeError(f"host {name} did not start: {log.read_text()}")
            (first,) = psutil.Process(holder.pid).children()
        except BaseException:
            holder.kill()
            holder.wait()
            raise
        self.hosts.append(Host(name, address, self.folder, self.environ, holder, first.pid))

    def _connect(self) -> None:
        """A bridge that is the first host's interface, and a cable from it to every other host."""
        first, *others = self.hosts
        first.ip("link add eth0 type bridge")
        for host in others:
            port = f"to_{host.name}"
            first.ip(f"link add {port} type veth peer name eth0 netns {host.pid}", f"link set {port} master eth0 up")
        for host in self.hosts:
            host.ip(f"addr add {host.address}/24 dev eth0", "link set eth0 up")
            assert host.holder.stdin
            host.holder.stdin.write("\n")
            host.holder.stdin.flush()

    def _wait_for_ssh(self, seconds: float = 15.0) -> None:
        deadline = time.monotonic() + seconds
        for host in self.hosts:
            while (answer := self.hosts[0].run(["ssh", "-o", "ConnectTimeout=5", host.name, "hostname"])).returncode:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no SSH to {host.name} after {seconds:.0f} s: {answer.output}")
                time.sleep(0.1)
            assert answer.output.strip() == host.name, f"{host.name} calls itself {answer.output!r}"
