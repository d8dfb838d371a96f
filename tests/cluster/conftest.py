"""Clusters that tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.agents import AgentProcess, Cluster


@pytest.fixture(scope="module")
def _pair() -> Iterator[Cluster]:
    with Cluster() as made:
        made.start(2)
        made.connected()
        yield made


@pytest.fixture
def pair(_pair: Cluster, request: pytest.FixtureRequest) -> list[AgentProcess]:
    """Two connected agents (tcp) that the module's tests share: a test must leave them alive and in order."""
    request.node.clusters = [*getattr(request.node, "clusters", []), _pair]
    return _pair.agents
