"""What ``/metrics`` shows, in the text format that Prometheus reads."""

from __future__ import annotations

from collections.abc import Mapping

from moe_scale.serve.scheduler import Figures


def exposition(figures: Figures, answered: Mapping[int, int], max_running: int) -> str:
    """The figures with their kinds and meanings, a line each.

    Args:
        answered: completions by the status of their answer.
    """
    plain = [
        ("sequences_running", "gauge", "texts in the batch", figures.running),
        ("sequences_running_max", "gauge", "texts that the batch holds at most", max_running),
        ("sequences_waiting", "gauge", "texts that wait for a place in the batch", figures.waiting),
        ("prompt_tokens_total", "counter", "tokens of prompts", figures.prompt_tokens),
        ("generated_tokens_total", "counter", "tokens drawn", figures.generated_tokens),
        ("steps_total", "counter", "forward passes of the batch", figures.steps),
        ("failures_total", "counter", "forward passes that went wrong", figures.failures),
    ]
    lines = []
    for name, kind, meaning, value in plain:
        lines += [*_head(name, kind, meaning), f"moe_scale_{name} {value}"]
    lines += _head("requests_total", "counter", "completions by the status of their answer; 499: the client left")
    lines += [f'moe_scale_requests_total{{status="{status}"}} {count}' for status, count in sorted(answered.items())]
    return "\n".join(lines) + "\n"


def _head(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP moe_scale_{name} {meaning}", f"# TYPE moe_scale_{name} {kind}"]
