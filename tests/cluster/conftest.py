"""Clusters for the tests of this folder. Every test here carries the marker ``cluster``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.hosts import Cluster, reason_to_skip
from tests.cluster.slurm import TOOLS, Slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two hosts, n1 and n2."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm with two nodes, n1 and n2."""
    if reason := reason_to_skip(TOOLS):
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster")) as hosts:
        yield Slurm(hosts)
