"""The same checkpoint in another shape, and refusals that write nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moe_scale
from moe_scale.checkpoint.index import MOMENTS, read_index
from moe_scale.checkpoint.reader import Reader
from moe_scale.cli import main
from tests.unit.checkpoint.builders import small_config, write_checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return write_checkpoint(folder, small_config(folder))


@pytest.mark.parametrize("files", [1, 3, 50])
def test_every_value_is_the_same(saved: Path, tmp_path: Path, files: int) -> None:
    target = tmp_path / "new"
    main(["reshard", str(saved.parent.parent), str(target), "--files", str(files)])
    before, after = Reader(saved, read_index(saved)), Reader(target, read_index(target))
    assert before.index.tensors.keys() == after.index.tensors.keys()
    for name, tensor in before.index.tensors.items():
        assert tensor.states.keys() == after.index.tensors[name].states.keys()
        for state in tensor.states:
            assert torch.equal(before.read(name, state, 0, tensor.numel), after.read(name, state, 0, tensor.numel))
    assert (before.index.step, before.index.ranks) == (after.index.step, after.index.ranks)
    assert len(list(target.glob("model-*.safetensors"))) <= files


def test_weights_only(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "weights"
    main(["reshard", str(saved), str(target), "--weights_only"])
    assert [path.name for path in target.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]
    assert not any(set(MOMENTS) & tensor.states.keys() for tensor in read_index(target).tensors.values())
    pairs = zip(moe_scale.load_model(saved).parameters(), moe_scale.load_model(target).parameters(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(["reshard", *argv])
    assert left.value.code == 2
    return capsys.readouterr().err


def test_refusals(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    assert "exists; name a new folder" in refused(capsys, str(saved), str(tmp_path / "there"))
    assert "holds no checkpoint" in refused(capsys, str(tmp_path), str(tmp_path / "new"))
    assert "choose 1 or more" in refused(capsys, str(saved), str(tmp_path / "new"), "--files", "0")
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(capsys, str(saved), str(tmp_path / "file" / "new"))
    assert {path.name for path in tmp_path.iterdir()} == {"there", "file"}
