"""``moe-scale generate``: continue text with a trained language model, or fill in what is missing of it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_scale.errors import ConfigError, Problem, raise_if
from moe_scale.generate.batch import Event, Request, generate
from moe_scale.generate.sampling import Sampling
from moe_scale.generate.text_model import TextModel
from moe_scale.tools.arguments import not_negative, not_negative_number, positive, positive_number, probability
from moe_scale.tools.text_files import is_unicode, new_file, opened, read_lines, write
from moe_scale.tools.text_model import add_model_arguments, open_text_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's flags."""
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be given several times"
    )
    parser.add_argument(
        "--prompts", metavar="FILE",
        help="text file, a prompt a line, empty lines left out [standard input, where there is no --prompt]",
    )  # fmt: skip
    parser.add_argument("--max_tokens", type=positive, default=100, help="tokens to draw, at most [%(default)s]")
    parser.add_argument(
        "--temperature", type=not_negative_number, default=0.8,
        help="the logits are divided by it; 0 takes the most probable token [%(default)s]",
    )  # fmt: skip
    parser.add_argument(
        "--top_k", type=not_negative, default=50, help="draw from so many most probable tokens; 0 is all [%(default)s]"
    )
    parser.add_argument(
        "--top_p", type=probability, default=1.0,
        help="draw from the fewest most probable tokens that have this probability together; 1 is all [%(default)s]",
    )  # fmt: skip
    parser.add_argument(
        "--repetition_penalty", type=positive_number, default=1.0,
        help="above 1 makes tokens less probable that the prompt or the text have already [%(default)s]",
    )  # fmt: skip
    parser.add_argument("--seed", type=not_negative, default=0, help="of the draws [%(default)s]")
    parser.add_argument("--num_samples", type=positive, default=1, help="continuations of each prompt [%(default)s]")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help="ends a continuation, and is no part of it; may be given several times",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=positive, default=16, help="texts at a time [%(default)s]")
    parser.add_argument(
        "--output", metavar="FILE",
        help="new file for a JSON line a text, with prompt, text, finish reason and number of tokens [standard output; "
        "there a single text comes as it is, and to a terminal while it is drawn]",
    )  # fmt: skip
    parser.add_argument("--no_stream", action="store_true", help="show a text when it is complete, also on a terminal")


@dataclass
class Text:
    """A continuation, as far as it has come."""

    prompt: str
    request: Request
    text: str = ""
    tokens: int = 0
    finish: str | None = None

    def take(self, event: Event[int]) -> None:
        self.text, self.tokens, self.finish = self.text + event.text, self.tokens + 1, event.finish

    def line(self) -> str:
        """Its JSON line."""
        known = {"prompt": self.prompt, "text": self.text, "finish_reason": self.finish, "tokens": self.tokens}
        return json.dumps(known, ensure_ascii=False) + "\n"


def run(arguments: argparse.Namespace) -> None:
    """Continue the prompts, in their order, and each prompt's samples.

    Raises:
        ConfigError: when the run, the prompts or the options cannot be used; nothing is written then.
    """
    _check(arguments)
    output = new_file(arguments.output)
    prompts = _prompts(arguments)
    model = open_text_model(arguments)
    texts = _texts(model, prompts, arguments)
    started = time.perf_counter()
    events = generate(model.batch(), enumerate(text.request for text in texts), arguments.batch_size)
    with opened(output) as out:
        if output or len(texts) > 1:
            for text in _finished(texts, events):
                write(out, text.line())
        else:
            pieces = (event.text for event in _counted(texts, events))
            stream = out.isatty() and not arguments.no_stream
            for piece in pieces if stream else ["".join(pieces)]:
                write(out, piece)
            write(out, "\n")
    _tell(texts, time.perf_counter() - started, model)


def _check(arguments: argparse.Namespace) -> None:
    found = []
    if arguments.prompt and arguments.prompts:
        found.append(Problem("--prompts", "given beside --prompt", "choose one of the two"))
    for option in ("prompt", "stop"):
        for text in getattr(arguments, option):
            if not is_unicode(text):
                found.append(Problem(f"--{option}", f"{text!r} is not UTF-8", "give it in UTF-8"))
    if "" in arguments.stop:
        found.append(Problem("--stop", "is empty", "give the text that ends a continuation, or leave the option out"))
    if arguments.temperature == 0 and arguments.num_samples > 1:
        what = f"{arguments.num_samples} with --temperature 0, which gives the same text every time"
        found.append(Problem("--num_samples", what, "choose 1, or a temperature above 0"))
    raise_if(found)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompt:
        return arguments.prompt
    if prompts := [line.removesuffix("\r") for line in read_lines(arguments.prompts, "--prompts") if line.strip()]:
        return prompts
    where = arguments.prompts or "standard input"
    raise ConfigError(Problem("--prompts", f"no prompt in {where}", "give a prompt a line, or --prompt"))


def _texts(model: TextModel, prompts: Sequence[str], arguments: argparse.Namespace) -> list[Text]:
    """All continuations that are wanted, checked for their length."""
    sampling = Sampling(
        arguments.temperature, arguments.top_k, arguments.top_p, arguments.repetition_penalty, arguments.seed
    )
    texts, problems = [], []
    for number, prompt in enumerate(prompts, start=1):
        requests = [
            model.request(prompt, arguments.max_tokens, sampling, arguments.stop, sample)
            for sample in range(arguments.num_samples)
        ]
        problems += model.check(requests[0].prompt, f"prompt {number}")
        texts += [Text(prompt, request) for request in requests]
    raise_if(problems)
    return texts


def _counted(texts: Sequence[Text], events: Iterator[Event[int]]) -> Iterator[Event[int]]:
    """The events, once their texts have taken them in."""
    for event in events:
        texts[event.key].take(event)
        yield event


def _finished(texts: Sequence[Text], events: Iterator[Event[int]]) -> Iterator[Text]:
    """The texts, each as soon as it and all before it are complete."""
    shown = 0
    for _ in _counted(texts, events):
        while shown < len(texts) and texts[shown].finish:
            yield texts[shown]
            shown += 1


def _tell(texts: Sequence[Text], seconds: float, model: TextModel) -> None:
    """How fast it was, and what ended for want of room."""
    tokens = sum(text.tokens for text in texts)
    count = "1 text" if len(texts) == 1 else f"{len(texts)} texts"
    print(f"{count}, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s", file=sys.stderr)
    full = sum(len(text.request.prompt) + text.tokens >= model.context and text.finish == "length" for text in texts)
    if full:
        print(f"{full} of them reached the context of {model.context} tokens (--context)", file=sys.stderr)
