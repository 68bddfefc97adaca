"""Bodies of completions: which are understood, what they ask for, and how the others are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from moe_scale.data.sentinels import with_sentinels
from moe_scale.data.tokenizer import load_tokenizer
from moe_scale.generate.sampling import Sampling
from moe_scale.generate.text_model import TextModel
from moe_scale.serve.completions import Answer, RequestError, read_body, requests_of

MODEL = TextModel("small", None, load_tokenizer("gpt2"), 10, torch.device("cpu"))  # type: ignore[arg-type]


FILLS_IN = TextModel(
    "small",
    None,
    with_sentinels(load_tokenizer("bytes"), 4),
    20,
    torch.device("cpu"),
    257,  # type: ignore[arg-type]
)
"""A model that fills in blanks, with four kinds of them."""


def asked(of: TextModel = MODEL, **fields: Any) -> list[Any]:
    return requests_of(read_body(json.dumps({"model": "small", "prompt": "one", **fields}).encode()), of, 8)


def test_defaults_are_those_of_openai() -> None:
    (request,) = asked()
    assert list(request.prompt) == [50256, *MODEL.tokenizer.encode("one")]
    assert (request.max_tokens, request.stop, request.sample) == (16, (), 0)
    assert request.sampling == Sampling(seed=request.sampling.seed)
    assert asked()[0].sampling.seed != request.sampling.seed, "without a seed each answer is another"


def test_all_fields() -> None:
    found = asked(
        prompt=["one", "two"], n=2, max_tokens=5, temperature=0, top_p=0.5, top_k=7, repetition_penalty=1.5, seed=3,
        stop=["a", "b"], stream=True, stream_options={"include_usage": True}, user="someone", echo=False, best_of=1,
        presence_penalty=0, frequency_penalty=0.0, logit_bias={}, logprobs=None, suffix=None,
    )  # fmt: skip
    assert [(request.prompt[1], request.sample) for request in found] == [(505, 0), (505, 1), (11545, 0), (11545, 1)]
    assert {request.sampling for request in found} == {Sampling(0, 7, 0.5, 1.5, 3)}
    assert found[0].stop == ("a", "b")
    assert asked(stop="a")[0].stop == ("a",)
    assert asked(max_tokens=None, stop=None, seed=None)[0].max_tokens == 16, "null is the default"


@pytest.mark.parametrize(
    ("fields", "status", "param", "what"),
    [
        ({"prompt": None}, 400, "prompt", "valid string"),
        ({"prompt": [1, 2]}, 400, "prompt", "valid string"),
        ({"prompt": []}, 400, "prompt", "at least 1 item"),
        ({"prompt": "word " * 10}, 400, "prompt", "the context holds 10; shorten it to 9 tokens"),
        ({"prompt": "\ud800"}, 400, None, "Invalid JSON"),
        ({"model": "large"}, 404, "model", "this server has 'small'"),
        ({"model": None}, 400, "model", "valid string"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "5"}, 400, "max_tokens", "valid integer"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"temperature": float("nan")}, 400, "temperature", "finite"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"n": 9}, 400, "n", "at most 8"),
        ({"prompt": ["a"] * 3, "n": 3}, 400, "n", "9 texts"),
        ({"stop": ""}, 400, "stop", "at least 1 character"),
        ({"stop": ["a"] * 17}, 400, "stop", "at most 16"),
        ({"stream_options": {}}, 400, None, "stream: true alone"),
        ({"logprobs": 3}, 400, None, "logprobs is not supported"),
        ({"best_of": 2}, 400, None, "best_of is not supported"),
        ({"suffix": "end"}, 400, None, "suffix is not supported"),
        ({"temprature": 1}, 400, "temprature", "not permitted"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], status: int, param: str | None, what: str) -> None:
    with pytest.raises(RequestError, match=what) as refused:
        asked(**fields)
    assert (refused.value.status, refused.value.param) == (status, param)
    assert refused.value.body()["error"]["message"] == str(refused.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"text"', b"\xff", b"{}", b"[" * 100_000])
def test_what_is_no_body(data: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        read_body(data)
    assert refused.value.status == 400


def test_usage_counts_a_prompt_once() -> None:
    found = asked(prompt=["one", "two three"], n=2)
    answer = Answer("small", found, 2)
    answer.completion_tokens = 7
    assert answer.usage() == {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    assert answer.piece(0, "a", None)["id"] == answer.last()["id"]


def test_a_model_that_fills_in_is_given_blanks_and_ends_after_the_last() -> None:
    found = asked(FILLS_IN, prompt="a <extra_id_0> b <extra_id_1>", n=2, stop="x")
    prompt = [*FILLS_IN.tokenizer.encode("a "), 257, *FILLS_IN.tokenizer.encode(" b "), 258]
    expected = [(prompt, ("x", "<extra_id_2>"), sample) for sample in (0, 1)]
    assert [(list(request.prompt), request.stop, request.sample) for request in found] == expected
    for wrong, what, code in (
        ("one", "prompt 1: has no <extra_id_0>; this model fills in blanks marked <extra_id_0>", None),
        ("", "is empty; this model fills in blanks", None),
        (["a <extra_id_0>", "b"], "prompt 2: has no <extra_id_0>", None),
        ("a <extra_id_4>", "<extra_id_4>; there are <extra_id_0> to <extra_id_3>", None),
        ("a <extra_id_0>" * 9, "the context holds 20", "context_length_exceeded"),
    ):
        with pytest.raises(RequestError, match=what) as refused:
            asked(FILLS_IN, prompt=wrong)
        assert (refused.value.status, refused.value.param, refused.value.code) == (400, "prompt", code)
