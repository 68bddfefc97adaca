"""Text while its tokens come: never a broken character, nothing of a stop string, and in the end the whole."""

from __future__ import annotations

import random

import pytest

from moe_scale.data.tokenizer import TextTokenizer, load_tokenizer
from moe_scale.generate.text import TextStream

TEXTS = [
    "plain words, and more",
    "naïve café — “quotes”",
    "日本語のテキスト",
    "\U0001f469\u200d\U0001f467 family \U0001f3f3\ufe0f",
    "עברית \u200fר",
    "a\n\n\tb  c",
]


@pytest.fixture(scope="module")
def gpt2() -> TextTokenizer:
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def metaspace() -> TextTokenizer:
    """A vocabulary like SentencePiece's, whose decoder drops the leading blank of what it is given."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["the cat sat on the mat and the dog sat on the log"] * 5, trainer)
    return TextTokenizer(backend, backend.token_to_id("</s>"))


def streamed(tokenizer: TextTokenizer, prompt: list[int], ids: list[int], stop: list[str] | None = None) -> list[str]:
    """The pieces as they come, up to a stop string; the last is what is left at the end."""
    stream = TextStream(tokenizer, prompt, stop or [])
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_together_the_text(text: str, gpt2: TextTokenizer) -> None:
    for prompt in ("", "Once ", "日"):
        pieces = streamed(gpt2, [gpt2.eot_id, *gpt2.encode(prompt)], gpt2.encode(text))
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)


def test_characters_come_as_soon_as_they_are_whole(gpt2: TextTokenizer) -> None:
    ids = gpt2.encode("a日b")
    pieces = streamed(gpt2, [], ids)
    assert pieces == ["a", *[""] * (len(ids) - 3), "日", "b", ""]
    assert len(ids) > 3, "the character is spread over tokens"


def test_any_tokens_give_what_they_decode_to(gpt2: TextTokenizer) -> None:
    """Drawn tokens need not be UTF-8: lone bytes, cut characters and the mark of broken ones itself."""
    random_ids = random.Random(0)
    lone = [token for token in range(gpt2.vocab_size) if "\ufffd" in gpt2.decode([token])]
    mark = gpt2.encode("\ufffd")
    for _ in range(300):
        ids = []
        for _ in range(random_ids.randrange(1, 12)):
            kind = random_ids.random()
            if kind < 0.6:
                ids.append(random_ids.choice(lone))
            elif kind < 0.7:
                ids.extend(mark)
            else:
                ids.append(random_ids.randrange(gpt2.vocab_size))
        assert "".join(streamed(gpt2, gpt2.encode("so"), ids)) == gpt2.decode(ids)


def test_blanks_between_words_of_a_sentencepiece_vocabulary(metaspace: TextTokenizer) -> None:
    whole = metaspace.encode("the cat sat on the 日 mat")
    text = metaspace.decode(whole)
    assert text == "the cat sat on the 日 mat"
    for cut in range(len(whole) + 1):
        shown = metaspace.decode(whole[:cut])
        if not shown.endswith("\ufffd"):
            assert shown + "".join(streamed(metaspace, whole[:cut], whole[cut:])) == text


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "one t"], ""),
        ("one two three", ["four"], "one two three"),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("xabcabd", ["abd"], "xabc"),
        ("xabcd", ["abcde", "bcd"], "xa"),
        ("xabc", ["abc", "c"], "x"),
        ("ends in a ROMEO", ["ROMEO:"], "ends in a ROMEO"),
        ("日本語のテキスト", ["語の"], "日本"),
        ("aaaaab", ["aab"], "aaa"),
    ],
)
def test_stop_strings(text: str, stop: list[str], shown: str, gpt2: TextTokenizer) -> None:
    pieces = streamed(gpt2, gpt2.encode("before two"), gpt2.encode(text), stop)
    assert "".join(pieces) == shown


def test_where_tokens_end_changes_nothing(gpt2: TextTokenizer) -> None:
    """The same text cut into other tokens, and the same stop strings."""
    choices = random.Random(1)
    for _ in range(300):
        text = "".join(choices.choice("abé") for _ in range(12))
        stop = ["".join(choices.choice("abé") for _ in range(choices.randrange(1, 5))) for _ in range(2)]
        letters = [token for letter in text for token in gpt2.encode(letter)]
        some = [token for n in range(0, 12, 3) for token in gpt2.encode(text[n : n + 3])]
        expected = "".join(streamed(gpt2, [], letters, stop))
        assert "".join(streamed(gpt2, [], some, stop)) == expected
        ends = sorted((text.find(word) + len(word), text.find(word)) for word in stop if word in text)
        assert expected == (text[: ends[0][1]] if ends else text)


def test_a_stop_string_in_what_was_held_back(gpt2: TextTokenizer) -> None:
    """The last tokens are half a character, and the mark that stands for it ends the text."""
    stream = TextStream(gpt2, [], ["\ufffd"])
    half = gpt2.encode("日")[:1]
    assert stream.push(gpt2.encode("a")[0]) + stream.push(half[0]) == "a"
    assert stream.finish() == ""
    assert stream.stopped


def test_end_of_text_of_the_prompt_is_no_context(gpt2: TextTokenizer) -> None:
    assert streamed(gpt2, [gpt2.eot_id], [gpt2.eot_id]) == ["<|endoftext|>", ""]


def test_tokens_stay_cheap(gpt2: TextTokenizer) -> None:
    """No token has more than its neighbours decoded again."""
    sizes = []

    class Counting:
        vocab_size, eot_id = gpt2.vocab_size, gpt2.eot_id

        def decode(self, ids: list[int]) -> str:
            sizes.append(len(ids))
            return gpt2.decode(ids)

    stream = TextStream(Counting(), gpt2.encode("word " * 100))
    for token in gpt2.encode("and so on, " * 50):
        stream.push(token)
    assert max(sizes) <= 9
