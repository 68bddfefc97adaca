"""``moe-scale prune``: drop experts of a trained language model, or merge them, and tell what that costs.

What stays is chosen by what calibration text, from the run's own training data, makes of each expert. Held-out text is
for measuring alone.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_scale.checkpoint.reader import load_model
from moe_scale.config import DecoderLoRAConfig, LMConfig
from moe_scale.data.packing import Batch
from moe_scale.data.text import PreparedText, StreamedText, eval_batches, open_text, train_loader
from moe_scale.data.tokenizer import TextTokenizer, load_tokenizer
from moe_scale.errors import Problem, raise_if
from moe_scale.evaluate.language_model import LMScores, score
from moe_scale.models.counts import num_active_params, num_params
from moe_scale.models.lora import merge_adapters
from moe_scale.models.pruning import kept_number, prune_model, pruned_config, pruning_problems
from moe_scale.telemetry.provenance import commit_of, hide_arguments
from moe_scale.tools.arguments import not_negative, positive, probability
from moe_scale.tools.prune_choice import RANKINGS, Choice, Method, choose
from moe_scale.tools.prune_recover import Recovery
from moe_scale.tools.prune_report import FULL, Row, show_report, write_report
from moe_scale.tools.stored_run import LM, StoredRun, open_run
from moe_scale.tools.text_model import find_device
from moe_scale.train.model_folder import new_folder, write_model_folder
from moe_scale.train.pretrained import tokenizer_of
from moe_scale.train.recipe import CHECKOUT

MICRO_BATCH = 8
"""Sequences that a model is given at a time."""

NOT_COMPARED = {"by": None, "merge": False, "seed": None}
"""Arguments that say what ``--compare`` varies, with their values where they are not given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's flags; whatever else is given is a setting of the recovery."""
    parser.add_argument(
        "run", help="folder of a run of recipes/lm_16l.py, which means its newest checkpoint, or of one"
    )
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="new folder for the pruned model")
    parser.add_argument("--keep", type=probability, default=0.5, help="share of each layer's experts [%(default)s]")
    parser.add_argument(
        "--by",
        choices=RANKINGS,
        help="which stay [usage]: " + "; ".join(f"{n} = {what}" for n, what in RANKINGS.items()),
    )
    parser.add_argument(
        "--merge", action="store_true",
        help="average those that go, by usage, each into the one whose router scores are most alike",
    )  # fmt: skip
    parser.add_argument("--seed", type=not_negative, metavar="S", help="of --by random [0]")
    parser.add_argument(
        "--calibration_tokens", type=positive, default=16_384, metavar="N",
        help="tokens of the run's training text that experts are judged by [%(default)s]",
    )  # fmt: skip
    parser.add_argument(
        "--compare", action="store_true",
        help="prune by every ranking, merge, and draw at random, each a model in the folder, and compare them",
    )  # fmt: skip
    parser.add_argument("--seeds", type=positive, metavar="N", help="with --compare: random draws [3]")
    parser.add_argument(
        "--recover", type=positive, metavar="N",
        help="train N steps after pruning, by the recipe and the run's settings but for a lower learning rate; what "
        "follows, as --optim.lr 1e-4, wins over those",
    )  # fmt: skip
    parser.add_argument("--ranks", type=positive, metavar="N", help="of the recovery, on this machine [1]")
    parser.add_argument(
        "--recipe", default=str(CHECKOUT / "recipes" / f"{LM.recipe}.py"), metavar="FILE",
        help=f"of the recovery [recipes/{LM.recipe}.py]",
    )  # fmt: skip
    parser.add_argument(
        "--device",
        default="auto",
        help="of all but the recovery: cpu, cuda, ...; auto takes an accelerator [%(default)s]",
    )


def run(arguments: argparse.Namespace, settings: Sequence[str] = ()) -> list[Row]:
    """Prune and measure; write the models, ``prune.json`` and ``prune.md``, and print the table.

    Args:
        settings: of the recovery.

    Raises:
        ConfigError: when the run cannot be pruned as asked for, or the folder is there; nothing is written then.
        RecoveryError: if a recovery fails. The pruned models are there then, with what is known of them.
    """
    raise_if(_contradictions(arguments, settings))
    folder, device = new_folder(arguments.output_dir), find_device(arguments.device)
    stored = open_run(arguments.run, LM)
    data = replace(stored.config.data, tokenizer=stored.tokenizer)
    # Adapters are merged: what is pruned is one model, and a recovery trains all of it.
    stored = replace(stored, config=replace(stored.config, data=data, lora=DecoderLoRAConfig()))
    num_kept = kept_number(stored.config.moe.num_experts, arguments.keep)
    raise_if(pruning_problems(arguments.run, stored.config.moe, stored.config.model.num_layers, num_kept))
    pruned = replace(stored.config, moe=pruned_config(stored.config.moe, num_kept))
    recovery, tokens = None, 0
    if arguments.recover:
        recovery = Recovery(arguments.recover, arguments.ranks or 1, Path(arguments.recipe), tuple(settings))
        tokens = arguments.recover * recovery.check(pruned, folder).tokens_per_step
    text = _Text.open(stored.config)
    model = stored.load_model(dropless=True).to(device)
    merge_adapters(model)
    methods = _methods(arguments)
    choices = choose(model, text.calibration(arguments.calibration_tokens, device), methods, num_kept)
    scores = text.scores(model, device)
    print(f"{FULL}: held-out loss {scores.loss:.4f}", flush=True)
    bench = _Bench(stored, pruned, text, device, folder)
    rows = [bench.row(FULL, None, model, stored.config, scores.loss, {}, stored.checkpoint)]
    for method, choice in choices.items():
        rows.append(bench.prune(model, method, choice, folder / method.name if arguments.compare else folder))
    facts = _facts(arguments, settings, stored) | {"heldout_tokens": scores.tokens, "recovery_tokens": tokens}
    write_report(rows, facts, folder)
    if recovery is not None:
        for place, row in enumerate(rows):
            if row.method or arguments.compare:
                rows[place] = replace(row, recovered_loss=bench.recover(row, recovery))
                write_report(rows, facts, folder)  # what is known stays known if the next one fails
    show_report(rows, facts, folder)
    return rows


def _contradictions(arguments: argparse.Namespace, settings: Sequence[str]) -> list[Problem]:
    found = []
    if arguments.compare:
        given = [name for name, value in NOT_COMPARED.items() if getattr(arguments, name) != value]
        found += [Problem(f"--{name}", "with --compare, which does them all", "leave it out") for name in given]
    elif arguments.seeds:
        found.append(Problem("--seeds", "without --compare", "leave it out, or give --seed"))
    if arguments.seed is not None and arguments.by != "random" and not arguments.compare:
        found.append(Problem("--seed", f"with --by {arguments.by or 'usage'}", "leave it out: nothing is drawn"))
    if arguments.merge and arguments.by == "random":
        found.append(Problem("--merge", "with --by random", "choose another ranking"))
    if not arguments.recover:
        named = "without --recover, of which it is"
        found += [Problem(word, named, "leave it out, or give --recover") for word in settings if word[:2] == "--"]
        found += [Problem("--ranks", named, "leave it out, or give --recover")] if arguments.ranks else []
        stray = [] if found else [word for word in settings if word[:2] != "--"]
        found += [Problem("command line", f"unexpected word {word!r}", "see --help") for word in stray]
    return found


def _methods(arguments: argparse.Namespace) -> list[Method]:
    if not arguments.compare:
        return [Method(arguments.by or "usage", arguments.merge, arguments.seed or 0)]
    rankings = [Method(name) for name in RANKINGS if name != "random"]
    draws = [Method("random", seed=seed) for seed in range(arguments.seeds or 3)]
    return [*rankings, Method("usage", merge=True), *draws]


@dataclass(frozen=True)
class _Text:
    """The text of a run."""

    config: LMConfig
    tokenizer: TextTokenizer
    text: PreparedText | StreamedText

    @classmethod
    def open(cls, config: LMConfig) -> _Text:
        # A stream is read in this process: a worker would start for a few batches.
        config = replace(config, data=replace(config.data, num_workers=0))
        tokenizer = load_tokenizer(config.data.tokenizer)
        return cls(config, tokenizer, open_text(config.data, tokenizer, print))

    def calibration(self, tokens: int, device: torch.device) -> Iterator[Batch]:
        """The first training sequences of the run, at least so many tokens of them."""
        loader = train_loader(self.text, self.config.data, micro_batch=1, rank=0, world_size=1, seed=self.config.seed)
        left = -(-tokens // self.config.data.seq_len)
        while left > 0:
            rows = [next(loader) for _ in range(min(left, MICRO_BATCH))]
            yield Batch(*(torch.cat(parts) for parts in zip(*rows, strict=True))).to(device)
            left -= len(rows)
        loader.close()

    def scores(self, model: nn.Module, device: torch.device) -> LMScores:
        """Of the held-out text, as much of it as the run's own evaluations take."""
        tokens = self.config.eval.max_tokens
        return score(
            model,
            eval_batches(self.text, self.config.data, micro_batch=MICRO_BATCH, rank=0, world_size=1, max_tokens=tokens),
            token_bytes_V=self.tokenizer.token_bytes(),
            vocab_size=self.config.model.vocab_size,
            sink_sequences=0,
            device=device,
        )


@dataclass(frozen=True)
class _Bench:
    """What the models of a table share.

    Attributes:
        stored: the run.
        pruned: its settings with fewer experts.
        folder: of the command.
    """

    stored: StoredRun[LMConfig]
    pruned: LMConfig
    text: _Text
    device: torch.device
    folder: Path

    def prune(self, model: nn.Module, method: Method, choice: Choice, folder: Path) -> Row:
        """Write a pruned model, and measure it."""
        usage = {name: layer.usage_E for name, layer in choice.items()} if method.merge else None
        fewer = prune_model(model, {name: layer.groups for name, layer in choice.items()}, usage)
        state = {name: tensor.cpu() for name, tensor in fewer.state_dict().items()}
        groups = {name: [list(group) for group in layer.groups] for name, layer in choice.items()}
        origin = {
            "pruned": str(self.stored.checkpoint), "by": method.by, "merge": method.merge, "seed": method.seed,
            "experts": groups,
        }  # fmt: skip
        own = Path(self.stored.tokenizer)
        copy = (lambda target: shutil.copytree(own, target)) if own.is_relative_to(self.stored.folder) else None
        write_model_folder(folder, LM.name, self.pruned, state.__getitem__, origin=origin, tokenizer=copy)
        loss = self.text.scores(fewer, self.device).loss
        print(f"{method.name}: held-out loss {loss:.4f} after pruning", flush=True)
        return self.row(method.name, method, fewer, self.pruned, loss, choice, folder)

    def recover(self, row: Row, recovery: Recovery) -> float:
        """Train a model of the table on. Returns its held-out loss."""
        weights = Path(row.folder)
        config, folder = (self.pruned, weights) if row.method else (self.stored.config, self.folder / "all")
        config = replace(config, data=replace(config.data, tokenizer=tokenizer_of(row.folder)))
        model = load_model(recovery.run(config, weights, folder), dropless=True).to(self.device)
        loss = self.text.scores(model, self.device).loss
        print(f"{row.name}: held-out loss {loss:.4f} after {recovery.steps:,} steps", flush=True)
        return loss

    @staticmethod
    def row(
        name: str, method: Method | None, model: nn.Module, config: LMConfig, loss: float, choice: Choice, folder: Path
    ) -> Row:
        """A row of the table, before any recovery."""
        tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        return Row(
            name,
            method,
            config.moe.num_experts,
            num_params(config.model, config.moe).total,
            num_active_params(config.model, config.moe).total,
            sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
            loss,
            None,
            choice,
            str(folder),
        )


def _facts(arguments: argparse.Namespace, settings: Sequence[str], stored: StoredRun[LMConfig]) -> dict[str, Any]:
    sequences = -(-arguments.calibration_tokens // stored.config.data.seq_len)
    return {
        "run": str(stored.folder),
        "step": stored.index.step,
        "keep": arguments.keep,
        "calibration_tokens": sequences * stored.config.data.seq_len,
        "recovery_steps": arguments.recover or 0,
        "recovery_settings": hide_arguments(list(settings)),
        "command": shlex.join(["moe-scale", *hide_arguments(sys.argv[1:])]),
        "commit": commit_of(Path(__file__).resolve().parents[1])[:12] or "unknown",
    }
