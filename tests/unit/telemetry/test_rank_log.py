"""The log that every rank keeps for itself."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path

import pytest

from moe_scale.errors import StoppedError
from moe_scale.telemetry.rank_log import RankLog


def written(log: RankLog) -> str:
    return log.path.read_text()


def test_a_line_tells_seconds_by_phase_since_the_last_one(tmp_path: Path) -> None:
    log = RankLog(tmp_path, 3)
    log.open()
    with log:
        log.at("forward")
        log.at("backward")
        log.step(1, 2.5)
        log.at("data")
        log.step(2, 2.25)
    assert log.path == tmp_path / "logs" / "rank_00003.log"
    first, second = re.findall(r"step (.*)", written(log))
    assert re.fullmatch(
        r"1: loss 2\.500000 here; seconds since the last line: start \d\.\d+, forward \d\.\d+, backward \d\.\d+", first
    )
    assert "start" not in second, second
    assert "data" in second
    assert written(log).endswith("INFO end\n")


def test_warnings_are_kept_and_still_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a process of its own; pytest has some
    log = RankLog(tmp_path, 0)
    log.open()
    with log:
        logging.getLogger("some.library").warning("a disk is slow")
        logging.getLogger("some.library").info("of no interest")
    assert "WARNING a disk is slow" in written(log)
    assert "of no interest" not in written(log)
    shown = capsys.readouterr()
    assert shown.err == "a disk is slow\n", "python prints it where nobody else does"
    assert shown.out == ""
    assert logging.getLogger().handlers == [], "what the log added is gone"


def test_a_library_with_a_handler_of_its_own_is_shown_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    library = logging.getLogger("library_with_handler")
    handler = logging.StreamHandler()
    library.addHandler(handler)
    log = RankLog(tmp_path, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        log.open()
        with log:
            library.warning("once")
            logging.getLogger("transformers").warning("kept")
            warnings.warn("of Python's own kind", stacklevel=1)
    library.removeHandler(handler)
    assert capsys.readouterr().err.count("once") == 1
    for text in ("WARNING once", "WARNING kept", "UserWarning: of Python's own kind"):
        assert written(log).count(text) == 1, text


def test_what_ends_a_rank_is_written_down(tmp_path: Path) -> None:
    log = RankLog(tmp_path, 0)
    log.open()
    with pytest.raises(ZeroDivisionError), log:
        print(1 // 0)
    assert "ERROR ended by ZeroDivisionError" in written(log)
    assert "Traceback" in written(log)
    log.open()
    with pytest.raises(StoppedError), log:
        raise StoppedError("stopped and saved after step 3")
    assert written(log).count("Traceback") == 1, "what all ranks do together is no accident"
    assert written(log).endswith("INFO stopped and saved after step 3\n")
    log.open()
    log.last_words("rank 0: the data cannot be read")
    with pytest.raises(SystemExit), log:
        raise SystemExit(2)
    assert "ERROR rank 0: the data cannot be read\n" in written(log)
    assert written(log).endswith("INFO leaves with exit code 2\n")
    assert written(log).count("rank 0 on ") == 3, "a later start goes on in the same file"


def test_last_words_of_a_rank_whose_log_an_error_has_closed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RankLog(tmp_path, 0)
    log.open()
    with pytest.raises(ZeroDivisionError), log:
        print(1 // 0)
    try:
        log.last_words("error: lost rank 1")
        assert written(log).endswith("ERROR error: lost rank 1\n")
    finally:  # a process would end here
        for handler in logging.getLogger("moe_scale.rank").handlers[1:]:
            logging.getLogger("moe_scale.rank").removeHandler(handler)
            handler.close()
    RankLog(tmp_path / "off", 0, enabled=False).last_words("error: lost rank 1")
    assert capsys.readouterr() == ("", ""), "the watchdog has told it already"


def test_a_log_that_is_off_writes_nothing(tmp_path: Path) -> None:
    log = RankLog(tmp_path, 0, enabled=False)
    log.open()
    with log:
        log.step(1, 1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(OSError, match="logs"):
        RankLog(tmp_path, 0).open()
