"""What all tests share: agents that a failed test ran have the last word."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from tests.cluster.agents import Cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Add the logs of the agents in ``item.clusters`` to the report of a failure."""
    report = yield
    if report.failed:
        for cluster in getattr(item, "clusters", []):
            report.sections += list(cluster.logs())
    return report


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A cluster of this test's own: it may stop and kill agents."""
    with Cluster() as made:
        request.node.clusters = [*getattr(request.node, "clusters", []), made]
        yield made
