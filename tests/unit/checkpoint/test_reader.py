"""What is written is what is read, in any stretches; a damaged checkpoint is refused whole, whatever the damage."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import moe_scale
from moe_scale.checkpoint.files import DamagedCheckpointError
from moe_scale.checkpoint.folder import find_checkpoint
from moe_scale.checkpoint.index import FORMAT, INDEX, MOMENTS, WEIGHT, read_index, verify
from moe_scale.checkpoint.reader import Reader, persistent_buffers
from moe_scale.config import LMConfig
from moe_scale.errors import ConfigError
from tests.unit.checkpoint.builders import small_config, small_model, write_checkpoint


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> LMConfig:
    return small_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, config: LMConfig) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run"), config)


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints" / saved.name))


def test_load_model_gives_the_model_that_was_saved(saved: Path, config: LMConfig) -> None:
    expected = small_model(config).eval()
    for path in (saved, saved.parent.parent, saved.parent / "latest"):
        model = moe_scale.load_model(path)
        assert not model.training
        ids = torch.arange(24).view(2, 12)
        assert torch.equal(model(ids), expected(ids))
        for name, buffer in persistent_buffers(expected).items():
            assert torch.equal(model.get_buffer(name), buffer), name
    assert {p.dtype for p in moe_scale.load_model(saved, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_any_stretch_reads_as_that_of_the_whole(saved: Path, config: LMConfig) -> None:
    reader = Reader(saved, read_index(saved))
    whole = dict(small_model(config).named_parameters())
    rng = random.Random(0)
    for name, parameter in whole.items():
        flat = parameter.detach().reshape(-1)
        moment = reader.read(name, MOMENTS[1], 0, flat.numel())
        for _ in range(5):
            start = rng.randrange(flat.numel())
            count = rng.randrange(1, flat.numel() - start + 1)
            assert torch.equal(reader.read(name, WEIGHT, start, count), flat[start : start + count])
            assert torch.equal(reader.read(name, MOMENTS[0], start, count), 2 * flat[start : start + count])
            assert torch.equal(reader.read(name, MOMENTS[1], start, count), moment[start : start + count])


def test_weights_are_read_onto_the_cpu_where_a_model_is_built(saved: Path, config: LMConfig) -> None:
    """Where new tensors are made elsewhere by default, as on the device that a model is built on."""
    index = read_index(saved)
    with torch.device("meta"):
        verify(saved, index)
        weight = Reader(saved, index).weight("embedding.weight")
    assert torch.equal(weight, small_model(config).embedding.weight)


def test_8bit_moments_come_back_as_codes_where_the_layout_is_the_same(saved: Path) -> None:
    index = read_index(saved)
    reader = Reader(saved, index)
    name, tensor = next(item for item in index.tensors.items() if len(item[1].states[MOMENTS[1]]) > 1)
    for fragment in tensor.states[MOMENTS[1]]:
        stored = reader.codes(name, MOMENTS[1], fragment.start, fragment.length)
        assert stored is not None
        assert torch.equal(stored.codes, (torch.arange(fragment.length) % 256).to(torch.uint8))
        assert stored.in_block == fragment.start % 256
    assert reader.codes(name, MOMENTS[1], 0, tensor.numel) is None


def test_other_programs_can_read_the_files(saved: Path) -> None:
    """They are ordinary safetensors files, and one that holds a tensor whole holds it under its plain name."""
    index = read_index(saved)
    loaded = {}
    for path in saved.glob("*.safetensors"):
        loaded |= safetensors.torch.load_file(path)
    name, tensor = next(item for item in index.tensors.items() if len(item[1].states[WEIGHT]) == 1)
    assert tuple(loaded[name].shape) == tensor.shape


def test_no_pickle_is_written_or_read(saved: Path) -> None:
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors"}
    sources = Path(moe_scale.__file__).parent.joinpath("checkpoint").glob("*.py")
    assert not [path for path in sources if "pickle" in path.read_text() or "torch.load" in path.read_text()]


def test_a_newer_format_says_what_to_do(damaged: Path) -> None:
    from moe_scale.checkpoint.files import read_json, write_json

    write_json(damaged / INDEX, {**read_json(damaged / INDEX), "format": FORMAT + 1})
    with pytest.raises(ConfigError, match=f"format {FORMAT + 1}, newer than {FORMAT}; install a newer"):
        read_index(damaged)


def test_another_model_is_refused(damaged: Path) -> None:
    from moe_scale.checkpoint.files import read_json, write_json

    content = read_json(damaged / INDEX)
    content["settings"]["model"]["d_model"] = 32
    write_json(damaged / INDEX, content)
    with pytest.raises(ConfigError):
        moe_scale.load_model(damaged)


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / ".step_00000003.partial").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        moe_scale.load_model(tmp_path)


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def lengthen(path: Path, rng: random.Random) -> None:
    with open(path, "ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 100)))


def overwrite(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.randrange(1, 4096))
    before = bytes(content[start:end])
    content[start:end] = rng.randbytes(end - start)
    if bytes(content[start:end]) == before:
        content[start] ^= 1
    path.write_bytes(content)


def swap(path: Path, rng: random.Random) -> None:
    """Exchange two files' names: each is intact, and in the wrong place."""
    others = sorted(p for p in path.parent.iterdir() if p != path and p.read_bytes() != path.read_bytes())
    other = rng.choice(others)
    aside = path.with_suffix(".aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def zero_out(path: Path, rng: random.Random) -> None:
    """What a file system that lost power may leave: the length without the content."""
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = (flip, truncate, delete, lengthen, overwrite, swap, zero_out)


@pytest.mark.parametrize("seed", range(350))
def test_no_damage_goes_unnoticed(seed: int, saved: Path, tmp_path: Path) -> None:
    """One random corruption of one random file: always the one error that a user can read, never a wrong load."""
    damaged = Path(shutil.copytree(saved, tmp_path / saved.name))
    rng = random.Random(seed)
    path = rng.choice(sorted(damaged.iterdir()))
    DAMAGES[seed % len(DAMAGES)](path, rng)
    with pytest.raises(DamagedCheckpointError) as raised:
        verify(damaged, read_index(damaged))
    (problem,) = raised.value.problems
    assert str(damaged) in problem.where
    assert "\n" not in str(problem)
    with pytest.raises(ConfigError):
        moe_scale.load_model(damaged)


def test_an_index_that_leaves_something_out_is_refused(damaged: Path) -> None:
    """An index that is itself intact, as a faulty writer would leave it."""
    from moe_scale.checkpoint.files import read_json, write_json

    content = read_json(damaged / INDEX)
    name = next(iter(content["tensors"]))
    lost = json.loads(json.dumps(content))
    lost["tensors"][name]["states"]["weight"].pop()
    write_json(damaged / INDEX, lost)
    with pytest.raises(DamagedCheckpointError, match=f"weight of {name} is incomplete"):
        read_index(damaged)
    del lost["tensors"][name]
    write_json(damaged / INDEX, lost)
    with pytest.raises(DamagedCheckpointError, match="does not fit the model"):
        moe_scale.load_model(damaged)


def test_values_are_read_as_stored_while_a_sharded_model_is_built(
    saved: Path, config: LMConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``zero.Init`` makes ``torch.empty`` give tensors of the training precision, whatever is asked for."""
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: plain(*size, **options).to(torch.bfloat16))
    reader = Reader(saved, read_index(saved))
    verify(saved, reader.index)
    found = reader.weight("embedding.weight")
    monkeypatch.undo()
    assert torch.equal(found, small_model(config).embedding.weight)
