"""A language model with all that it takes to continue text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

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
    """

    name: str
    model: CausalModel[Any]
    tokenizer: TextTokenizer
    context: int
    device: torch.device

    def encode(self, prompt: str) -> list[int]:
        """The prompt's tokens after that which begins every document."""
        return [self.tokenizer.eot_id, *self.tokenizer.encode(prompt)]

    def check(self, prompt: Sequence[int], where: str) -> list[Problem]:
        """Whether there is room for one token after the prompt."""
        if len(prompt) < self.context:
            return []
        what = f"{len(prompt)} tokens, with the one that begins a text, and the context holds {self.context}"
        return [Problem(where, what, f"shorten it to {self.context - 1} tokens")]

    def batch(self) -> Batch[Any]:
        """An empty batch of the model's."""
        return Batch(self.model, self.tokenizer, context=self.context, device=self.device)

    def request(self, prompt: str, max_tokens: int, sampling: Sampling, stop: Sequence[str], sample: int) -> Request:
        """A text to continue."""
        return Request(self.encode(prompt), max_tokens, sampling, tuple(stop), sample)
