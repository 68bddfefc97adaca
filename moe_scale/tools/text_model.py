"""A language model of a stored run, opened to generate text: what ``generate`` and ``serve`` share."""

from __future__ import annotations

import argparse
from typing import Any, cast

import torch

from moe_scale.data.sentinels import with_sentinels
from moe_scale.data.tokenizer import load_tokenizer
from moe_scale.errors import ConfigError, Problem
from moe_scale.generate.text_model import TextModel
from moe_scale.models.cache import CausalModel
from moe_scale.tools.arguments import positive
from moe_scale.tools.stored_run import LM, SWITCH, open_run


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model, and how much it is shown."""
    parser.add_argument("--run", required=True, help="folder of a run, which means its newest checkpoint, or of one")
    parser.add_argument(
        "--context", type=positive, metavar="TOKENS",
        help="tokens of a prompt and its continuation, at most; beyond what the model was trained on expect worse text "
        "[the run's data.seq_len]",
    )  # fmt: skip
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, ...; auto takes an accelerator that is there [%(default)s]"
    )


def open_text_model(arguments: argparse.Namespace) -> TextModel:
    """The model that :func:`add_model_arguments` names.

    Raises:
        ConfigError: when the run holds no model that can generate text, or the device is not there.
    """
    device = find_device(arguments.device)
    stored = open_run(arguments.run, LM, SWITCH)
    config = stored.config
    fills_in = stored.index.kind == SWITCH.name and not config.model.is_causal
    if config.moe.enabled and config.moe.router == "expert_choice":
        what = f"{arguments.run} was trained with moe.router expert_choice: its experts look at later tokens to choose"
        raise ConfigError(Problem("--run", what, "text can be generated with the other routers"))
    tokenizer = load_tokenizer(stored.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        what = f"{stored.tokenizer} has {tokenizer.vocab_size} tokens, the model {config.model.vocab_size}"
        raise ConfigError(Problem("data.tokenizer", what, "it is not the one that the run was trained with"))
    model = stored.load_model(dropless=True).to(device)
    causal = cast(CausalModel[Any], model)
    context = arguments.context or (config.sequence_length if fills_in else config.data.seq_len)
    if causal.max_positions is not None and context > causal.max_positions:
        what = f"{context}, and the model has {causal.max_positions} learned positions"
        raise ConfigError(Problem("--context", what, f"choose 1 to {causal.max_positions}"))
    if not fills_in:
        return TextModel(stored.folder.name, causal, tokenizer, context, device)
    first = tokenizer.vocab_size
    tokenizer = with_sentinels(tokenizer, config.model.num_sentinels)
    return TextModel(stored.folder.name, causal, tokenizer, context, device, first)


def find_device(name: str) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        ConfigError: when there is none of that name.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        there = "auto or cpu" if found is None else f"auto, cpu or {found.type}"
        raise ConfigError(Problem("--device", f"{name!r} is not there", f"choose {there}", True)) from None
    return device
