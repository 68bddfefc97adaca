"""How fast text is generated with the key/value cache, against a forward pass over the whole text for each token.

python benchmarks/generation.py --run runs/lm_16l

Both ways in turn, in one process, one text at a time and greedily, so that they do the same; then the cache with
several texts at a time. Medians over the rounds, in tokens a second.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

from moe_scale.errors import exit_on_config_error
from moe_scale.generate.batch import Batch, Request, generate
from moe_scale.generate.full_passes import FullPasses
from moe_scale.generate.sampling import Sampling
from moe_scale.generate.text_model import TextModel
from moe_scale.tools.arguments import positive
from moe_scale.tools.text_model import add_model_arguments, open_text_model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--prompt_tokens", type=positive, default=32, help="tokens of a prompt [%(default)s]")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[32, 96, 224], help="tokens drawn [%(default)s]")
    parser.add_argument("--batch_sizes", type=positive, nargs="+", default=[4, 16], help="of the cache [%(default)s]")
    parser.add_argument(
        "--cpu_seconds",
        action="store_true",
        help="count those of this process, on a machine with other work; not for GPUs",
    )
    parser.add_argument("--rounds", type=positive, default=5, help="repetitions, after one that does not count [5]")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_seconds else time.perf_counter
    with exit_on_config_error():
        model = open_text_model(arguments)
    print(
        "| tokens drawn | no cache | cache | ratio | " + " | ".join(f"{n} texts" for n in arguments.batch_sizes) + " |"
    )
    print("|" + "---|" * (4 + len(arguments.batch_sizes)))
    for tokens in arguments.tokens:
        how = (arguments.prompt_tokens, tokens, arguments.batch_sizes, arguments.rounds)
        slow, fast, *batched = measure(model, *how, clock)
        print(
            f"| {tokens} | {slow:.1f} | {fast:.1f} | {fast / slow:.1f} | "
            + " | ".join(f"{v:.1f}" for v in batched)
            + " |"
        )


def measure(
    model: TextModel, prompt_tokens: int, tokens: int, sizes: list[int], rounds: int, clock: Callable[[], float]
) -> list[float]:
    """Tokens a second without the cache, with it, and with it for several texts."""
    window = prompt_tokens + tokens
    without = FullPasses(partial(model.model, last_only=True), window)  # type: ignore[arg-type]
    ways = [(without, 1), (model.model, 1), *((model.model, size) for size in sizes)]
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 1):
        for taken, (way, size) in zip(seconds, ways, strict=True):
            request = Request(range(1, prompt_tokens + 1), tokens, Sampling(temperature=0), stop_at_eot=False)
            batch: Batch[int] = Batch(way, model.tokenizer, context=window, device=model.device)
            started = clock()
            for _ in generate(batch, [(number, request) for number in range(size)], size):
                pass
            taken.append(clock() - started)
    return [size * tokens / statistics.median(taken[1:]) for taken, (_, size) in zip(seconds, ways, strict=True)]


if __name__ == "__main__":
    main()
