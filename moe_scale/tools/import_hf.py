"""``moe-scale import``: make a model folder of a decoder of Hugging Face transformers, to train or to use."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moe_scale.config import LMConfig, TextDataConfig
from moe_scale.data.tokenizer import load_tokenizer
from moe_scale.errors import ConfigError, Problem, raise_if
from moe_scale.models.build import build_model
from moe_scale.models.hf.directory import FLOATS, Directory
from moe_scale.models.hf.families import FAMILIES
from moe_scale.models.hf.settings import from_hf
from moe_scale.models.hf.tensors import Rule, rules
from moe_scale.settings import to_dict
from moe_scale.tools.stored_run import LM
from moe_scale.train.model_folder import copy_of_tokenizer, new_folder, write_model_folder

_IGNORED = ("rotary_emb.inv_freq",)
"""Ends of names of tensors that older releases stored though they follow from the settings."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's flags."""
    known = ", ".join(family.architecture.removesuffix("ForCausalLM") for family in FAMILIES)
    parser.add_argument("source", help=f"directory with config.json and safetensors files, of one of {known}")
    parser.add_argument("--output_dir", required=True, help="folder that becomes the model; it must not exist")
    parser.add_argument(
        "--tokenizer", default="",
        help="what data.tokenizer takes, where the model's own is not in its directory [the directory's]",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> Path:
    """Write the model folder.

    Raises:
        ConfigError: if the model computes what none of this project does, or its directory is not whole, or the folder
            is there already; nothing is written then.
    """
    target = new_folder(arguments.output_dir)
    directory = Directory(Path(arguments.source).expanduser(), "source")
    family, model, moe = from_hf(directory)
    found = list(rules(family, model, moe))
    _require_names(directory, found, tied=model.tie_embeddings)
    name = arguments.tokenizer or str(directory.path)
    tokenizer = load_tokenizer(name)
    if tokenizer.vocab_size > model.vocab_size:
        what = f"{name} has {tokenizer.vocab_size} tokens, the model {model.vocab_size}"
        raise ConfigError(Problem("--tokenizer", what, "name the one that the model was trained with"))
    positions = directory.settings.get("max_position_embeddings") or TextDataConfig().seq_len
    config = LMConfig(model=model, moe=moe, data=TextDataConfig(tokenizer=name, seq_len=positions))
    raise_if(config.problems())
    _require_shapes(directory, found, config)
    write_model_folder(
        target,
        LM.name,
        config,
        _weights(directory, found),
        origin={"tool": "import", "source": str(directory.path.resolve()), "architecture": family.architecture},
        tokenizer=copy_of_tokenizer(name),
    )
    sparse = f"{moe.num_experts} experts, {moe.top_k} a token" if moe.enabled else "dense"
    print(f"wrote {target}: {family.architecture}, {model.num_layers} layers of {model.d_model}, {sparse}")
    print(f"train on with: python recipes/lm_16l.py --config {target / 'settings.yaml'}")
    return target


def _require_names(directory: Directory, found: list[Rule], *, tied: bool) -> None:
    """Raise unless the directory has the tensors that the rules name, and no other."""
    expected = {name for rule in found for name in rule.theirs}
    extra = {name for name in directory.names - expected if not name.endswith(_IGNORED)}
    extra -= {"lm_head.weight"} if tied else set()  # the embedding's weight once more
    for names, what in ((expected - directory.names, "has no"), (extra, "has a tensor without counterpart:")):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ConfigError(Problem("source", f"{directory.path} {what} {some}", "", True))


def _require_shapes(directory: Directory, found: list[Rule], config: LMConfig) -> None:
    """Raise unless each tensor, of which the header alone is read, is as large as the settings make it."""
    model = build_model(LM.name, to_dict(config))  # on the meta device, where rules change shapes alone
    ours = dict(model.named_parameters()) | dict(model.named_buffers())
    wrong = []
    for rule in (rule for rule in found if rule.ours):
        for name, tensor in zip(rule.theirs, rule.to_theirs([ours[own] for own in rule.ours]), strict=True):
            said, shape = directory.headers[name], tuple(tensor.shape)
            if said.shape != shape:
                wrong.append(f"{name} is {said.shape}, and config.json makes it {shape}")
            elif said.dtype not in FLOATS:
                wrong.append(f"{name} is of {said.dtype}, and quantized weights are not read")
    raise_if([Problem("source", f"{directory.path}: {what}", "", True) for what in wrong[:5]])


def _weights(directory: Directory, found: list[Rule]) -> Callable[[str], Tensor]:
    """Of each of our tensors its values; what comes from the same tensors of theirs is read once."""
    rule_of = {name: rule for rule in found for name in rule.ours}

    @functools.lru_cache(maxsize=2)
    def of_rule(ours: tuple[str, ...]) -> dict[str, Tensor]:
        rule = rule_of[ours[0]]
        return dict(zip(ours, rule.to_ours([_plain(directory.tensor(name)) for name in rule.theirs]), strict=True))

    return lambda name: of_rule(rule_of[name].ours)[name]


def _plain(tensor: Tensor) -> Tensor:
    """In a precision that a checkpoint has."""
    return tensor if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) else tensor.float()
