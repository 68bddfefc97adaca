"""How the tools end: as a recipe does."""

from __future__ import annotations

import pytest

from moe_scale import cli
from moe_scale.errors import ConfigError, DivergedError, Problem
from moe_scale.tools import compare
from moe_scale.train.checkpoint import NotSavedError
from moe_scale.train.faults import PreemptedError


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (PreemptedError("stopped"), 75, "stopped\n"),
        (DivergedError("the loss"), 1, "error: the loss\n"),
        (NotSavedError("a full disk"), 1, "error: a full disk\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (ConfigError(Problem("a", "wrong")), 2, "error: 1 problem with the settings\n  - a: wrong\n"),
    ],
)
def test_what_ends_a_run_ends_a_comparison_by_the_same_exit_code(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object) -> None:
        raise error

    monkeypatch.setattr(compare, "run", run)
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", "recipes/lm_16l.py"])
    assert ended.value.code == code
    assert capsys.readouterr().err == text
