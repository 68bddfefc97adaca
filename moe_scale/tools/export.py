"""``moe-scale export``: write a trained language model for other programs, as Hugging Face transformers have it."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_scale.checkpoint import folder as folders
from moe_scale.checkpoint.index import verify
from moe_scale.checkpoint.reader import MergedReader
from moe_scale.data.tokenizer import copy_tokenizer, load_tokenizer, write_tokenizer
from moe_scale.errors import ConfigError, Problem
from moe_scale.models.hf.directory import CONFIG, write_tensors
from moe_scale.models.hf.families import GLOBAL_NAMES, SELECTION_BIAS, Family
from moe_scale.models.hf.settings import home_of, to_hf
from moe_scale.models.hf.tensors import rules
from moe_scale.models.plain import plain_settings
from moe_scale.tools.stored_run import LM, SWITCH, StoredRun, open_run
from moe_scale.train.model_folder import new_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's flags."""
    parser.add_argument("run", help="folder of a run, which means its newest checkpoint, or of a checkpoint")
    parser.add_argument(
        "--to", choices=("hf", "moe_scale"), default="hf",
        help="hf: a directory for transformers' AutoModelForCausalLM; moe_scale: the weights of any language model "
        "and its settings, for load_plain of moe_scale.models.plain [%(default)s]",
    )  # fmt: skip
    parser.add_argument("--output_dir", required=True, help="folder that becomes the exported model; it must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the weights [%(default)s]")


def run(arguments: argparse.Namespace) -> Path:
    """Write the model, and its tokenizer beside it.

    Raises:
        ConfigError: if the run is damaged, the model has no counterpart in transformers, or the folder is there
            already; nothing is written then.
    """
    target = new_folder(arguments.output_dir)
    stored = open_run(arguments.run, *((LM,) if arguments.to == "hf" else (LM, SWITCH)))
    family = _home(stored) if arguments.to == "hf" else None
    verify(stored.checkpoint, stored.index)
    dtype = DTYPES[arguments.dtype]
    partial = folders.partial_of(target)
    try:
        folders.begin(target)
        settings = plain_settings(stored.index.kind, stored.index.settings)
        tensors = _as_they_are(stored)
        if family is not None:
            settings, tensors = _hf_settings(stored, family, arguments.dtype), _renamed(stored, family)
        _write_settings(partial, settings)
        size = write_tensors(partial, ((name, _rounded(name, tensor, dtype)) for name, tensor in tensors))
        _write_tokenizer(partial, stored)
        partial.rename(target)
    except OSError as error:
        raise ConfigError(Problem("--output_dir", f"{target} cannot be written: {error.strerror}")) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"wrote {target}: {family.architecture if family else stored.index.kind}, {size / 1e6:,.1f} MB of weights")
    for remark in _remarks(stored):
        print(f"note: {remark}")
    return target


def _home(stored: StoredRun[Any]) -> Family:
    try:
        return home_of(stored.config.model, stored.config.moe)
    except ConfigError as error:
        instead = Problem("--to", "no model of transformers computes what this one does", "export it --to moe_scale")
        raise ConfigError([*error.problems, instead]) from None


def _hf_settings(stored: StoredRun[Any], family: Family, dtype: str) -> dict[str, Any]:
    config = stored.config
    eot_id = load_tokenizer(stored.tokenizer).eot_id
    return to_hf(family, config.model, config.moe, max_positions=config.data.seq_len, eot_id=eot_id, dtype=dtype)


def _renamed(stored: StoredRun[Any], family: Family) -> Iterator[tuple[str, Tensor]]:
    """The tensors as the family has them."""
    reader = MergedReader(stored.checkpoint, stored.index)
    for rule in rules(family, stored.config.model, stored.config.moe):
        tensors = rule.to_theirs([reader.weight(name).float() for name in rule.ours])
        yield from zip(rule.theirs, tensors, strict=True)
    if stored.config.model.tie_embeddings and not family.ties:
        yield GLOBAL_NAMES["head.weight"], reader.weight("embedding.weight")


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the chosen precision, but for selection biases.

    Raises:
        ConfigError: if a number is too large for it, as some above 65,504 are for float16.
    """
    if name.endswith((SELECTION_BIAS, "selection_bias_E")):
        return tensor.float()
    rounded = tensor.to(dtype)
    if bool((rounded.isinf() & tensor.isfinite()).any()):
        what = f"{name} has numbers up to {float(tensor.abs().max()):,.0f}, which {dtype} does not hold"
        raise ConfigError(Problem("--dtype", what, "choose bfloat16 or float32"))
    return rounded


def _as_they_are(stored: StoredRun[Any]) -> Iterator[tuple[str, Tensor]]:
    reader = MergedReader(stored.checkpoint, stored.index)
    return ((name, reader.weight(name)) for name in reader.names)


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    generation = {name: settings[name] for name in ("bos_token_id", "eos_token_id") if name in settings}
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path, stored: StoredRun[Any]) -> None:
    source = Path(stored.tokenizer).expanduser()
    if source.is_dir():
        copy_tokenizer(source, folder)
    else:
        write_tokenizer(load_tokenizer(stored.tokenizer), folder, stored.config.data.seq_len)


def _remarks(stored: StoredRun[Any]) -> list[str]:
    """How the exported model differs from the run's."""
    moe, found = stored.config.moe, []
    if moe.enabled and moe.dispatch == "capacity":
        found.append("trained with moe.dispatch capacity; exported models drop no token, as moe-scale generate does")
    if stored.index.kind == LM.name and stored.config.lora.enabled:
        found.append(f"the adapters of rank {stored.config.lora.rank} are part of the exported weights")
    return found
