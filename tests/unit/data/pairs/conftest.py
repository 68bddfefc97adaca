"""Prepared pairs that several modules look at."""

from __future__ import annotations

import pytest

from moe_scale.config import PairDataConfig
from moe_scale.data.pairs.prepare import PreparedPairs, prepare_pairs


@pytest.fixture(scope="session")
def sample_config(tmp_path_factory: pytest.TempPathFactory) -> PairDataConfig:
    """Three directions of the sample, two of which are each other's inverse; BPE, as it is trained in a second."""
    return PairDataConfig(
        pairs=("de-en", "en-de", "fr-el"),
        tokenizer="bpe",
        max_len=40,
        batch_tokens=100,
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    )


@pytest.fixture(scope="session")
def sample_pairs(sample_config: PairDataConfig) -> PreparedPairs:
    return prepare_pairs(sample_config, 2000)
