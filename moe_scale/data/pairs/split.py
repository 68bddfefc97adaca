"""Which pairs are trained on and which are held out."""

from __future__ import annotations

import math

import numpy as np

from moe_scale.errors import ConfigError, Problem

TRAIN, VALID, TEST, LEAKED = range(4)
"""Values of :func:`assign_splits`; the first three are places in :data:`moe_scale.data.pairs.report.SPLITS`."""


def assign_splits(
    source_keys_M: np.ndarray, target_keys_M: np.ndarray, *, valid_fraction: float, test_fraction: float
) -> np.ndarray:
    """The split of every pair, so that no split shares a source sentence with another.

    Distinct source sentences are taken in the order of their hashes, which is as good as random and depends on
    nothing else: the first ``test_fraction`` of them, rounded up, are for the test, the next ``valid_fraction`` for
    validation, whatever the direction. A pair belongs to the split of its source sentence; but one for training that
    has a held-out source sentence as its *target* (as de-en has where en-de is held out) is LEAKED, so in no split.

    Args:
        source_keys_M, target_keys_M: [pairs] uint64 hashes of the sentences, equal for near-copies.

    Returns:
        [pairs] int8 of TRAIN, VALID, TEST and LEAKED.

    Raises:
        ConfigError: at ``data.test_fraction``, when nothing would be left to train on.
    """
    distinct = np.unique(source_keys_M)  # sorted, so in the order of the hashes
    num_test, num_valid = (math.ceil(f * len(distinct) - 1e-9) for f in (test_fraction, valid_fraction))
    test, heldout = distinct[:num_test], distinct[: num_test + num_valid]
    split_M = np.full(len(source_keys_M), TRAIN, dtype=np.int8)
    split_M[np.isin(target_keys_M, heldout)] = LEAKED
    split_M[np.isin(source_keys_M, heldout)] = VALID
    split_M[np.isin(source_keys_M, test)] = TEST
    if not (split_M == TRAIN).any():
        raise ConfigError(
            Problem(
                "data.test_fraction",
                f"{num_test} sentences for the test and {num_valid} for validation leave no pair to train on, of "
                f"{len(source_keys_M)} pairs of {len(distinct)} different source sentences",
                "give more text, or choose smaller fractions",
            )
        )
    return split_M
