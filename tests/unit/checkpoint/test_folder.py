"""Which checkpoints stay, which one is meant by a name, and what is left of those that were cut off."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_scale.checkpoint import folder as folders
from moe_scale.checkpoint.index import INDEX


def save(run_dir: Path, step: int, content: str = "") -> Path:
    folder = folders.checkpoints_of(run_dir) / folders.name_of(step)
    (folders.begin(folder) / INDEX).write_text(content)
    folders.finish(folder)
    return folder


def names(run_dir: Path) -> set[str]:
    return {path.name for path in folders.checkpoints_of(run_dir).iterdir()}


def steps(run_dir: Path) -> list[int]:
    return [folders.step_of(path) for path in folders.complete(run_dir)]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step_00000007", 7),
        ("step_123456789", 123_456_789),
        ("step_7", -1),
        ("step_00000007.damaged-1", -1),
        (".step_00000007.partial", -1),
        ("latest", -1),
    ],
)
def test_the_step_in_a_name(name: str, step: int, tmp_path: Path) -> None:
    assert folders.step_of(tmp_path / name) == step
    if step >= 0:
        assert folders.name_of(step) == name


def test_only_folders_with_a_name_count_newest_first(tmp_path: Path) -> None:
    assert folders.complete(tmp_path) == []
    for step in (9, 100_000_000, 20):
        save(tmp_path, step)
    folder = folders.checkpoints_of(tmp_path)
    folders.begin(folder / folders.name_of(30))
    (folder / "step_00000040").write_text("a file")
    assert steps(tmp_path) == [100_000_000, 20, 9]
    assert (folder / "latest").resolve().name == folders.name_of(20), "the last one written, not the highest"
    assert folders.find_checkpoint(tmp_path).name == folders.name_of(100_000_000)
    assert folders.find_checkpoint(folder / "latest").name == folders.name_of(20)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "keep", "stay"),
    [
        (0, 0, (), [6, 5, 4, 3, 2, 1]),
        (1, 0, (), [6]),
        (2, 3, (), [6, 5, 3]),
        (2, 0, ("step_00000001",), [6, 5, 1]),
        (9, 0, (), [6, 5, 4, 3, 2, 1]),
    ],
)
def test_what_pruning_leaves(
    keep_last: int, keep_every: int, keep: tuple[str, ...], stay: list[int], tmp_path: Path
) -> None:
    for step in range(1, 7):
        save(tmp_path, step)
    deleted = folders.prune(tmp_path, keep_last=keep_last, keep_every=keep_every, keep=keep)
    assert steps(tmp_path) == stay
    assert sorted(folders.step_of(path) for path in deleted) == sorted(set(range(1, 7)) - set(stay))
    assert names(tmp_path) == {"latest", *(folders.name_of(step) for step in stay)}


def test_the_same_step_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    for content in ("first", "second", "third"):
        folder = save(tmp_path, 5, content)
        assert (folder / INDEX).read_text() == content
    assert names(tmp_path) == {"latest", folder.name}


@pytest.mark.parametrize("named", [True, False])
def test_what_was_being_replaced_when_the_run_was_killed(named: bool, tmp_path: Path) -> None:
    """After the second rename nobody wants the old one; between the two it is all that there is."""
    folder = save(tmp_path, 5, "newest" if named else "newer")
    for number, content in ((9, "old"), (10, "newer")):
        (folder.with_name(f"{folder.name}.replaced-{number}")).mkdir()
        (folder.with_name(f"{folder.name}.replaced-{number}") / INDEX).write_text(content)
    if not named:
        folder.rename(folders.partial_of(folder))
    folders.sweep(tmp_path)
    assert names(tmp_path) == {"latest", folder.name}
    assert (folder / INDEX).read_text() == ("newest" if named else "newer")


def test_what_was_cut_off_is_begun_anew_and_swept_away(tmp_path: Path) -> None:
    folder = folders.checkpoints_of(tmp_path) / folders.name_of(5)
    (folders.begin(folder) / "half").write_text("a file that is not whole")
    assert list(folders.begin(folder).iterdir()) == []
    kept = save(tmp_path, 4)
    (folder.parent / ".step_00000003.deleted").mkdir()
    folders.set_aside(save(tmp_path, 2), "damaged")
    folders.sweep(tmp_path)
    assert names(tmp_path) == {"latest", kept.name, "step_00000002.damaged-1"}
    folders.sweep(tmp_path / "a run that is not there")


def test_a_link_moves_in_one_step(tmp_path: Path) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    link = first.parent / "best"
    for folder in (first, second, first):
        folders.point(link, folder)
        assert link.is_symlink()
        assert link.resolve() == folder.resolve()
    assert names(tmp_path) == {"best", "latest", first.name, second.name}
