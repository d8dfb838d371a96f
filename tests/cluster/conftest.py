"""Clusters for tests. What the agents wrote is shown with a test that failed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.agents import AgentProcess, Cluster


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A cluster of this test's own: it may stop and kill agents."""
    with Cluster() as made:
        request.node.clusters = [*getattr(request.node, "clusters", []), made]
        yield made


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


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed:
        for cluster in getattr(item, "clusters", []):
            report.sections += [(title, text) for title, text in cluster.logs()]
