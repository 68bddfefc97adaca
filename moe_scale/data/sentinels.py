"""Sentinels: entries after a tokenizer's own that stand for spans of text, written ``<extra_id_0>`` as in T5."""

from __future__ import annotations

import re

import tokenizers

from moe_scale.data.tokenizer import TextTokenizer
from moe_scale.errors import ConfigError, Problem

_SENTINEL = re.compile(r"<extra_id_([0-9]{1,6})>")


def with_sentinels(tokenizer: TextTokenizer, number: int) -> TextTokenizer:
    """The tokenizer with ``number`` sentinels after its entries; it spells them out, and never makes one from text.

    Raises:
        ConfigError: at ``data.tokenizer``, when it has such entries itself, or ids that no entry has.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([f"<extra_id_{n}>" for n in range(number)])
    found = TextTokenizer(backend, tokenizer.eot_id)
    if backend.token_to_id("<extra_id_0>") != tokenizer.vocab_size or found.vocab_size - number != tokenizer.vocab_size:
        what = "its entries cannot be followed by <extra_id_0>, <extra_id_1> ...: it has these, or ids without an entry"
        raise ConfigError(Problem("data.tokenizer", what, "choose another, such as bytes or gpt2"))
    return found


def encode_with_sentinels(tokenizer: TextTokenizer, text: str, first_sentinel: int, where: str = "prompt") -> list[int]:
    """Token ids of a text in which ``<extra_id_n>`` stands for the n-th sentinel.

    Raises:
        ConfigError: at ``where``, if it names one that there is not.
    """
    ids: list[int] = []
    for place, part in enumerate(_SENTINEL.split(text)):
        if place % 2 == 0:
            ids += tokenizer.encode(part)
            continue
        ids.append(first_sentinel + int(part))
        if ids[-1] >= tokenizer.vocab_size:
            known = f"there are <extra_id_0> to <extra_id_{tokenizer.vocab_size - first_sentinel - 1}>"
            raise ConfigError(Problem(where, f"<extra_id_{part}>", known))
    return ids
