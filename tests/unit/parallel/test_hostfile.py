"""Hostfiles: what is read is what DeepSpeed reads, and what DeepSpeed would misread is refused by line."""

from __future__ import annotations

from pathlib import Path

import pytest
from deepspeed.launcher import runner
from hypothesis import given
from hypothesis import strategies as st

from moe_scale.errors import ConfigError
from moe_scale.parallel.hostfile import Host, read_hostfile, select

MIXED = [Host("big-1", tuple(range(8))), Host("small-1", (0, 1)), Host("small-2", (0, 1))]


def read(text: str | bytes, folder: Path) -> list[Host]:
    path = folder / "hosts"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_hostfile(path)


def problems(text: str | bytes, folder: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text, folder)
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


def test_a_good_file(tmp_path: Path) -> None:
    text = "# a comment\n\nnode-1 slots=2\r\n\t10.0.0.2\t slots=08  # eight\n  a.b_c  slots=1"
    expected = [Host("node-1", (0, 1)), Host("10.0.0.2", tuple(range(8))), Host("a.b_c", (0,))]
    assert read(text, tmp_path) == expected


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("node-2", "'node-2'; write a host a line, as: node-1 slots=8"),
        ("node-2 slots=", "'node-2 slots='"),
        ("node-2 slots=x", "'node-2 slots=x'"),
        ("node-2 slots=8x", "'node-2 slots=8x'"),
        ("node-2 slots = 8", "'node-2 slots = 8'"),
        ("node-2 slots=-1", "'node-2 slots=-1'"),
        ("node-2 slots=8 max_slots=9", "'node-2 slots=8 max_slots=9'"),
        ("node-2:8", "'node-2:8'"),
        ("n1,n2 slots=8", "'n1,n2 slots=8'"),
        ("-w slots=8", "'-w slots=8'"),
        ("$(id) slots=8", "'$(id) slots=8'"),
        ("node-2 slots=\u0668", "slots="),
        ("node-2 slots=0", "slots=0; choose 1 to 1024, or remove the line"),
        ("node-2 slots=99999", "slots=99999"),
        ("node-1 slots=4", "node-1 is named twice; write each host once"),
        ("NODE-1 slots=4", "NODE-1 is named twice"),
    ],
)
def test_a_wrong_line_is_named(line: str, what: str, tmp_path: Path) -> None:
    (found,) = problems(f"node-1 slots=8\n# more\n{line}\n", tmp_path)
    assert found.startswith("hosts:3: ")
    assert what in found


def test_every_wrong_line_is_named(tmp_path: Path) -> None:
    assert [p.split(": ")[0] for p in problems("a\nb slots=1\nb slots=2\nc slots=0\n", tmp_path)] == [
        "hosts:1",
        "hosts:3",
        "hosts:4",
    ]


@pytest.mark.parametrize("text", ["", "\n\n", "# node-1 slots=8\n"])
def test_an_empty_file(text: str, tmp_path: Path) -> None:
    assert problems(text, tmp_path) == ["hosts: names no host; write a host a line, as: node-1 slots=8"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "it is not UTF-8 text" in problems(b"\xff\xfe", tmp_path)[0]
    for path, why in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=why):
            read_hostfile(path)


NAMES = st.from_regex(r"[A-Za-z0-9#,:=.$-]{1,8}", fullmatch=True)
BLANKS, ENDS = st.sampled_from([" ", "\t ", ""]), st.sampled_from(["", " ", " # a note", "x", " max_slots=4"])
LINES = st.builds("{}{}slots={}{}".format, NAMES, BLANKS, st.integers(-1, 20), ENDS) | st.sampled_from(["", "# a", " "])


@given(st.lists(LINES, max_size=4))
def test_deepspeed_reads_the_same_in_whatever_is_accepted(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    try:
        hosts = read("\n".join(lines), tmp_path_factory.mktemp("hosts"))
    except ConfigError:
        return
    assert {host.name: host.num_ranks for host in hosts} == dict(runner._parse_hostfile(lines))


@pytest.mark.parametrize(
    ("include", "exclude"),
    [
        ("", ""),
        ("big-1", ""),
        ("big-1@small-1:0", ""),
        ("small-2@big-1:7,0,7", ""),
        ("", "small-1"),
        ("", "big-1:0,1,2,3,4,5,6,7@small-1:1"),
    ],
)
def test_deepspeed_selects_the_same(include: str, exclude: str) -> None:
    pool = {host.name: host.num_ranks for host in MIXED}
    expected = runner.parse_inclusion_exclusion(pool, include, exclude)
    found = {host.name: list(host.slots) for host in select(MIXED, include, exclude)}
    assert found == {name: sorted(slots) for name, slots in expected.items()}


@pytest.mark.parametrize(
    ("include", "exclude", "what"),
    [
        ("big-1", "small-1", "both are given"),
        ("big-2", "", "big-2 is not in the hostfile; choose from big-1, small-1, small-2"),
        ("small-1:2", "", "small-1 has no slot 2; choose 0 to 1"),
        ("small-1:", "", "'small-1:'; write HOST or HOST:0,1"),
        ("small-1,small-2", "", "'small-1,small-2'"),
        ("", "big-1@small-1@small-2", "leaves no slot"),
    ],
)
def test_wrong_selections(include: str, exclude: str, what: str) -> None:
    with pytest.raises(ConfigError, match=r".") as caught:
        select(MIXED, include, exclude)
    assert what in str(caught.value)
