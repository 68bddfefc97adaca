"""The address where ranks meet, and what is said while they wait."""

from __future__ import annotations

import time

import pytest

from moe_scale.errors import ConfigError
from moe_scale.parallel import rendezvous
from tests.ranks import Ranks


@pytest.mark.parametrize(
    ("address", "port", "message"),
    [
        ("", "29500", "MASTER_ADDR: the environment variable is not set"),
        ("127.0.0.1", "", "MASTER_PORT: the environment variable is not set"),
        ("127.0.0.1", "70000", "MASTER_PORT: '70000'; it must be the number of a port"),
        ("no-such-host.invalid", "29500", "does not know 'no-such-host.invalid'"),
    ],
)
def test_what_is_no_address(monkeypatch: pytest.MonkeyPatch, address: str, port: str, message: str) -> None:
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ConfigError) as caught:
        rendezvous.check_address()
    assert message in str(caught.value)


def test_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    rendezvous.check_address()


@pytest.mark.parametrize(("local_rank", "lines"), [("0", 2), ("1", 0)])
def test_the_first_rank_of_a_host_tells_of_a_wait(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], local_rank: str, lines: int
) -> None:
    for name, value in {"MASTER_ADDR": "n1", "MASTER_PORT": "1234", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(rendezvous, "FIRST_S", 0.1)
    monkeypatch.setattr(rendezvous, "AGAIN_S", 0.4)
    with rendezvous.telling_of_a_wait():
        time.sleep(0.7)
    with rendezvous.telling_of_a_wait():
        pass
    time.sleep(0.2)
    assert capsys.readouterr().err.count("waiting for all 8 ranks at n1:1234") == lines


@pytest.mark.slow
def test_a_rank_that_never_comes_is_an_error_in_the_end() -> None:
    code = (
        "from moe_scale.errors import exit_on_config_error\n"
        "from moe_scale.parallel import zero\n"
        "import os; os.environ['WORLD_SIZE'] = '2'\n"
        "with exit_on_config_error(): zero.init_distributed(timeout_minutes=0.05)"
    )
    with Ranks(1, ["-c", code]) as ranks:
        ended = ranks.wait(timeout=60)
    assert ended.codes == [2], ended
    assert "MASTER_ADDR: not all 2 ranks came to 127.0.0.1:" in ended.output[0], ended
    assert "Traceback" not in ended.output[0], ended
