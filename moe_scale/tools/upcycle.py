"""``moe-scale upcycle``: make a mixture of experts of a dense model, with the loss that the dense model has."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_scale.checkpoint.index import verify
from moe_scale.checkpoint.reader import MergedReader
from moe_scale.config import MoEConfig
from moe_scale.errors import ConfigError, Problem, raise_if
from moe_scale.initialization import Init
from moe_scale.models.counts import num_active_params, num_params
from moe_scale.models.layers import dense_hidden
from moe_scale.models.upcycle import (
    experts_down,
    experts_gate_up,
    router_rows,
    upcycle_problems,
    upcycled_settings,
)
from moe_scale.tools.arguments import not_negative, positive
from moe_scale.tools.stored_run import LM, StoredRun, open_run
from moe_scale.train.model_folder import copy_of_tokenizer, new_folder, write_model_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's flags."""
    parser.add_argument("dense", help="run, checkpoint or model folder of a dense lm_16l (moe.enabled false)")
    parser.add_argument("--num_experts", type=positive, required=True, help="experts of a sparse layer (E)")
    parser.add_argument("--output_dir", required=True, help="folder that becomes the model; it must not exist")
    parser.add_argument(
        "--granularity", type=positive, default=1,
        help="experts that the feed-forward is cut into; 1 makes each expert a copy of it [%(default)s]",
    )  # fmt: skip
    parser.add_argument(
        "--top_k", type=positive,
        help="experts that each token is sent to (K), a multiple of --granularity; as many as that cost what the dense "
        "model costs [--granularity, 2 for copies]",
    )  # fmt: skip
    parser.add_argument("--every", type=positive, default=1, help="every n-th layer becomes sparse [%(default)s]")
    parser.add_argument("--seed", type=not_negative, default=1234, help="of the routers' weights [%(default)s]")


def run(arguments: argparse.Namespace) -> Path:
    """Write the model folder.

    Raises:
        ConfigError: if the model is not dense, its feed-forwards cannot be shared out like this, or the folder is there
            already; nothing is written then.
    """
    target = new_folder(arguments.output_dir)
    stored = open_run(arguments.dense, LM)
    config = stored.config
    if config.moe.enabled:
        what = f"{arguments.dense} has experts already"
        raise ConfigError(Problem("dense", what, "name a run with moe.enabled false, or a dense model's folder"))
    hidden, granularity = dense_hidden(config.moe), arguments.granularity
    shape = arguments.num_experts, arguments.top_k or max(granularity, 2), granularity, arguments.every
    raise_if(upcycle_problems(*shape, hidden, config.model.num_layers))
    moe = upcycled_settings(config.moe, *shape, hidden)
    sparse = replace(config, moe=moe)
    raise_if(moe.problems("moe"))
    verify(stored.checkpoint, stored.index)
    write_model_folder(
        target,
        LM.name,
        sparse,
        _weights(stored, moe, granularity, arguments.seed),
        origin={"tool": "upcycle", "dense": str(stored.checkpoint), "granularity": granularity},
        tokenizer=copy_of_tokenizer(stored.tokenizer),
    )
    before, after = (num_params(c.model, c.moe).total for c in (config, sparse))
    active = num_active_params(sparse.model, moe).total
    print(f"wrote {target}: {moe.num_experts} experts of {moe.intermediate_size}, {moe.top_k} a token")
    print(f"{before:,} parameters became {after:,}, {active:,} active a token")
    print(f"train on with: python recipes/lm_16l.py --config {target / 'settings.yaml'}")
    return target


def _weights(stored: StoredRun[Any], moe: MoEConfig, granularity: int, seed: int) -> Callable[[str], Tensor]:
    """Of each tensor of the sparse model its values."""
    reader, init = MergedReader(stored.checkpoint, stored.index), Init(seed)

    def weight(name: str) -> Tensor:
        layer, _, part = name.partition(".moe.")
        if part == "router.weight":
            path = init / "layers" / layer.rpartition(".")[2] / "moe" / "router"
            width = stored.config.model.d_model
            return router_rows(width, moe.num_experts, granularity, path, moe.router_init_scale)
        if part == "experts.gate_up":
            return experts_gate_up(reader.weight(f"{layer}.ffn.gate_up.weight"), moe.num_experts, granularity)
        if part == "experts.down":
            return experts_down(reader.weight(f"{layer}.ffn.down.weight"), moe.num_experts, granularity)
        return reader.weight(name)

    return weight
