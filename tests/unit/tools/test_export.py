"""Exported models in stock transformers, and in the plain format: the same logits and the same greedy tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from moe_scale.cli import main
from moe_scale.config import (
    DecoderConfig,
    DecoderLoRAConfig,
    LMConfig,
    MoEConfig,
    SwitchConfig,
    SwitchModelConfig,
    SwitchMoEConfig,
    TextDataConfig,
)
from moe_scale.data.tokenizer import load_tokenizer
from moe_scale.models.decoder import DecoderLM
from moe_scale.models.hf import directory
from moe_scale.models.lora import adapters
from moe_scale.models.plain import load_plain
from moe_scale.models.switch import SwitchLM
from moe_scale.tools.stored_run import LM, open_run
from moe_scale.train.model_folder import write_model_folder
from tests.hf import MODEL, MOE, TOLERANCE, assert_same_model, model_folder, ours, theirs
from tests.unit.checkpoint.builders import write_checkpoint

UNGATED = {"attention_gate": "none"}
HOMES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "elementwise gate": ("qwen3_next", {}, {}),
    "a gate a head": ("qwen3_next", {"attention_gate": "headwise"}, {}),
    "gate and shared expert": ("qwen3_next", {}, {"shared_intermediate_size": 10}),
    "gate, every second layer": ("qwen3_next", {"num_layers": 4}, {"every": 2}),
    "gate, dense": ("qwen3_next", {}, {"enabled": False}),
    "no gate": ("qwen3_moe", UNGATED, {}),
    "no gate, a head of its own": ("qwen3_moe", UNGATED | {"tie_embeddings": False}, {}),
    "no gate, every second layer": ("qwen3_moe", UNGATED | {"num_layers": 4}, {"every": 2}),
    "no gate, raw weights": ("qwen3_moe", UNGATED, {"top_k": 3, "renormalize": False}),
    "no gate, one expert a token": ("qwen3_moe", UNGATED, {"top_k": 1}),
    "no gate, shared expert": ("qwen3_next", UNGATED, {"shared_intermediate_size": 10}),
    "wide heads": ("qwen3_moe", UNGATED | {"head_dim": 10, "num_kv_heads": 1}, {}),
    "noisy": ("qwen3_moe", UNGATED, {"router": "noisy"}),
    "temperature": ("qwen3_moe", UNGATED, {"router_temperature": 2.5}),
    "capacity": ("qwen3_moe", UNGATED, {"dispatch": "capacity", "capacity_factor": 0.5, "min_capacity": 1}),
    "sigmoid": ("glm4_moe", UNGATED, {"router": "sigmoid"}),
    "sigmoid, raw gates": ("glm4_moe", UNGATED, {"router": "sigmoid", "renormalize": False, "router_temperature": 2.0}),
    "sigmoid, shared expert": ("glm4_moe", UNGATED, {"router": "sigmoid", "shared_intermediate_size": 24}),
    "dense": ("qwen3", UNGATED, {"enabled": False}),
    "no q and k norm": ("mixtral", UNGATED | {"qk_norm": "none"}, {}),
    "no q and k norm, dense": ("llama", UNGATED | {"qk_norm": "none"}, {"enabled": False}),
    "a norm of whole q and k": ("olmoe", UNGATED | {"qk_norm": "whole"}, {"renormalize": False}),
}

LONG = ("elementwise gate", "no gate", "dense")
"""Cases whose text is longer."""


def export(run: Path, target: Path, *flags: str) -> Path:
    main(["export", str(run), "--output_dir", str(target), *flags])
    return target


@pytest.mark.parametrize("case", HOMES)
def test_transformers_opens_it(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_type, model, moe = HOMES[case]
    run = model_folder(tmp_path / "run", model, moe)
    exported = export(run, tmp_path / "exported")
    their = theirs(exported)
    assert their.config.model_type == model_type
    assert_same_model(ours(run), their, new_tokens=64 if case in LONG else 8)
    assert ("drop no token" in capsys.readouterr().out) == (case == "capacity")


def adapted_run(folder: Path, moe: MoEConfig) -> Path:
    """A run whose adapters were trained, of attention, routers and feed-forwards."""
    targets = ("attention.*", "router", "experts.*") if moe.enabled else ("attention.*", "ffn.*")
    config = LMConfig(
        model=DecoderConfig(**MODEL),
        moe=moe,
        lora=DecoderLoRAConfig(rank=2, targets=targets),
        data=TextDataConfig(tokenizer="bytes", seq_len=96),
    )
    write_checkpoint(folder, config)
    return folder


def test_adapters_become_part_of_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = adapted_run(tmp_path / "run", MoEConfig(**MOE))
    exported = export(run, tmp_path / "exported")
    assert "the adapters of rank 2 are part" in capsys.readouterr().out
    model = ours(run)
    assert adapters(model)
    assert_same_model(model, theirs(exported), new_tokens=8)
    plain = load_plain(export(run, tmp_path / "plain", "--to", "moe_scale"))
    assert not adapters(plain)
    ids_BS = torch.arange(30).view(2, 15)
    expected = model(ids_BS)
    torch.testing.assert_close(plain(ids_BS), expected, rtol=TOLERANCE, atol=TOLERANCE)
    config = open_run(str(run), LM).config
    assert (DecoderLM(config.model, config.moe, seed=5)(ids_BS) - expected).abs().max() > 0.1


def test_a_dense_run_with_adapters_is_upcycled_with_them(tmp_path: Path) -> None:
    run = adapted_run(tmp_path / "run", MoEConfig(enabled=False, intermediate_size=12, top_k=2))
    main(["upcycle", str(run), "--output_dir", str(tmp_path / "sparse"), "--num_experts", "4"])
    model, sparse = ours(run), ours(tmp_path / "sparse")
    assert adapters(model)
    assert not adapters(sparse)
    ids_BS = torch.arange(30).view(2, 15)
    torch.testing.assert_close(sparse(ids_BS), model(ids_BS), rtol=TOLERANCE, atol=TOLERANCE)


def test_its_tokenizer_is_ours_and_begins_texts_as_documents_begin(tmp_path: Path) -> None:
    exported = export(model_folder(tmp_path / "run", {}, {}), tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = "Naïve, 你好\n "
    assert tokenizer(text)["input_ids"] == [256, *load_tokenizer("bytes").encode(text)]
    assert len(tokenizer(text)["input_ids"]) == 1 + len(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.model_max_length == 96
    assert json.loads((exported / "generation_config.json").read_text()) == {"bos_token_id": 256, "eos_token_id": 256}


def test_numbers_too_large_for_float16_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = open_run(str(model_folder(tmp_path / "run", {}, {})), LM).config
    state = dict(DecoderLM(config.model, config.moe, seed=3).named_parameters())
    state["final_norm.weight"].data[0] = 1e5
    write_model_folder(tmp_path / "large", "decoder", config, state.__getitem__, origin={})
    with pytest.raises(SystemExit) as left:
        export(tmp_path / "large", tmp_path / "exported", "--dtype", "float16")
    assert left.value.code == 2
    assert "numbers up to" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()


def test_several_files_and_half_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = model_folder(tmp_path / "run", {}, {})
    monkeypatch.setattr(directory, "SHARD_BYTES", 20_000)
    exported = export(run, tmp_path / "exported", "--dtype", "bfloat16")
    assert len(list(exported.glob("model-*.safetensors"))) > 2
    their = theirs(exported)
    assert their.dtype == torch.bfloat16
    their.set_experts_implementation("eager")  # the other one wants widths of whole 16 bytes
    ids_BS = torch.arange(10).view(1, 10)
    torch.testing.assert_close(their(input_ids=ids_BS).logits.float(), ours(run)(ids_BS), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("model", "moe", "where"),
    [
        ({}, {"router": "sigmoid"}, "model.attention_gate elementwise, moe.router sigmoid; change one"),
        (UNGATED, {"router": "sigmoid", "shared_intermediate_size": 7}, "that is no multiple of moe.intermediate_size"),
        (UNGATED, {"router": "hash"}, "moe.router: hash"),
        (UNGATED, {"router": "hash", "activation": "gelu"}, "moe.activation: gelu"),
        (UNGATED, {"expert_bias": True}, "moe.expert_bias: true"),
        (UNGATED, {"residual": True}, "moe.residual: true"),
        ({"qk_norm": "none"}, {}, "model.qk_norm none, model.attention_gate elementwise"),
        (UNGATED | {"qk_norm": "none"}, {"top_k": 1}, "model.qk_norm none, moe.router softmax, moe.top_k 1"),
        (UNGATED | {"qk_norm": "whole"}, {"enabled": False}, "model.qk_norm whole, moe.enabled false"),
        (UNGATED | {"qk_norm": "whole", "head_dim": 10}, {}, "model.head_dim: heads of 10"),
        (UNGATED | {"qk_norm": "whole"}, {"shared_intermediate_size": 4}, "moe.shared_intermediate_size"),
    ],
)
def test_what_has_no_home_is_refused_and_goes_into_a_plain_directory(
    model: dict[str, Any], moe: dict[str, Any], where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = model_folder(tmp_path / "run", model, moe)
    with pytest.raises(SystemExit) as left:
        export(run, tmp_path / "exported")
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert where in message
    assert "export it --to moe_scale" in message
    assert not (tmp_path / "exported").exists()
    plain = load_plain(export(run, tmp_path / "exported", "--to", "moe_scale"))
    ids_BS = torch.arange(22).view(2, 11)
    torch.testing.assert_close(plain(ids_BS), ours(run)(ids_BS), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_switch_transformer_has_a_plain_directory_alone(tmp_path: Path) -> None:
    config = SwitchConfig(
        model=SwitchModelConfig(num_layers=2, d_model=16, num_heads=2, vocab_size=260),
        moe=SwitchMoEConfig(num_experts=3, intermediate_size=8),
        data=TextDataConfig(tokenizer="bytes"),
    )
    made = SwitchLM(config.model, config.moe, seed=1).eval()
    weights = dict(made.named_parameters())
    run = write_model_folder(tmp_path / "run", "switch", config, weights.__getitem__, origin={})
    with pytest.raises(SystemExit):
        export(run, tmp_path / "exported")
    plain = load_plain(export(run, tmp_path / "exported", "--to", "moe_scale"))
    ids_BS = torch.arange(22).view(2, 11)
    torch.testing.assert_close(plain(ids_BS), made(ids_BS))


def test_what_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = model_folder(tmp_path / "run", {}, {})
    with pytest.raises(SystemExit):
        export(run, run)
    assert "exists" in capsys.readouterr().err
    exported = export(run, tmp_path / "exported", "--to", "moe_scale")
    content = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(content | {"format": "another"}))
    with pytest.raises(Exception, match="is not one of this project"):
        load_plain(exported)
    content["settings"]["model"]["num_layers"] = 3
    (exported / "config.json").write_text(json.dumps(content))
    with pytest.raises(Exception, match=r"layers\.2"):
        load_plain(exported)
