"""What exactly was run: ``run.json`` next to the metrics, enough to run the same thing again."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "numpy", "bitsandbytes", "triton")
DIFF_LIMIT_BYTES = 1_000_000
GIT_TIMEOUT_S = 20

# Names whose value is hidden when it is text, and what a tokenizer calls its own tokens, which is no secret.
_SECRET_NAME = re.compile(
    r"(^|[._-])((api|access|private|secret)[_-]?key|token|secret|passw(or)?d|credentials?)$", re.IGNORECASE
)
_TEXT_TOKEN = re.compile(r"(bos|eos|pad|unk|sep|cls|mask|image)_token$", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
HIDDEN = "<hidden>"


def snapshot(
    run_dir: Path,
    *,
    settings: dict,
    deepspeed: dict,
    argv: list[str],
    device: str | None = None,
    hosts: dict | None = None,
    recipe: str = "",
    sparse_layers: Sequence[int] = (),
) -> dict:
    """Write ``run.json`` into ``run_dir``, atomically, and return what it holds. Call on the first rank only.

    An earlier ``run.json`` and ``source.diff``, of the start that this one resumes, are kept as ``run.<n>.json`` and
    ``source.<n>.diff``. Environment variables are not recorded; text under names such as ``api_key`` is hidden.

    Args:
        run_dir: folder of the run, made if need be.
        settings: resolved settings.
        deepspeed: the DeepSpeed JSON as it is used.
        argv: the command line.
        device: name of the device; torch is asked where it is not given.
        hosts: where the ranks run, and how fast their links are.
        recipe: its name.
        sparse_layers: numbers of the layers that the per-layer lists of ``metrics.jsonl`` are about.

    Raises:
        OSError: the folder cannot be written.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    source, diff = source_state(Path(__file__).resolve().parents[1])
    record = {
        "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **({"recipe": recipe} if recipe else {}),
        "command": hide_arguments(argv),
        **({"sparse_layers": list(sparse_layers)} if sparse_layers else {}),
        "settings": hide(settings),
        "deepspeed": hide(deepspeed),
        "packages": package_versions(),
        "source": source,
        "host": socket.gethostname(),
        "device": device or device_name(),
        "world_size": world_size(),
        **({"hosts": hosts} if hosts else {}),
    }
    keep_earlier(run_dir)
    if diff:
        write_atomically(run_dir / "source.diff", diff)
    write_atomically(run_dir / "run.json", json.dumps(record, indent=2, default=str).encode() + b"\n")
    return record


def keep_earlier(run_dir: Path) -> None:
    """Rename the files of an earlier start to the first free number."""
    if not (run_dir / "run.json").exists():
        with contextlib.suppress(FileNotFoundError):
            (run_dir / "source.diff").unlink()  # of a start that died before its run.json
        return
    n = 1
    while (run_dir / f"run.{n}.json").exists():
        n += 1
    with contextlib.suppress(FileNotFoundError):
        os.replace(run_dir / "source.diff", run_dir / f"source.{n}.diff")
    os.replace(run_dir / "run.json", run_dir / f"run.{n}.json")


def source_state(package: Path) -> tuple[dict | None, bytes]:
    """Commit of the checkout that ``package`` is part of, and its changes since.

    Returns:
        ``{"commit", "dirty", "untracked", "diff_truncated"}`` and the diff, at most :data:`DIFF_LIMIT_BYTES` of it.
        None and nothing where the package is installed, or in a checkout that does not track it, or git is absent.
    """
    commit = commit_of(package)
    status = git(package, "status", "--porcelain", "-z") if commit else None
    if status is None:
        return None, b""
    entries = status.decode(errors="replace").split("\0")
    diff = git(package, "diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--binary") or b""
    state = {
        "commit": commit,
        "dirty": bool(status),
        # By name alone: a file that was never added may hold anything.
        "untracked": [entry[3:] for entry in entries if entry.startswith("?? ")][:100],
        "diff_truncated": len(diff) > DIFF_LIMIT_BYTES,
    }
    return state, diff[:DIFF_LIMIT_BYTES]


def commit_of(package: Path) -> str:
    """The commit of the checkout that ``package`` is part of; empty where it is none, or git does not answer."""
    # A virtual environment inside another project's checkout must not be taken for ours: the file has to be tracked.
    if git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return ""
    return (git(package, "rev-parse", "HEAD") or b"").decode().strip()


def git(folder: Path, *arguments: str) -> bytes | None:
    """What git prints, or None when it fails or is absent. Takes no locks: other runs may ask at the same time."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            timeout=GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def package_versions() -> dict[str, str | None]:
    """Version of each of :data:`PACKAGES` without importing it, None where it is not installed, and Python's."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def device_name() -> str:
    """Name of this rank's device as its driver gives it (``NVIDIA H100 80GB HBM3``), or the processor's."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    module = torch.get_device_module(device) if device else None
    if module is None or not hasattr(module, "get_device_name"):
        return processor_name()
    return str(module.get_device_name())


def processor_name() -> str:
    """Model of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def world_size() -> int:
    """Ranks of the run; before the process group is up, what the launcher says."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdigit() else 1


def hide(value: Any, name: str = "") -> Any:
    """``value`` with text hidden that stands under a secret's name, and logins cut out of addresses."""
    if isinstance(value, Mapping):
        return {key: hide(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if value and _SECRET_NAME.search(name) and not _TEXT_TOKEN.search(name):
        return HIDDEN
    return _URL_LOGIN.sub(f"{HIDDEN}@", value)


def hide_arguments(argv: list[str]) -> list[str]:
    """The same for a command line: ``--x.api_key VALUE``, ``--x.api_key=VALUE`` and ``x.api_key=VALUE``."""
    shown = []
    previous = ""
    for argument in argv:
        name, equals, value = argument.partition("=")
        if equals:
            shown.append(name + equals + hide(value, name))
        else:
            shown.append(hide(argument, previous) if not argument.startswith("-") else argument)
        previous = argument if argument.startswith("-") and not equals else ""
    return shown


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one and nothing in between."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
