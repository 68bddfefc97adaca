"""run.json: complete, atomic, and free of secrets."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from moe_scale.telemetry import provenance
from moe_scale.telemetry.provenance import HIDDEN, git, hide, hide_arguments, snapshot, source_state


def take(folder: Path, **settings) -> dict:
    return snapshot(
        folder, settings=settings, deepspeed={"zero_optimization": {"stage": 3}}, argv=["train", "--x", "1"]
    )


@pytest.fixture
def checkout(tmp_path):
    """A package in a checkout of its own with one commit."""
    root = tmp_path / "checkout"
    package = root / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("A = 1\n")
    run = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*run, *command], check=True, capture_output=True)
    return package


def test_run_json_tells_what_was_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("SOME_PRIVATE_VALUE", "do-not-record-me")
    record = take(tmp_path / "run", lr=0.1, path=Path("x"))
    text = (tmp_path / "run" / "run.json").read_text()
    assert json.loads(text) == {**record, "settings": {"lr": 0.1, "path": "x"}}
    assert record["command"] == ["train", "--x", "1"]
    assert record["deepspeed"] == {"zero_optimization": {"stage": 3}}
    assert record["world_size"] == 4
    assert record["device"] == provenance.device_name()
    assert record["host"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["started"])
    assert set(record["packages"]) == {"python", *provenance.PACKAGES}
    assert record["packages"]["torch"]
    assert "do-not-record-me" not in text


def test_the_device_can_be_named_by_the_caller(tmp_path):
    assert snapshot(tmp_path, settings={}, deepspeed={}, argv=[], device="X100")["device"] == "X100"


def test_every_start_keeps_the_ones_before(tmp_path, monkeypatch):
    for n in range(3):
        monkeypatch.setattr(
            provenance, "source_state", lambda _, n=n: ({"n": n}, f"diff {n}".encode() if n < 2 else b"")
        )
        take(tmp_path, n=n)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "run.1.json",
        "run.2.json",
        "run.json",
        "source.1.diff",
        "source.2.diff",
    ]
    for name, n in (("run.1.json", 0), ("run.2.json", 1), ("run.json", 2)):
        assert json.loads((tmp_path / name).read_text())["settings"] == {"n": n}
    assert (tmp_path / "source.2.diff").read_text() == "diff 1"


def test_a_failed_write_leaves_no_half_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(provenance.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_clean_checkout_is_its_commit(checkout):
    state, diff = source_state(checkout)
    assert re.fullmatch("[0-9a-f]{40}", state["commit"])
    assert (state["dirty"], state["untracked"], diff) == (False, [], b"")


def test_changes_are_kept_as_a_diff_that_applies(checkout, tmp_path):
    (checkout / "__init__.py").write_text("A = 2\n")
    (checkout / "new.py").write_text("secret = 'not recorded'\n")
    state, diff = source_state(checkout)
    assert state["dirty"]
    assert state["untracked"] == ["package/new.py"]
    assert b"not recorded" not in diff
    git(checkout, "checkout", "--", ".")
    subprocess.run(["git", "-C", str(checkout.parent), "apply"], input=diff, check=True)
    assert (checkout / "__init__.py").read_text() == "A = 2\n"


def test_a_huge_diff_is_cut_and_says_so(checkout, monkeypatch):
    monkeypatch.setattr(provenance, "DIFF_LIMIT_BYTES", 100)
    (checkout / "__init__.py").write_text("x = 1\n" * 1000)
    state, diff = source_state(checkout)
    assert state["diff_truncated"]
    assert len(diff) == 100


def test_someone_elses_checkout_is_not_ours(checkout):
    installed = checkout.parent / "venv" / "moe_scale"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert source_state(installed) == (None, b"")


def test_no_checkout_and_no_git(tmp_path, checkout, monkeypatch):
    assert source_state(tmp_path) == (None, b"")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_state(checkout) == (None, b"")


def test_secrets_are_hidden_and_tokens_of_text_are_not():
    settings = {
        "hub": {"token": "hf_x", "hf_token": "x", "api_key": "", "Password": "p"},
        "wandb.api-key": "x",
        "data": {"tokenizer": "gpt2", "max_tokens": 100, "sample_tokens": "100", "token": 5, "eos_token": "<s>"},
        "url": "s3://user:pass@bucket/path",
        "many": ["https://me@host/x", {"secret": ["a", "b"]}],
    }
    assert hide(settings) == {
        "hub": {"token": HIDDEN, "hf_token": HIDDEN, "api_key": "", "Password": HIDDEN},
        "wandb.api-key": HIDDEN,
        "data": {"tokenizer": "gpt2", "max_tokens": 100, "sample_tokens": "100", "token": 5, "eos_token": "<s>"},
        "url": f"s3://{HIDDEN}@bucket/path",
        "many": [f"https://{HIDDEN}@host/x", {"secret": [HIDDEN, HIDDEN]}],
    }


def test_secrets_on_the_command_line_are_hidden():
    argv = ["train.py", "--hub.token", "a", "--api_key=b", "hub.secret=c", "--tokens", "5", "--eval", "--lr=1", "d"]
    assert hide_arguments(argv) == [
        "train.py",
        "--hub.token",
        HIDDEN,
        f"--api_key={HIDDEN}",
        f"hub.secret={HIDDEN}",
        "--tokens",
        "5",
        "--eval",
        "--lr=1",
        "d",
    ]


def test_files_can_be_read_by_the_group(tmp_path):
    take(tmp_path)
    assert os.stat(tmp_path / "run.json").st_mode & 0o044
