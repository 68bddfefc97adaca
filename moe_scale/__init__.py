"""Training of mixture-of-experts Transformers with DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_scale.checkpoint.reader import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """Import what is public when it is first used: ``import moe_scale`` alone stays free of torch."""
    if name == "load_model":
        from moe_scale.checkpoint.reader import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
