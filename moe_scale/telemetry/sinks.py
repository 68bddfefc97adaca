"""Where a run's numbers go: ``metrics.jsonl`` always, TensorBoard and Weights & Biases as configured.

The file is the record of the run: one JSON object a line, flushed at once, continued on a resume. The other two
are views of it. None of the three may ever stop a training run: whatever goes wrong becomes one warning.
"""

from __future__ import annotations

import configparser
import contextlib
import inspect
import logging
import netrc
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from moe_scale.config import TelemetryConfig
from moe_scale.telemetry.provenance import hide
from moe_scale.telemetry.records import JsonLines, flatten, plain, truncate_after

log = logging.getLogger("moe_scale.telemetry")

WANDB_TIMEOUT_S = 30
"""Seconds that W&B may take to start and, at the end, to upload what is left. Every other rank waits meanwhile."""

WANDB_HOSTS = {"api.wandb.ai", "api.forge.coreweave.com"}
"""Names of W&B's public service; releases differ in which one is their default, a login for one serves both."""


class Sink(Protocol):
    """One destination of numbers. May raise: :class:`MetricsLogger` drops a sink that does."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class MetricsLogger:
    """Writes what a run measures. Usable as a context manager.

    Args:
        run_dir: folder of the run; ``metrics.jsonl`` and ``tensorboard/`` and ``wandb/`` are made in it.
        config: which sinks to use.
        run_config: resolved settings, shown with the run in W&B; secrets are hidden.
        run_name: name of the run in W&B.
        enabled: False on every rank but the first; then nothing is written and no call does anything.
        layers: numbers of the layers that per-layer lists are about; None counts 0, 1, 2, ...
    """

    def __init__(
        self,
        run_dir: Path,
        config: TelemetryConfig,
        *,
        run_config: dict,
        run_name: str,
        enabled: bool,
        layers: Sequence[int] | None = None,
    ):
        self.enabled = enabled
        self.path = Path(run_dir) / "metrics.jsonl"
        self.layers = layers
        self._file = JsonLines(self.path)
        self._config, self._run_config, self._run_name = config, run_config, run_name
        self._sinks: dict[str, Sink] | None = None
        self._resumed_step = -1
        if enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def truncate_after(self, step: int, without: str = "") -> None:
        """Continue a run that resumes from ``step``: the records of later steps go, in TensorBoard too, and W&B shows
        the same run. -1 starts from scratch. Call it before the first record and before a progress bar is shown:
        W&B starts here and may say so.

        Args:
            without: name of a value; records of the file that have it go as well.
        """
        if not self.enabled:
            return
        self._file.close()  # the next record opens the file that takes its place
        self._resumed_step = step
        try:
            truncate_after(self.path, step, without)
        except OSError as error:
            log.warning("could not drop the records after step %d from %s: %s", step, self.path, error)
        if self._sinks is None:
            self._sinks = self._open_sinks()
        elif "TensorBoard" in self._sinks:  # a run that goes back
            self._sinks.pop("TensorBoard").close(False)
            self._sinks["TensorBoard"] = TensorBoardSink(self.path.parent / "tensorboard", step + 1)

    def log(self, record: Mapping[str, Any]) -> None:
        """Write one record.

        Args:
            record: ``step`` (required) and numbers, lists with one number a layer, nested mappings of these, or text.
                numpy and torch scalars and arrays are taken as they are. NaN and infinities are ``null`` in the file.
        """
        if not self.enabled:
            return
        values = plain(record)
        step = int(values["step"])
        self._file.append(values)
        if self._sinks is None:
            self._sinks = self._open_sinks()
        scalars = dict(flatten({k: v for k, v in values.items() if k != "step"}, self.layers))
        for name, sink in list(self._sinks.items()):
            try:
                sink.write(step, scalars)
            except Exception as error:  # a view of the numbers must not end the run
                log.warning("%s stopped, the run goes on without it: %s", name, brief(error))
                del self._sinks[name]

    def close(self, *, failed: bool = False) -> None:
        """Flush and close everything. Waits at most :data:`WANDB_TIMEOUT_S` seconds for W&B. May be called twice.

        Args:
            failed: the run ended with an error; W&B marks it so.
        """
        for name, sink in (self._sinks or {}).items():
            try:
                sink.close(failed)
            except Exception as error:
                log.warning("%s did not close cleanly: %s", name, brief(error))
        self._sinks = None
        self._file.close()
        self.enabled = False

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(failed=kind is not None)

    def _open_sinks(self) -> dict[str, Sink]:
        sinks: dict[str, Sink] = {}
        if self._config.tensorboard:
            try:
                sinks["TensorBoard"] = TensorBoardSink(self.path.parent / "tensorboard", self._resumed_step + 1)
            except Exception as error:
                log.warning("TensorBoard is off: %s", brief(error))
        wandb_sink = open_wandb(
            self.path.parent,
            self._config,
            run_config=hide(self._run_config),
            run_name=self._run_name,
            resumed=self._resumed_step >= 0,
        )
        if wandb_sink:
            sinks["W&B"] = wandb_sink
        return sinks


class TensorBoardSink:
    """TensorBoard events in ``folder``; events from ``purge_step`` on, left by an earlier start, are hidden."""

    def __init__(self, folder: Path, purge_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=30)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandbSink:
    """A started W&B run."""

    def __init__(self, run: Any):
        self._run = run

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        # Our own step as the axis: W&B's counter refuses steps that a resumed run repeats.
        self._run.log({"step": step, **scalars})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def open_wandb(
    run_dir: Path, config: TelemetryConfig, *, run_config: dict, run_name: str, resumed: bool
) -> WandbSink | None:
    """Start W&B as ``config.wandb`` says, or return None. Never asks, never raises, and gives up after a set time."""
    mode: str = config.wandb
    if mode == "auto":
        mode = wandb_auto_mode()
    if mode == "off":
        return None
    if mode == "online" and not wandb_login_found():
        log.warning("W&B writes offline to %s: there is no login (run `wandb login`)", run_dir / "wandb")
        mode = "offline"
    arguments = {"project": config.wandb_project, "config": run_config, "name": run_name}
    try:
        try:
            return start_wandb(run_dir, mode, resumed=resumed, **arguments)
        except Exception as error:
            if config.wandb != "online" or mode == "offline":
                raise
            log.warning("W&B writes offline to %s: %s", run_dir / "wandb", brief(error))
            return start_wandb(run_dir, "offline", resumed=False, **arguments)
    except Exception as error:  # bad key, no network, no package: the run matters more
        log.warning("W&B is off: %s", brief(error))
        return None


def start_wandb(run_dir: Path, mode: str, *, resumed: bool, **arguments: Any) -> WandbSink:
    """``wandb.init`` with every wait bounded. A resumed online run continues the one that ``wandb_run_id`` names;
    an offline one is a run of its own at each start, since what was written before may not be uploaded yet. Under
    ``wandb agent`` the run is the one that the agent names.
    """
    import wandb

    wanted: dict[str, Any] = {
        "init_timeout": WANDB_TIMEOUT_S,
        "finish_timeout": WANDB_TIMEOUT_S,
        "x_service_wait": WANDB_TIMEOUT_S,
        "x_graphql_timeout_seconds": WANDB_TIMEOUT_S,
        "login_timeout": 1,
        "silent": True,
        "console": "off",
    }
    known = getattr(wandb.Settings, "model_fields", wanted)  # older releases lack some of these
    settings = wandb.Settings(**{k: v for k, v in wanted.items() if k in known})
    wandb.setup(settings=settings)
    # wandb.init asks where W&B, unlike wandb_login_found, sees no login; older releases give up asking in a second.
    may_ask = mode == "online" and "prompt" in inspect.signature(wandb.login).parameters
    if may_ask and not wandb.login(prompt=False, verify=False):
        raise RuntimeError("there is no login (run `wandb login`)")
    id_file = run_dir / "wandb_run_id"
    run_id = uuid.uuid4().hex[:8]
    if mode == "online" and resumed and id_file.exists():
        run_id = id_file.read_text().strip() or run_id
    arguments |= {"mode": mode, "resume": "allow" if mode == "online" else None}
    if os.environ.get("WANDB_SWEEP_ID"):
        del arguments["project"]  # of a sweep's agent, as the run's id: W&B would warn that it passes over others
    else:
        arguments["id"] = run_id
    run = wandb.init(dir=str(run_dir), settings=settings, **arguments)
    run.define_metric("*", step_metric="step")
    if mode == "online":
        id_file.write_text(run.id)
        print(f"W&B: {run.url}", flush=True)
    return WandbSink(run)


def wandb_auto_mode() -> str:
    """What ``auto`` stands for: the user's ``WANDB_MODE``, or online with a login and off without one."""
    mode = os.environ.get("WANDB_MODE", "").lower()
    if mode in ("disabled", "dryrun", "offline") or os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true"):
        return "offline" if mode in ("dryrun", "offline") else "off"
    return "online" if wandb_login_found() else "off"


def wandb_login_found() -> bool:
    """Whether W&B has credentials: environment, its settings files, or netrc. Imports nothing and asks nobody."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = configparser.ConfigParser(interpolation=None)
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb")
    with contextlib.suppress(configparser.Error):
        settings.read([folder / "settings", Path("wandb") / "settings"])
    if settings.get("default", "api_key", fallback=""):
        return True
    url = os.environ.get("WANDB_BASE_URL") or settings.get("default", "base_url", fallback="")
    hosts = {urlsplit(url).netloc} if url else WANDB_HOSTS
    hosts = hosts | WANDB_HOSTS if hosts & WANDB_HOSTS else hosts
    candidates = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in (Path(candidate).expanduser() for candidate in candidates):
        try:
            logins = netrc.netrc(path)
        except (OSError, netrc.NetrcParseError):
            continue
        return any((logins.authenticators(host) or ("", "", ""))[2] for host in hosts)
    return False


def brief(error: BaseException) -> str:
    """An error on one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
