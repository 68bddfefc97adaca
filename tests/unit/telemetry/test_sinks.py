"""Records and where they go: the file is exact, the other sinks can fail in any way without touching the run."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_scale.config import TelemetryConfig
from moe_scale.telemetry import records, sinks
from moe_scale.telemetry.records import flatten, truncate_after
from moe_scale.telemetry.sinks import MetricsLogger, wandb_auto_mode, wandb_login_found

FILE_ONLY = TelemetryConfig(tensorboard=False, wandb="off")


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path):
    for name in ("API_KEY", "IDENTITY_TOKEN_FILE", "MODE", "DISABLED", "BASE_URL", "CONFIG_DIR"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


def open_logger(folder: Path, config: TelemetryConfig = FILE_ONLY, **kwargs) -> MetricsLogger:
    return MetricsLogger(folder, config, run_name="test", **{"run_config": {}, "enabled": True, **kwargs})


def read(folder: Path) -> list[dict]:
    def refuse(name: str):
        raise ValueError(f"{name} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def warned(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "moe_scale.telemetry"]


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_a_record_is_one_line_of_valid_json_at_once(tmp_path):
    with open_logger(tmp_path / "new" / "run") as logger:
        logger.log(
            {
                "step": np.int64(3),
                "loss": torch.tensor(float("nan"), requires_grad=True),
                "lr": np.float32(0.5),
                "grad_norm": float("-inf"),
                "entropy": torch.tensor([1.0, float("inf")], dtype=torch.bfloat16),
                "experts": np.array([[1, 2], [3, 4]]),
                "eval": {"perplexity": 2.0, "done": True},
                "note": "a\nb",
                "path": Path("x"),
                "none": None,
            }
        )
        assert read(tmp_path / "new" / "run") == [
            {
                "step": 3,
                "loss": None,
                "lr": 0.5,
                "grad_norm": None,
                "entropy": [1.0, None],
                "experts": [[1, 2], [3, 4]],
                "eval": {"perplexity": 2.0, "done": True},
                "note": "a\nb",
                "path": "x",
                "none": None,
            }
        ]


def test_step_is_required(tmp_path):
    with open_logger(tmp_path) as logger, pytest.raises(KeyError, match="step"):
        logger.log({"loss": 1.0})


def test_other_ranks_write_nothing(tmp_path):
    with open_logger(tmp_path / "run", TelemetryConfig(wandb="online"), enabled=False) as logger:
        logger.truncate_after(3)
        logger.log({"step": 1})
    assert not (tmp_path / "run").exists()


def test_a_resume_continues_after_the_resumed_step(tmp_path):
    with open_logger(tmp_path) as logger:
        for step in range(6):
            logger.log({"step": step, "try": 1})
    with open_logger(tmp_path) as logger:
        logger.truncate_after(3)
        logger.log({"step": 4, "try": 2})
    assert [(r["step"], r["try"]) for r in read(tmp_path)] == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2)]
    assert [p.name for p in tmp_path.iterdir() if "metrics" in p.name] == ["metrics.jsonl"]


def test_truncation_to_before_the_first_step_empties_the_file(tmp_path):
    with open_logger(tmp_path) as logger:
        logger.log({"step": 0})
    truncate_after(tmp_path / "metrics.jsonl", -1)
    assert read(tmp_path) == []


def test_a_line_cut_short_by_a_crash_spoils_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    with open_logger(tmp_path) as logger:
        logger.log({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n'
    truncate_after(path, 3)
    assert read(tmp_path) == [{"step": 1}, {"step": 3}]


def test_truncation_is_all_or_nothing(tmp_path, monkeypatch, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(records.os, "replace", fail)
    with open_logger(tmp_path) as logger:
        logger.truncate_after(1)  # a warning, not the end of the run
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert list(tmp_path.glob("metrics*")) == [path]
    assert len(warned(caplog)) == 1


def test_truncating_a_file_that_is_not_there(tmp_path):
    truncate_after(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.glob("metrics*"))


def test_a_full_disk_costs_records_and_one_warning(tmp_path):
    # A limit on the size of files stands in for a full disk: the write is cut short within a line, and then fails.
    script = f"""
import resource, signal
from pathlib import Path
from moe_scale.config import TelemetryConfig
from moe_scale.telemetry.sinks import MetricsLogger
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
config = TelemetryConfig(tensorboard=False, wandb="off")
with MetricsLogger(Path({str(tmp_path)!r}), config, run_config={{}}, run_name="x", enabled=True) as logger:
    logger.log({{"step": 1}})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, -1))
    logger.log({{"step": 2}})
    logger.log({{"step": 3}})
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    logger.log({{"step": 4}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert read(tmp_path) == [{"step": 1}, {"step": 4}]
    assert done.stderr.count("\n") == 1
    assert "the run goes on" in done.stderr


def test_a_device_that_is_always_full(tmp_path, caplog):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with open_logger(tmp_path) as logger:
        for step in range(3):
            logger.log({"step": step})
    assert len(warned(caplog)) == 1


def test_truncating_in_the_middle_of_a_run_loses_nothing(tmp_path):
    with open_logger(tmp_path) as logger:
        logger.log({"step": 1})
        logger.log({"step": 2})
        logger.truncate_after(1)
        logger.log({"step": 3})
    assert read(tmp_path) == [{"step": 1}, {"step": 3}]


def test_a_run_without_a_record_leaves_no_empty_files(tmp_path):
    with open_logger(tmp_path, TelemetryConfig(wandb="off")):
        pass
    assert not (tmp_path / "tensorboard").exists()
    assert not (tmp_path / "metrics.jsonl").exists()


# --- names ------------------------------------------------------------------------------------------------------------


def test_scalars_are_grouped_and_layers_numbered():
    values = {
        "loss": 1.0,
        "lr": 2,
        "eval_loss": 3.0,
        "tokens_per_s": 4.0,
        "unheard_of": 5.0,
        "memory/peak_bytes": 6,
        "eval": {"bleu": 7.0},
        "aux_loss": 8.0,
        "entropy": [1.0, 2.0],
        "moe_max_load": [3.0],
        "moe/min_load": [4.0],
        "ok": True,
        "text": "x",
        "nothing": None,
        "table": [[1.0], [2.0]],
    }
    assert dict(flatten(values)) == {
        "train/loss": 1.0,
        "train/lr": 2.0,
        "eval/loss": 3.0,
        "speed/tokens_per_s": 4.0,
        "train/unheard_of": 5.0,
        "memory/peak_bytes": 6.0,
        "eval/bleu": 7.0,
        "moe/aux_loss": 8.0,
        "moe/layer_00/entropy": 1.0,
        "moe/layer_01/entropy": 2.0,
        "moe/layer_00/max_load": 3.0,
        "moe/layer_00/min_load": 4.0,
        "train/ok": 1.0,
    }


def test_layers_keep_their_own_numbers_where_not_all_are_sparse():
    assert dict(flatten({"entropy": [1.0, 2.0]}, layers=[1, 3])) == {
        "moe/layer_01/entropy": 1.0,
        "moe/layer_03/entropy": 2.0,
    }


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def events(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return [(e.step, e.value) for e in accumulator.Scalars(tag)]


def test_tensorboard_after_a_resume_shows_each_step_once(tmp_path):
    config = TelemetryConfig(wandb="off")
    with open_logger(tmp_path, config) as logger:
        for step in range(4):
            logger.log({"step": step, "loss": 1.0, "entropy": [0.25, 0.5]})
    with open_logger(tmp_path, config) as logger:
        logger.truncate_after(1)
        logger.log({"step": 2, "loss": 2.0})
    assert events(tmp_path, "train/loss") == [(0, 1.0), (1, 1.0), (2, 2.0)]
    assert events(tmp_path, "moe/layer_01/entropy") == [(0, 0.5), (1, 0.5)]


def test_tensorboard_that_cannot_start_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with open_logger(tmp_path, TelemetryConfig(wandb="off")) as logger:
        logger.log({"step": 1})
        logger.log({"step": 2})
    assert [r["step"] for r in read(tmp_path)] == [1, 2]
    assert len(warned(caplog)) == 1


def test_a_sink_that_fails_later_is_dropped_once(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no space left")

    with open_logger(tmp_path, TelemetryConfig(wandb="off")) as logger:
        logger.log({"step": 1, "loss": 1.0})
        monkeypatch.setattr(sinks.TensorBoardSink, "write", fail)
        for step in range(2, 5):
            logger.log({"step": step, "loss": 1.0})
    assert len(read(tmp_path)) == 4
    assert len(warned(caplog)) == 1


# --- W&B --------------------------------------------------------------------------------------------------------------


class FakeWandb(types.ModuleType):
    """Stands in for the package: keeps the arguments of each init and fails in the modes that it is told to."""

    def __init__(self, failing: tuple[str, ...] = (), login: bool = True):
        super().__init__("wandb")
        self.failing, self.has_login, self.inits, self.logged, self.exit_codes = failing, login, [], [], []

    Settings = dict
    url = "https://wandb.example/run"

    def setup(self, settings):
        pass

    def login(self, prompt=True, verify=True):
        assert (prompt, verify) == (False, False)
        return self.has_login

    def init(self, **kwargs):
        self.inits.append(kwargs)
        self.id = kwargs.get("id", "of the agent")
        if kwargs["mode"] in self.failing:
            raise TimeoutError("no answer")
        return self

    def define_metric(self, *_, **__):
        pass

    def log(self, values):
        self.logged.append(values)

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)


@pytest.fixture
def fake_wandb(monkeypatch):
    def install(**kwargs) -> FakeWandb:
        fake = FakeWandb(**kwargs)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return install


def wandb_config(mode: str) -> TelemetryConfig:
    return TelemetryConfig(tensorboard=False, wandb=mode)


def test_auto_without_a_login_is_off_and_silent(tmp_path, fake_wandb, caplog, capfd):
    fake = fake_wandb()
    with open_logger(tmp_path, wandb_config("auto")) as logger:
        logger.log({"step": 1})
    assert (fake.inits, warned(caplog), capfd.readouterr()) == ([], [], ("", ""))


def test_auto_with_a_login_is_online_under_bounded_waits(tmp_path, fake_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    fake = fake_wandb()
    with open_logger(tmp_path, wandb_config("auto"), run_config={"api_key": "x"}) as logger:
        logger.log({"step": 1, "loss": 2.0})
    first = fake.inits[0]
    assert first["mode"] == "online"
    assert first["settings"]["init_timeout"] == first["settings"]["finish_timeout"] == sinks.WANDB_TIMEOUT_S
    assert first["config"] == {"api_key": "<hidden>"}
    assert fake.logged[0] == {"step": 1, "train/loss": 2.0}


def test_a_resume_continues_the_same_wandb_run_and_a_new_start_does_not(tmp_path, fake_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    fake = fake_wandb()
    for step in (-1, 5, 9, -1):
        with open_logger(tmp_path, wandb_config("auto")) as logger:
            logger.truncate_after(step)
    first, resumed, again, fresh = (i["id"] for i in fake.inits)
    assert first == resumed == again != fresh


def test_under_an_agent_of_a_sweep_run_and_project_are_the_agents(tmp_path, fake_wandb, monkeypatch, caplog):
    """W&B would pass over others, with a warning."""
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    fake = fake_wandb()
    with open_logger(tmp_path, wandb_config("online")) as logger:
        logger.log({"step": 1})
    (arguments,) = fake.inits
    assert not {"id", "project"} & set(arguments)
    assert (tmp_path / "wandb_run_id").read_text() == "of the agent"
    assert warned(caplog) == []


def test_wandb_learns_how_the_run_ended(tmp_path, fake_wandb):
    fake = fake_wandb()
    with open_logger(tmp_path, wandb_config("offline")) as logger:
        logger.log({"step": 1})
    logger = open_logger(tmp_path, wandb_config("offline"))
    with pytest.raises(ZeroDivisionError), logger:
        logger.log({"step": 1 // 0})
    logger = open_logger(tmp_path, wandb_config("offline"))
    logger.log({"step": 1})
    with pytest.raises(ZeroDivisionError), logger:
        _ = 1 // 0
    assert fake.exit_codes == [0, 1]


def test_auto_that_cannot_connect_is_one_warning(tmp_path, fake_wandb, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    fake = fake_wandb(failing=("online",))
    with open_logger(tmp_path, wandb_config("auto")) as logger:
        logger.log({"step": 1})
    assert [i["mode"] for i in fake.inits] == ["online"]
    assert len(warned(caplog)) == 1
    assert len(read(tmp_path)) == 1


@pytest.mark.parametrize("reason", ["no login found", "wandb finds none", "no network"])
def test_online_falls_back_to_offline_with_one_warning(tmp_path, fake_wandb, monkeypatch, caplog, reason):
    if reason != "no login found":
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    fake = fake_wandb(failing=("online",), login=reason != "wandb finds none")
    with open_logger(tmp_path, wandb_config("online")) as logger:
        logger.log({"step": 1, "loss": 2.0})
    assert fake.inits[-1]["mode"] == "offline"
    assert fake.logged == [{"step": 1, "train/loss": 2.0}]
    assert len(warned(caplog)) == 1


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_nothing_works_and_the_run_goes_on(tmp_path, fake_wandb, monkeypatch, mode):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    fake_wandb(failing=("online", "offline"))
    with open_logger(tmp_path, wandb_config(mode)) as logger:
        logger.log({"step": 1})
    assert len(read(tmp_path)) == 1


def test_wandb_itself_offline(tmp_path, capfd, caplog):
    pytest.importorskip("wandb")
    caplog.set_level(logging.WARNING)
    with open_logger(tmp_path, wandb_config("offline")) as logger:
        logger.log({"step": 1, "loss": 2.0, "entropy": [1.0, float("nan")]})
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert warned(caplog) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("mode", "key", "expected"),
    [
        ("", "", "off"),
        ("", "k", "online"),
        ("offline", "", "offline"),
        ("dryrun", "k", "offline"),
        ("disabled", "k", "off"),
        ("online", "", "off"),
    ],
)
def test_auto_obeys_the_environment(monkeypatch, mode, key, expected):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert wandb_auto_mode() == expected


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        (".netrc", "machine api.wandb.ai login user password abc", True),
        (".netrc", "machine github.com login user password abc", False),
        (".netrc", "machine api.wandb.ai login user", False),
        (".netrc", "this is no netrc {", False),
        (".config/wandb/settings", "[default]\napi_key = abc", True),
        (".config/wandb/settings", "[default]\nentity = me", False),
        (".config/wandb/settings", "neither is this", False),
    ],
)
def test_login_is_found_in_files(no_login, file, text, found):
    path = no_login / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    path.chmod(0o600)
    assert wandb_login_found() is found


def test_login_for_a_server_of_ones_own(no_login, monkeypatch):
    (no_login / ".netrc").write_text("machine wandb.example:8080 login user password abc\n")
    assert not wandb_login_found()
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example:8080")
    assert wandb_login_found()
