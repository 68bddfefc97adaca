"""What the tasks of language models share: their text, its held-out scores, and the sample at the end of a run."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from moe_scale.config import LMConfig, SwitchConfig
from moe_scale.data.loader import TrainLoader
from moe_scale.data.sources import check_source
from moe_scale.data.text import Batch, StreamedText, eval_batches, open_text, train_loader
from moe_scale.data.tokenizer import TOKENIZER_FOLDER, TextTokenizer, copy_tokenizer, load_tokenizer
from moe_scale.errors import ConfigError, Problem
from moe_scale.evaluate.language_model import LMScores, score
from moe_scale.generate.full_passes import sample_ids
from moe_scale.parallel import device
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.settings import to_dict
from moe_scale.train.pretrained import begin_with, pretrained_problems, pretrained_remarks, tokenizer_of
from moe_scale.train.task import Task


class TextTask(Task):
    """A language model on text. What a model is given of it, a subclass says.

    Args:
        config: the run's settings.
        own_entries: entries that the model has after the tokenizer's.
    """

    def __init__(self, config: LMConfig | SwitchConfig, own_entries: int = 0):
        self.scores: dict[str, Literal["lower", "higher"]] = {
            "eval/loss": "lower",
            "eval/perplexity": "lower",
            "eval/bits_per_byte": "lower",
        }
        self.config: Any = config
        self.own_entries = own_entries

    def check(self) -> list[Problem]:
        found = check_source(self.config.data)
        try:
            tokenizer = load_tokenizer(self.config.data.tokenizer)
        except ConfigError as error:
            return found + error.problems
        needed = tokenizer.vocab_size + self.own_entries
        if needed > self.config.model.vocab_size:
            sentinels = f" and {self.own_entries} sentinels" if self.own_entries else ""
            found.append(
                Problem(
                    "model.vocab_size",
                    f"{self.config.model.vocab_size} < {tokenizer.vocab_size} tokens of "
                    f"data.tokenizer = {self.config.data.tokenizer}{sentinels}",
                    f"choose at least {needed}",
                )
            )
        if self.config.model.pretrained and not self.config.problems():
            found += self._pretrained_problems(tokenizer)
        return found

    def _pretrained_problems(self, tokenizer: TextTokenizer) -> list[Problem]:
        path = self.config.model.pretrained
        with torch.device("meta"):
            model = self.draw_model()
        if found := pretrained_problems("model.pretrained", path, self.model_kind, model, to_dict(self.config)):
            return found
        name = tokenizer_of(path)
        try:
            theirs = load_tokenizer(name)
        except ConfigError as error:
            return [replace(problem, where="model.pretrained") for problem in error.problems]
        if theirs.fingerprint == tokenizer.fingerprint:
            return []
        what = f"{self.config.data.tokenizer}, and {path} was trained with {name}: its tokens mean other texts"
        return [Problem("data.tokenizer", what, f"choose {name}", this_host_only=True)]

    def remarks(self) -> list[str]:
        path = self.config.model.pretrained
        if not path:
            return []
        with torch.device("meta"):
            model = self.draw_model()
        return pretrained_remarks(path, model, to_dict(self.config))

    @abc.abstractmethod
    def draw_model(self, groups: ParallelGroups | None = None) -> nn.Module:
        """The model with weights that are drawn."""

    def build_model(self, groups: ParallelGroups) -> nn.Module:
        model = self.draw_model(groups)
        if self.config.model.pretrained:
            begin_with("model.pretrained", self.config.model.pretrained, self.model_kind, model)
        return model

    def prepare(self, say: Callable[[str], None]) -> None:
        text = open_text(self.config.data, load_tokenizer(self.config.data.tokenizer), say)
        if isinstance(text, StreamedText):
            text.heldout(self.config.eval.max_tokens, say)  # stored now, not while all ranks wait at an evaluation

    def open(self, *, micro_batch: int, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.micro_batch = rank, world_size, micro_batch
        self.tokenizer = load_tokenizer(self.config.data.tokenizer)
        self.token_bytes_V = self.tokenizer.token_bytes()
        self.text = open_text(self.config.data, self.tokenizer)
        self.loader: TrainLoader[Batch] = train_loader(
            self.text,
            self.config.data,
            micro_batch=micro_batch,
            rank=rank,
            world_size=world_size,
            seed=self.config.seed,
        )

    @property
    def data_fingerprint(self) -> str:
        return self.text.fingerprint

    def batches(self) -> TrainLoader[Batch]:
        return self.loader

    def heldout(self) -> Iterator[Batch]:
        """The held-out text of this rank, for one evaluation."""
        return eval_batches(
            self.text,
            self.config.data,
            micro_batch=self.micro_batch,
            rank=self.rank,
            world_size=self.world_size,
            max_tokens=self.config.eval.max_tokens,
        )

    def keep_beside(self, run_dir: Path) -> None:
        source, own = Path(self.config.data.tokenizer).expanduser(), run_dir / TOKENIZER_FOLDER
        if source.is_dir() and not own.exists():
            copy_tokenizer(source, own)

    def scored(self, engine: Any, model: Callable[..., Any], sink_sequences: int = 0) -> LMScores:
        """Scores of the held-out text; all ranks together.

        Args:
            model: what runs the engine on a batch.
            sink_sequences: as :func:`score` takes them.
        """
        engine.eval()
        try:
            return score(
                model,
                self.heldout(),
                token_bytes_V=self.token_bytes_V,
                vocab_size=self.config.model.vocab_size,
                sink_sequences=sink_sequences,
                device=device.current(),
            )
        finally:
            engine.train()

    def continued(self, engine: Any) -> str:
        """The prompt of the settings with what the model goes on with; all ranks together."""
        config = self.config
        text = config.eval.prompt
        prompt = [self.tokenizer.eot_id, *self.tokenizer.encode(text)]
        model = functools.partial(engine, last_only=True)
        return text + self.tokenizer.decode(
            self.sampled(engine, model, prompt, config.eval.sample_tokens, config.data.seq_len)
        )

    def sampled(
        self, engine: Any, model: Callable[..., Any], prompt: list[int], num_tokens: int, window: int
    ) -> list[int]:
        """Tokens that follow the prompt, drawn as at every end of a run; all ranks together.

        Args:
            model: what runs the engine on token ids.
            window: of so many of the last ones.
        """
        engine.eval()
        try:
            return sample_ids(
                model,
                self.tokenizer,
                prompt,
                num_tokens=num_tokens,
                window=window,
                seed=self.config.seed,
                device=device.current(),
            )
        finally:
            engine.train()


def inputs_of(batch: Batch) -> tuple[tuple[Any, ...], dict[str, bool]]:
    """Ids, targets and documents of a packed batch on the device, and whether there is padding.

    Sequences that lie inside one document need no mask, and attention without one is faster: None in place of their
    documents. Decided here, where the ids are still on the host.
    """
    where = device.current()
    one_document = bool((batch.document_ids_BS == 0).all())
    documents = None if one_document else batch.document_ids_BS.to(where)
    padded = bool((batch.document_ids_BS < 0).any())
    return (batch.ids_BS.to(where), batch.targets_BS.to(where), documents), {"padded": padded}


def summary_of_scores(total: int, active: int, scores: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of the end of a run: the model's parameters, all and those that a token uses, and its held-out scores."""
    gap = scores["eval/unigram_entropy"] - scores["eval/loss"]
    distance = f"{abs(gap):.2f} {'below' if gap >= 0 else 'above'} it"
    lines = [
        ("model", f"{total:,} parameters, {active:,} active a token"),
        ("held-out loss", f"{scores['eval/loss']:.4f} nats a token over {scores['eval/tokens']:,} tokens"),
        ("perplexity", f"{scores['eval/perplexity']:.2f}"),
    ]
    if "eval/bits_per_byte" in scores:
        lines.append(("bits per byte", f"{scores['eval/bits_per_byte']:.4f}"))
    entropy = f"{scores['eval/unigram_entropy']:.4f} nats of the same text; the loss is {distance}"
    return [*lines, ("unigram entropy", entropy)]
