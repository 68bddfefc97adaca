"""Adapters: how many parameters, that nothing else changes, merging, and files that peft reads and writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from moe_scale.config import (
    DecoderConfig,
    ImageEncoderConfig,
    LMConfig,
    LoRAConfig,
    MoEConfig,
    MultimodalConfig,
)
from moe_scale.errors import ConfigError
from moe_scale.initialization import Init
from moe_scale.models.build import build_model
from moe_scale.models.decoder import DecoderLM
from moe_scale.models.lora import (
    adapter_problems,
    adapters,
    add_adapters,
    load_adapters,
    merge_adapters,
    num_adapter_params,
    save_adapters,
)
from moe_scale.models.vit import VisionTransformer
from moe_scale.models.vit_weights import load_vit
from moe_scale.settings import to_dict

VIT = ImageEncoderConfig(
    image_size=16, patch_size=8, d_model=24, num_layers=2, num_heads=4, hidden=40, dropout=0.0, norm_eps=1e-12,
    activation_checkpointing=False,
)  # fmt: skip
LORA = LoRAConfig(rank=3, alpha=12.0, targets=("q_proj", "v_proj", "layers.1.mlp.fc*"))
EXPERTS = LoRAConfig(rank=3, alpha=12.0, targets=("experts.*",))
DECODER = DecoderConfig(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, vocab_size=128)


def vit(lora: LoRAConfig | None = LORA, *, trained: bool = True) -> VisionTransformer:
    """A small ViT with adapters that are as if trained."""
    model = VisionTransformer(VIT, Init(1))
    if lora is not None:
        add_adapters(model, lora)
        if trained:
            disturb(model)
    return model.eval()


def disturb(model: nn.Module) -> None:
    """Give everything that is trained other values, as training would."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))


def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def test_the_count_is_r_times_in_plus_out() -> None:
    formula = 3 * (2 * (24 + 24) + 2 * (24 + 24) + (24 + 40) + (40 + 24))
    model = vit()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == formula
    assert num_adapter_params(vit(None), LORA) == formula
    assert len(adapters(model)) == 6
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.lora_{factor}.weight" for name in adapters(model) for factor in "AB"
    }


def test_untrained_adapters_change_nothing() -> None:
    torch.testing.assert_close(vit(trained=False)(images()), vit(None)(images()), rtol=0, atol=0)


def test_an_adapter_is_a_product_of_two_small_matrices() -> None:
    layer: Any = vit().layers[0].attention.q_proj
    x = torch.randn(5, 24)
    expected = x @ layer.weight.t() + layer.bias + 12 / 3 * (x @ layer.lora_A.weight.t() @ layer.lora_B.weight.t())
    torch.testing.assert_close(layer(x), expected)


def test_merged_is_unmerged() -> None:
    model = vit()
    expected = model(images())
    assert (expected - vit(None)(images())).abs().max() > 0.1
    merge_adapters(model)
    torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == vit(None).state_dict().keys()
    assert not adapters(model)


def test_only_adapters_learn_and_dropout_is_for_training() -> None:
    model = vit(replace(LORA, dropout=0.5)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.manual_seed(0)
    first = model(images())
    first.square().sum().backward()
    assert (model(images()) - first).abs().max() > 1e-3
    torch.testing.assert_close(model.eval()(images()), vit()(images()), rtol=0, atol=0)
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".lora_" in name}


def test_what_is_trained_beside_them() -> None:
    lora = replace(LORA, also_trained=("layernorm",))
    names = {n for n, p in vit(lora).named_parameters() if p.requires_grad and ".lora_" not in n}
    assert names == {"layernorm.weight", "layernorm.bias"}


def test_saved_alone_and_loaded(tmp_path: Path) -> None:
    lora = replace(LORA, also_trained=("layernorm",))
    model = vit(lora)
    save_adapters(model, lora, tmp_path, base="somewhere")
    again = vit(None)
    assert load_adapters(again, tmp_path).rank == 3
    torch.testing.assert_close(again.eval()(images()), model(images()), rtol=0, atol=0)
    other = VisionTransformer(replace(VIT, d_model=32), Init(1))
    with pytest.raises(ConfigError, match="do not fit"):
        load_adapters(other, tmp_path)
    with pytest.raises(ConfigError, match="no adapters can be read"):
        load_adapters(vit(None), tmp_path / "elsewhere")


def test_peft_reads_them_onto_hugging_faces_vit(tmp_path: Path) -> None:
    """The same base, our adapter files: the same output; and what peft writes is read here."""
    settings = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    torch.manual_seed(0)
    theirs = ViTModel(ViTConfig(**settings, patch_size=8, image_size=16), add_pooling_layer=False).eval()
    theirs.save_pretrained(tmp_path / "base")
    ours = VisionTransformer(VIT, Init(1)).eval()
    load_vit(ours, str(tmp_path / "base"))
    add_adapters(ours, LORA)
    disturb(ours)
    save_adapters(ours, LORA, tmp_path / "adapter", base=str(tmp_path / "base"))

    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    found = adapted(images()).last_hidden_state
    torch.testing.assert_close(found, ours(images()), rtol=1e-5, atol=1e-5)
    plain = VisionTransformer(VIT, Init(1)).eval()
    load_vit(plain, str(tmp_path / "base"))
    assert (found - plain(images())).abs().max() > 0.1
    merged = adapted.merge_and_unload()(images()).last_hidden_state
    merge_adapters(ours)
    torch.testing.assert_close(merged, ours(images()), rtol=1e-5, atol=1e-5)

    base = ViTModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    made = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["k_proj", "fc2"])).eval()
    disturb(made)
    made.save_pretrained(tmp_path / "theirs")
    load_adapters(plain, tmp_path / "theirs")
    torch.testing.assert_close(plain(images()), made(images()).last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "another kind"),
        ({"use_rslora": True}, "another kind"),
        ({"peft_type": "IA3"}, "another kind"),
        ({"target_modules": ".*attention"}, "a list of names"),
    ],
)
def test_files_of_other_kinds_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    save_adapters(vit(), LORA, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text()) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=says):
        load_adapters(vit(None), tmp_path)


def test_language_models_have_them_too() -> None:
    """Attention and routers of a decoder with experts; the router's scores stay fp32 in a bf16 model."""
    moe = MoEConfig(num_experts=4, intermediate_size=16)
    model = DecoderLM(DECODER, moe).to(torch.bfloat16).eval()
    lora = LoRAConfig(rank=2, targets=("qkv", "attention.out", "router"))
    add_adapters(model, lora)
    assert len(adapters(model)) == 2 * 3
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    disturb(model)
    ids = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    router: Any = model.get_submodule("layers.0.moe.router")
    assert router(torch.randn(3, 32, dtype=torch.bfloat16)).dtype == torch.float32
    expected = model.float()(ids, ids).loss
    merge_adapters(model)
    torch.testing.assert_close(model(ids, ids).loss, expected, rtol=1e-5, atol=1e-5)


def experts(lora: LoRAConfig | None = EXPERTS) -> DecoderLM:
    """A small decoder with experts, their adapters as if trained."""
    model = DecoderLM(DECODER, MoEConfig(num_experts=4, intermediate_size=16, shared_intermediate_size=12), seed=3)
    if lora is not None:
        add_adapters(model, lora)
        disturb(model)
    return model.eval()


def tokens() -> torch.Tensor:
    return torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(0))


def test_each_expert_has_factors_of_its_own() -> None:
    lora = replace(EXPERTS, targets=("attention.*", "router", "experts.*", "dense.*"))
    qkv, out, gate, router = 32 + 64, 32 + 32, 32 + 32, 32 + 4
    formula = 2 * 3 * (qkv + out + gate + router + 4 * ((32 + 32) + (16 + 32)) + (32 + 24) + (12 + 32))
    model = experts(lora)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == formula
    assert num_adapter_params(experts(None), lora) == formula
    assert len(adapters(model)) == 2 * (3 + 1 + 2 + 2)
    assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_merged_experts_are_unmerged_ones() -> None:
    lora = replace(EXPERTS, targets=("experts.*", "dense.*", "router", "qkv"))
    model, base = experts(lora), experts(None)
    expected = model(tokens())
    assert (expected - base(tokens())).abs().max() > 0.1
    merge_adapters(model)
    torch.testing.assert_close(model(tokens()), expected, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert not adapters(model)


@pytest.mark.parametrize("targets", [("experts.*",), ("experts.down",), ("experts.*", "dense.*")])
def test_peft_reads_and_writes_those_of_experts(tmp_path: Path, targets: tuple[str, ...]) -> None:
    """As ``target_parameters``, onto the model that they stand beside here."""
    lora = replace(EXPERTS, targets=targets)
    model = experts(lora)
    save_adapters(model, lora, tmp_path)
    adapted: Any = peft.PeftModel.from_pretrained(experts(None), tmp_path).eval()
    torch.testing.assert_close(adapted(tokens()), model(tokens()), rtol=1e-5, atol=1e-5)
    adapted.save_pretrained(tmp_path / "theirs")
    again = experts(None)
    assert load_adapters(again, tmp_path / "theirs").rank == 3
    torch.testing.assert_close(again(tokens()), model(tokens()), rtol=1e-5, atol=1e-5)


def test_experts_of_kernels_that_take_no_adapters_are_refused() -> None:
    with torch.device("meta"):
        model = DecoderLM(DECODER, MoEConfig(num_experts=4, intermediate_size=16, kernels="triton"))
    (problem,) = adapter_problems(model, EXPERTS)
    assert problem.where == "moe.kernels"
    assert not adapter_problems(model, replace(EXPERTS, targets=("attention.*", "router")))


def test_names_that_fit_nothing_are_told_with_those_there_are() -> None:
    lora = LoRAConfig(rank=2, targets=("q_proj", "kproj"), also_trained=("head",))
    problems = adapter_problems(vit(None), lora)
    assert [problem.where for problem in problems] == ["lora.targets", "lora.also_trained"]
    assert str(problems[0]).endswith("names end in fc1, fc2, k_proj, o_proj, q_proj, v_proj")
    model = vit(None)
    with pytest.raises(ConfigError):
        add_adapters(model, lora)
    assert all(p.requires_grad for p in model.parameters())
    embedding = adapter_problems(
        DecoderLM(DECODER, MoEConfig(enabled=False)), LoRAConfig(rank=2, targets=("embedding",))
    )
    assert "no linear layer" in str(embedding[0])


def test_a_run_with_adapters_names_a_model_with_them() -> None:
    config = MultimodalConfig(lora=LoRAConfig(rank=2, targets=("q_proj",)))
    names = [name for name, _ in build_model("text-image", to_dict(config)).named_parameters() if ".lora_" in name]
    assert len(names) == 2 * config.model.image_layers
    plain = LMConfig(model=DECODER)
    assert not adapters(build_model("decoder", to_dict(plain)))
