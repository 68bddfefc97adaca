"""Hosts that do not have the same code, packages, settings or data: no run begins, and the host is named.

What differs is a file that is mounted over another on the second host alone.
"""

from __future__ import annotations

import importlib.metadata
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.hosts import Host
from tests.cluster.slurm import BatchResult, Slurm
from tests.curves import CharacterRuns
from tests.ranks import REPO

pytestmark = pytest.mark.cluster

RECIPE = "recipes/lm_16l.py"
SIZE = ("--nodes=2", "--ntasks-per-node=1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> CharacterRuns:
    return CharacterRuns(tmp_path_factory.mktemp("runs"))


def flags(runs: CharacterRuns) -> list[str]:
    cache = ("--data.cache_dir", str(runs.folder / "cache"))
    return runs.argv("run", 2, stage=3, extra=("--moe.ep_size", "2", *cache))


@contextmanager
def mounted(host: Host, files: dict[Path, Path]) -> Iterator[None]:
    """Let the host alone see other files or folders: what is in place of what."""
    for other, path in files.items():
        host.run(["mount", "--bind", str(other), str(path)]).check()
    try:
        yield
    finally:
        for path in reversed(files.values()):
            host.run(["umount", str(path)]).check()


def changed_copy(path: Path, folder: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text, f"{path} has no {old!r}"
    copy = folder / path.name
    copy.write_text(text.replace(old, new, 1))
    return copy


def another_commit(folder: Path) -> tuple[Path, Path]:
    """A repository that is one commit ahead, and the path that it is to be mounted over."""
    clone, place = folder / "clone", REPO / ".git"
    subprocess.run(["git", "clone", "-q", "--no-checkout", str(REPO), str(clone)], check=True)
    subprocess.run(["git", "-C", str(clone), "read-tree", "HEAD"], check=True)  # the files are tracked, too
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(clone), *author, "commit", "-q", "--allow-empty", "-m", "one ahead"], check=True)
    if place.is_dir():
        return clone / ".git", place
    pointer = folder / "gitdir"  # a further work tree has a file in its place
    pointer.write_text(f"gitdir: {clone / '.git'}\n")
    return pointer, place


def doctor(slurm: Slurm, runs: CharacterRuns) -> BatchResult:
    tool = shlex.join([sys.executable, "-m", "moe_scale.cli", "doctor", RECIPE, *flags(runs)])
    return slurm.submit(f"srun {' '.join(SIZE)} {tool}", *SIZE, timeout=90)


def test_hosts_that_agree_are_ready(slurm: Slurm, runs: CharacterRuns) -> None:
    output = doctor(slurm, runs).check().output
    assert "all 2 ranks are ready for lm_16l at scale cpu" in output
    for host in slurm.cluster.hosts:
        assert sum(line.startswith(f"{host.name} ") for line in output.splitlines()) == 1, output
    assert not (runs.folder / "run").exists(), "it leaves no run"


def test_other_commit_package_and_settings_on_one_host_are_refused_together(
    slurm: Slurm, runs: CharacterRuns, tmp_path: Path
) -> None:
    version = importlib.metadata.version("transformers")
    metadata = next(
        Path(str(file.locate()))
        for file in importlib.metadata.files("transformers") or []
        if file.name == "METADATA" and file.parent.name.endswith(".dist-info")
    )
    settings = runs.folder / "tiny.yaml"
    commit, git_folder = another_commit(tmp_path)
    files = {
        commit: git_folder,
        changed_copy(metadata, tmp_path, f"Version: {version}", "Version: 5.0.0"): metadata,
        changed_copy(settings, tmp_path, "lr: 0.003", "lr: 0.004"): settings,
    }
    with mounted(slurm.cluster.hosts[1], files):
        job = doctor(slurm, runs)
    assert (job.state, job.returncode) == ("FAILED", 2), job.output
    assert job.output.count("3 problems with the settings") == 1, job.output
    assert f"hosts: transformers: {version} on n1; 5.0.0 on n2; install the same version on all hosts" in job.output
    assert "hosts: optim.lr: 0.003 on n1; 0.004 on n2; start all ranks" in job.output
    assert "hosts: commit: " in job.output
    assert "on n2; bring the same commit to all hosts" in job.output
    assert "Traceback" not in job.output


def test_another_data_file_on_one_host_is_refused(slurm: Slurm, runs: CharacterRuns, tmp_path: Path) -> None:
    text = runs.folder / "text.jsonl"
    last = text.read_text().splitlines()[-1]
    other = changed_copy(text, tmp_path, last, last.replace('"}', ' the end"}'))
    with mounted(slurm.cluster.hosts[1], {other: text}):
        job = doctor(slurm, runs)
    assert (job.state, job.returncode) == ("FAILED", 2), job.output
    assert job.output.count("hosts: data: ") == 1, job.output
    assert "on n1; " in job.output
    assert "on n2; give all hosts the same files" in job.output
