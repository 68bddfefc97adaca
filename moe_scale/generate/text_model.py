"""A language model with all that it takes to continue text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_scale.data.sentinels import encode_with_sentinels
from moe_scale.data.tokenizer import TextTokenizer
from moe_scale.errors import Problem
from moe_scale.generate.batch import Batch, Request
from moe_scale.generate.sampling import Sampling
from moe_scale.models.cache import CausalModel


@dataclass(frozen=True)
class TextModel:
    """A model with all that it takes to continue text.

    Attributes:
        name: of the run's folder.
        model: in evaluation mode, on its device, its experts dropless.
        tokenizer: the run's.
        context: tokens of a prompt and its continuation, at most.
        device: where the model is.
        first_sentinel: of a model that fills in a text where its sentinels are: the first of them. What it writes is
            the sentinels, each with what was missing there.
    """

    name: str
    model: CausalModel[Any]
    tokenizer: TextTokenizer
    context: int
    device: torch.device
    first_sentinel: int | None = None

    def encode(self, prompt: str) -> list[int]:
        """The prompt's tokens, after that which begins every document where the model continues documents.

        Raises:
            ConfigError: where it names a sentinel that there is not.
        """
        if self.first_sentinel is not None:
            return encode_with_sentinels(self.tokenizer, prompt, self.first_sentinel)
        return [self.tokenizer.eot_id, *self.tokenizer.encode(prompt)]

    def check(self, prompt: Sequence[int], where: str) -> list[Problem]:
        """Whether there is something to continue or to fill in, and room for one token after it."""
        if self.first_sentinel is not None and max(prompt, default=-1) < self.first_sentinel:
            what = "has no <extra_id_0>" if prompt else "is empty"
            blanks = "this model fills in blanks marked <extra_id_0>, <extra_id_1> ..."
            return [Problem(where, what, f"{blanks}, as in: The <extra_id_0> is blue")]
        if len(prompt) < self.context:
            return []
        first = "" if self.first_sentinel is not None else ", with the one that begins a text"
        what = f"{len(prompt)} tokens{first}, and the context holds {self.context}"
        return [Problem(where, what, f"shorten it to {self.context - 1} tokens")]

    def batch(self) -> Batch[Any]:
        """An empty batch of the model's."""
        return Batch(self.model, self.tokenizer, context=self.context, device=self.device)

    def request(self, prompt: str, max_tokens: int, sampling: Sampling, stop: Sequence[str], sample: int) -> Request:
        """A text to continue, or to fill in: then the sentinel after the last one of the prompt ends it."""
        ids, stops = self.encode(prompt), tuple(stop)
        if self.first_sentinel is not None:
            following = max([self.first_sentinel - 1, *ids]) + 1
            stops += (self.tokenizer.decode([following]),) if following < self.tokenizer.vocab_size else ()
        return Request(ids, max_tokens, sampling, stops, sample)
