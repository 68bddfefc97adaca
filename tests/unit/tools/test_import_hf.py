"""Imported models against the ones of transformers that they come from, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from moe_scale.cli import main
from moe_scale.data.tokenizer import load_tokenizer, write_tokenizer
from tests.hf import assert_same_model, model_folder, ours, randomized, theirs

K, V = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv")
COMMON = {
    "vocab_size": 260, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 20, "max_position_embeddings": 96, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2}
WIDE = {"moe_intermediate_size": 12, "intermediate_size": 24}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
WHOLE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
    "partial_rotary_factor": 1.0, "layer_types": ["full_attention"] * 2, "head_dim": 6, "moe_intermediate_size": 12,
}  # fmt: skip
GLM = {
    "n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "first_k_dense_replace": 0,
    "use_qk_norm": True, "partial_rotary_factor": 1.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", ROPE),
    "llama, tied, mha": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "qwen3": ("qwen3", ROPE | {"head_dim": 10}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 6}),
    "mixtral": ("mixtral", {"num_local_experts": 5}),
    "mixtral, wide heads": ("mixtral", {"num_local_experts": 3, "head_dim": 8, "tie_word_embeddings": True}),
    "olmoe": ("olmoe", EXPERTS),
    "olmoe, mha, normed": ("olmoe", EXPERTS | ROPE | {"norm_topk_prob": True, "num_key_value_heads": 4}),
    "qwen3_moe": ("qwen3_moe", EXPERTS | ROPE | {"head_dim": 10, "moe_intermediate_size": 12}),
    "qwen3_moe, normed": ("qwen3_moe", EXPERTS | {"moe_intermediate_size": 12, "head_dim": 6, "norm_topk_prob": True}),
    "qwen3_moe, one expert": (
        "qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 12, "head_dim": 6},
    ),
    "glm4_moe": ("glm4_moe", GLM | {"head_dim": 6}),
    "glm4_moe, wide heads, two shared experts": ("glm4_moe", GLM | {"head_dim": 10, "n_shared_experts": 2}),
    "qwen3_moe, every second layer": (
        "qwen3_moe",
        EXPERTS | WIDE | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "head_dim": 6},
    ),
    "qwen3_moe, layers by name": (
        "qwen3_moe",
        EXPERTS | WIDE | {"num_hidden_layers": 4, "mlp_only_layers": [0, 2], "head_dim": 6},
    ),
}  # fmt: skip


def make(
    folder: Path, model_type: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32, **saving: Any
) -> PreTrainedModel:
    """A model of random weights in a directory, with the tokenizer of bytes."""
    config = AutoConfig.for_model(model_type, **(COMMON | settings))
    torch.manual_seed(3)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    randomized(made)
    made.to(dtype)
    made.save_pretrained(folder, **saving)
    write_tokenizer(load_tokenizer("bytes"), folder, 96)
    return made


def imported(source: Path, target: Path, *flags: str) -> Path:
    main(["import", str(source), "--output_dir", str(target), *flags])
    return target


@pytest.mark.parametrize("case", MODELS)
def test_it_computes_what_theirs_does(case: str, tmp_path: Path) -> None:
    their = make(tmp_path / "theirs", *MODELS[case])
    folder = imported(tmp_path / "theirs", tmp_path / "ours")
    assert_same_model(ours(folder), their)
    # And back: the same family opens what is exported of it.
    main(["export", str(folder), "--output_dir", str(tmp_path / "back")])
    back = theirs(tmp_path / "back")
    assert back.config.model_type == their.config.model_type
    ids_BS = torch.arange(9).view(1, 9)
    torch.testing.assert_close(back(input_ids=ids_BS).logits, their(input_ids=ids_BS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [0, 10])
@pytest.mark.parametrize("gate", ["none", "headwise", "elementwise"])
def test_what_was_exported_comes_back(gate: str, shared: int, tmp_path: Path) -> None:
    run = model_folder(tmp_path / "run", {"attention_gate": gate}, {"shared_intermediate_size": shared})
    main(["export", str(run), "--output_dir", str(tmp_path / "exported")])
    back = ours(imported(tmp_path / "exported", tmp_path / "back"))
    assert back.config.tie_embeddings, "a head that equals the embedding is tied"
    assert back.moe_config.shared_intermediate_size == shared
    ids_BS = torch.arange(18).view(2, 9)
    torch.testing.assert_close(back(ids_BS), ours(run)(ids_BS), rtol=1e-5, atol=1e-5)


def test_its_tokenizer_comes_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "theirs", "llama", {})
    folder = imported(tmp_path / "theirs", tmp_path / "ours")
    shutil.rmtree(tmp_path / "theirs")
    main(["generate", "--run", str(folder), "--prompt", "Naïve", "--max_tokens", "3"])
    assert "1 text, 3 tokens" in capsys.readouterr().err
    assert json.loads((folder / "run.json").read_text())["settings"]["data"]["seq_len"] == 96


def test_a_tokenizer_from_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "theirs", "llama", {})
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    (tmp_path / "theirs" / "tokenizer_config.json").unlink()
    for flags, message in (([], "data.tokenizer"), (["--tokenizer", "gpt2"], "gpt2 has 50257 tokens, the model 260")):
        with pytest.raises(SystemExit):
            imported(tmp_path / "theirs", tmp_path / "ours", *flags)
        assert message in capsys.readouterr().err
        assert not (tmp_path / "ours").exists()
    folder = imported(tmp_path / "theirs", tmp_path / "ours", "--tokenizer", "bytes")
    assert json.loads((folder / "run.json").read_text())["settings"]["data"]["tokenizer"] == "bytes"


def test_several_files_in_bf16_stay_as_they_are(tmp_path: Path) -> None:
    make(tmp_path / "theirs", "llama", {}, torch.bfloat16, max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    folder = imported(tmp_path / "theirs", tmp_path / "ours")
    [file] = folder.glob("checkpoints/step_*/model-*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias: True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: gelu"),
        ("mixtral", {"num_local_experts": 3, "sliding_window": 8}, "sliding_window: 8"),
        ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1}, "num_experts_per_tok: 1"),
        ("olmoe", EXPERTS | {"clip_qkv": 3.0}, "clip_qkv: 3.0"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_parameters: linear",
        ),
        (
            "qwen3_moe",
            EXPERTS | {"moe_intermediate_size": 10, "mlp_only_layers": [1]},
            "mlp_only_layers: layers 0 have experts",
        ),
        (
            "qwen3_moe",
            EXPERTS | {"moe_intermediate_size": 12, "num_hidden_layers": 4, "decoder_sparse_step": 2},
            "intermediate_size: 20 in dense layers beside 2 experts of 12",
        ),
        ("glm4_moe", GLM | {"n_routed_experts": 4, "n_group": 2}, "n_group: 2"),
        ("glm4_moe", GLM | {"first_k_dense_replace": 1}, "first_k_dense_replace: 1"),
        ("gpt2", {}, "'gpt2' is not known here"),
        ("qwen3_next", EXPERTS | WHOLE | {"shared_expert_intermediate_size": 8}, "mlp.shared_expert_gate"),
        ("qwen3_next", EXPERTS | WHOLE | {"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
    ],
)
def test_what_has_no_counterpart_is_refused(
    model_type: str, settings: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "theirs", model_type, settings)
    with pytest.raises(SystemExit) as left:
        imported(tmp_path / "theirs", tmp_path / "ours")
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\1" * 100)


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def set_to(name: str, value: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))

    return apply


def indexed(content: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "m.safetensors")
        (folder / "model.safetensors.index.json").write_text(content)

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weights, "has no model.safetensors"),
        (damaged, "cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (changed(lambda tensors: tensors.pop("model.norm.weight")), "has no model.norm.weight"),
        (changed(lambda tensors: tensors.update(bias=torch.zeros(2))), "has a tensor without counterpart: bias"),
        (
            changed(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(2)})),
            "model.norm.weight is (2,), and config.json makes it (24,)",
        ),
        # Rows that add up: of v to k, so that both together are as many as they have to be.
        (
            changed(lambda t: t.update({K: torch.zeros(16, 24), V: torch.zeros(8, 24)})),
            f"{K} is (16, 24), and config.json makes it (12, 24)",
        ),
        (changed(lambda t: t.update({K: torch.zeros(12, 24, dtype=torch.int8)})), f"{K} is of I8, and quantized"),
        (set_to("num_attention_heads", 0), "config.json cannot be read (integer modulo by zero)"),
        (set_to("num_hidden_layers", 0), "num_layers: 0 in config.json"),
        (set_to("rms_norm_eps", None), "Field 'rms_norm_eps'"),
        (indexed("[]"), "model.safetensors.index.json cannot be read"),
        (indexed('{"weight_map": {"a": 3}}'), "model.safetensors.index.json cannot be read"),
        (indexed('{"weight_map": {"a": "../theirs/m.safetensors"}}'), "is no name of a file beside it"),
    ],
)
def test_a_directory_that_is_not_whole_is_refused(
    damage: Callable[[Path], None], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "theirs", "llama", {})
    damage(tmp_path / "theirs")
    with pytest.raises(SystemExit) as left:
        imported(tmp_path / "theirs", tmp_path / "ours")
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()
