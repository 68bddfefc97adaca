"""Data sets of the Hugging Face hub that are loaded whole."""

from __future__ import annotations

from typing import Any

from moe_scale.errors import ConfigError, Problem


def load_rows(repository: str, name: str, split: str) -> Any:
    """The rows of one split of a data set's configuration.

    Raises:
        ConfigError: at ``data.source``, when the hub cannot be reached and its cache has no copy.
    """
    import datasets

    try:
        return datasets.load_dataset(repository, name, split=split)
    except Exception as error:  # the hub's client, its HTTP library and datasets each have their own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            Problem(
                "data.source",
                f"cannot load {repository} {name} ({first})",
                "check the network, or load it once where there is one and bring the cache of Hugging Face along",
                this_host_only=True,
            )
        ) from error
