"""Model folders: what opens them, what a run begins with, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moe_scale.checkpoint import folder as folders
from moe_scale.checkpoint.reader import load_model, persistent_buffers
from moe_scale.cli import main
from moe_scale.config import LMConfig, SwitchConfig, SwitchModelConfig, SwitchMoEConfig, TextDataConfig
from moe_scale.data.tokenizer import load_tokenizer
from moe_scale.errors import ConfigError
from moe_scale.models.decoder import DecoderLM
from moe_scale.models.switch import SwitchLM
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.settings import to_dict
from moe_scale.train import model_folder
from moe_scale.train.language_model import LanguageModelTask
from moe_scale.train.model_folder import new_folder, write_model_folder
from moe_scale.train.recipe import prepare_job
from recipes import switch
from recipes.lm_16l import RECIPE
from tests.unit.checkpoint.builders import small_config, small_model


@pytest.fixture
def config(tmp_path: Path) -> LMConfig:
    config = small_config(tmp_path)
    return replace(
        config, model=replace(config.model, vocab_size=257), data=replace(config.data, tokenizer="bytes", seq_len=16)
    )


def state_of(model: DecoderLM) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | persistent_buffers(model)


def write(folder: Path, config: LMConfig, **others: Any) -> tuple[Path, DecoderLM]:
    model = small_model(config)
    write_model_folder(folder, "decoder", config, state_of(model).__getitem__, origin={"tool": "a test"}, **others)
    return folder, model


def test_what_opens_a_run_opens_it(config: LMConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = write(tmp_path / "models" / "made", config)
    opened = load_model(folder)
    assert isinstance(opened, DecoderLM)
    torch.testing.assert_close(state_of(opened), state_of(model), rtol=0, atol=0)
    record = json.loads((folder / "run.json").read_text())
    assert record["origin"] == {"tool": "a test"}
    assert record["settings"] == to_dict(config)
    main(["generate", "--run", str(folder), "--prompt", "A", "--max_tokens", "2"])
    assert capsys.readouterr().err.startswith("1 text, 2 tokens")
    assert [path.name for path in folder.parent.iterdir()] == ["made"], "nothing is left beside it"


def test_several_files_of_weights(config: LMConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "FILE_ELEMENTS", 2000)
    folder, model = write(tmp_path / "made", config)
    assert len(list(folders.find_checkpoint(folder).glob("model-*.safetensors"))) > 2
    opened = load_model(folder)
    assert isinstance(opened, DecoderLM)
    torch.testing.assert_close(state_of(opened), state_of(model), rtol=0, atol=0)


def test_a_run_begins_with_it(config: LMConfig, tmp_path: Path) -> None:
    folder, model = write(tmp_path / "made", config)
    argv = ["--config", str(folder / "settings.yaml"), "--output_dir", str(tmp_path / "run")]
    job = prepare_job(RECIPE, argv)
    assert job.config.model == replace(
        config.model, pretrained=str(folder), loss_chunk_tokens=job.config.model.loss_chunk_tokens
    )
    assert job.remarks == ()
    assert isinstance(job.task, LanguageModelTask)
    begun = job.task.build_model(ParallelGroups())
    torch.testing.assert_close(state_of(begun), state_of(model), rtol=0, atol=0)

    other = [*argv, "--model.rope_theta", "500", "--moe.router", "softmax", "--moe.shared_intermediate_size", "8"]
    drawn, left_out, *changed = prepare_job(RECIPE, other).remarks
    assert "4 are drawn: layers.0.moe.dense.down" in drawn
    assert "2 are left out: layers.0.moe.selection_bias_E" in left_out
    assert "model.pretrained: model.rope_theta was 10000.0 and is 500.0" in changed
    assert "model.pretrained: moe.router was sigmoid and is softmax" in changed


@pytest.mark.parametrize(
    ("flags", "where", "what"),
    [
        (["--model.d_model", "32"], "model.pretrained", "embedding.weight is (257, 16)"),
        (["--data.tokenizer", "gpt2", "--model.vocab_size", "50304"], "model.pretrained", "embedding.weight"),
        (["--model.pretrained", "nowhere"], "model.pretrained", "holds no checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused(
    flags: list[str], where: str, what: str, config: LMConfig, tmp_path: Path
) -> None:
    folder, _ = write(tmp_path / "made", config)
    argv = ["--config", str(folder / "settings.yaml"), "--output_dir", str(tmp_path / "run"), *flags]
    with pytest.raises(ConfigError) as refused:
        prepare_job(RECIPE, argv)
    problem = refused.value.problems[0]
    assert problem.where == where
    assert what in problem.what


def own_tokenizer(folder: Path) -> None:
    """The tokenizer ``bytes`` with one entry more."""
    backend = load_tokenizer("bytes").backend
    from tokenizers import Tokenizer

    changed = Tokenizer.from_str(backend.to_str())
    changed.add_tokens(["ROMEO"])
    folder.mkdir()
    changed.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )


def test_its_own_tokenizer_goes_with_it(config: LMConfig, tmp_path: Path) -> None:
    config = replace(config, model=replace(config.model, vocab_size=260))
    folder, _ = write(tmp_path / "made", config, tokenizer=own_tokenizer)
    chosen = yaml.safe_load((folder / "settings.yaml").read_text())
    assert chosen["data"] == {"tokenizer": str(folder / "tokenizer")}
    moved = folder.rename(tmp_path / "moved")  # its settings name a folder that is gone
    main(["generate", "--run", str(moved), "--prompt", "ROMEO", "--max_tokens", "2"])
    argv = ["--config", str(moved / "settings.yaml"), "--model.pretrained", str(moved)]
    argv += ["--output_dir", str(tmp_path / "run"), "--data.tokenizer"]
    job = prepare_job(RECIPE, [*argv, str(moved / "tokenizer")])
    job.run_dir.mkdir()
    job.task.keep_beside(job.run_dir)
    assert (job.run_dir / "tokenizer" / "tokenizer.json").is_file()
    with pytest.raises(ConfigError) as refused:
        prepare_job(RECIPE, [*argv, "bytes"])
    [problem] = refused.value.problems
    assert problem.where == "data.tokenizer"
    assert str(moved / "tokenizer") in problem.allowed


def test_switch_begins_with_one(tmp_path: Path) -> None:
    config = SwitchConfig(
        model=SwitchModelConfig(num_layers=2, d_model=16, num_heads=2, vocab_size=260),
        moe=SwitchMoEConfig(num_experts=3, intermediate_size=8),
        data=TextDataConfig(tokenizer="bytes"),
    )
    made = SwitchLM(config.model, config.moe, seed=1)
    weights = dict(made.named_parameters())
    folder = write_model_folder(tmp_path / "made", "switch", config, weights.__getitem__, origin={})
    flags = ["--config", str(folder / "settings.yaml"), "--output_dir", str(tmp_path / "run")]
    begun = prepare_job(switch.RECIPE, flags).task.build_model(ParallelGroups())
    torch.testing.assert_close(dict(begun.named_parameters()), weights, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="holds a model of kind switch"):
        prepare_job(RECIPE, ["--model.pretrained", str(folder), "--output_dir", str(tmp_path / "run")])


def test_a_folder_that_exists_is_refused(config: LMConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists"):
        write(tmp_path, config)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        new_folder(str(tmp_path / "file" / "made"))


def test_a_failure_leaves_nothing(config: LMConfig, tmp_path: Path) -> None:
    def wrong(name: str) -> torch.Tensor:
        return torch.zeros(3)

    (tmp_path / "models").mkdir()
    with pytest.raises(ConfigError, match=r"embedding.weight is \(3,\)"):
        write_model_folder(tmp_path / "models" / "made", "decoder", config, wrong, origin={})
    assert not list((tmp_path / "models").iterdir())
