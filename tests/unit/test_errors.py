"""The one message that a user reads when the input is wrong, and which rank prints it."""

from __future__ import annotations

import pickle
import socket
from unittest.mock import patch

import pytest

from moe_scale import errors
from moe_scale.errors import ConfigError, Problem, exit_on_config_error, format_problems, raise_if

WRONG = Problem("moe.top_k", "9 > moe.num_experts = 8", "choose 1 to 8")
MISSING = Problem("data.source", "'x' does not exist", this_host_only=True)


def test_a_problem_says_where_what_and_what_is_allowed() -> None:
    assert str(WRONG) == "moe.top_k: 9 > moe.num_experts = 8; choose 1 to 8"
    assert str(MISSING) == "data.source: 'x' does not exist"


def test_the_error_holds_all_problems() -> None:
    assert ConfigError(WRONG).problems == [WRONG]
    error = ConfigError(problem for problem in (WRONG, MISSING))
    assert error.problems == [WRONG, MISSING]
    assert str(error) == f"{WRONG}\n{MISSING}"
    assert pickle.loads(pickle.dumps(error)).problems == error.problems


def test_raise_if() -> None:
    raise_if([])
    with pytest.raises(ConfigError) as raised:
        raise_if([WRONG, MISSING])
    assert raised.value.problems == [WRONG, MISSING]


def test_format_problems() -> None:
    assert format_problems([WRONG]) == f"error: 1 problem with the settings\n  - {WRONG}"
    both = format_problems([WRONG, MISSING], "node7")
    assert both == f"error: 2 problems with the settings on host node7\n  - {WRONG}\n  - {MISSING}"


def leave(monkeypatch: pytest.MonkeyPatch, problems: list[Problem], **environ: str) -> int | str | None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with patch.object(errors, "GRACE_SECONDS", 0.0), pytest.raises(SystemExit) as left, exit_on_config_error():
        raise ConfigError(problems)
    assert left.value.__cause__ is None
    assert left.value.__suppress_context__, "no stack trace of what was caught"
    return left.value.code


@pytest.mark.parametrize(
    ("environ", "prints"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, False),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "0"}, False),
        ({"RANK": "0", "SLURM_PROCID": "3"}, True),
        ({"RANK": "not a number"}, True),
        ({"RANK": ""}, True),
        ({"RANK": "\u00b2"}, True),
    ],
)
def test_rank_0_prints_for_all(
    environ: dict[str, str], prints: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave(monkeypatch, [WRONG], **environ) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (format_problems([WRONG]) + "\n" if prints else "")


def test_the_first_rank_of_a_host_prints_what_is_wrong_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave(monkeypatch, [WRONG, MISSING], RANK="8", LOCAL_RANK="0") == 2
    assert capsys.readouterr().err == format_problems([MISSING], socket.gethostname()) + "\n"
    assert leave(monkeypatch, [WRONG, MISSING], RANK="9", LOCAL_RANK="1") == 2
    assert capsys.readouterr().err == ""


def test_silent_ranks_wait_so_that_no_launcher_kills_the_one_that_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with patch("time.sleep") as sleep, pytest.raises(SystemExit), exit_on_config_error():
        raise ConfigError(WRONG)
    sleep.assert_called_once_with(errors.GRACE_SECONDS)


def test_other_errors_pass_through() -> None:
    with pytest.raises(ZeroDivisionError), exit_on_config_error():
        raise ZeroDivisionError
    with exit_on_config_error():
        pass
