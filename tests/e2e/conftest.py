"""Two agents and two real vLLM replicas that all end-to-end tests share: a start costs a minute or more.

A test takes the ``pair`` in working order and leaves it so, except the last: the one that kills an engine. The test
that runs the whole demo comes first, while the pair is not there yet: a third replica would want memory for nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pkv.demo.busy import pinning
from p2pkv.demo.cluster import Cluster, find_vllm_python, make_model
from p2pkv.demo.run import transport_used, warm
from p2pkv.errors import ConfigError
from tests.e2e.pair import Pair, has_nixl, say, shm_files, unused_shm_files, voice

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / ".cache" / "demo-model"
ORDER = {"test_demo.py": 0, "test_busy_source.py": 2}  # all others in between


def pytest_configure(config: pytest.Config) -> None:
    """Let :func:`tests.e2e.pair.say` be heard."""
    voice.capture = config.pluginmanager.getplugin("capturemanager")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put this directory's tests into :data:`ORDER`, in the places that they have among all others."""
    ours = [i for i, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    ordered = sorted((items[i] for i in ours), key=lambda item: ORDER.get(item.path.name, 1))
    for i, item in zip(ours, ordered, strict=True):
        items[i] = item


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of vLLM's environment; without one the tests are skipped, in CI they fail."""
    try:
        return find_vllm_python()
    except ConfigError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"NO VLLM: {error}: {error.hint}")


@pytest.fixture(scope="session")
def model(vllm_python: Path) -> Path:
    """The demo's model, made once."""
    return make_model(vllm_python, MODEL, say)


@pytest.fixture(scope="session")
def _pair(vllm_python: Path, model: Path) -> Iterator[Pair]:
    transport = "nixl" if has_nixl() else "tcp"
    if transport == "tcp":
        say("NO NIXL: the end-to-end tests run over tcp only")
    cores = pinning()
    before = shm_files()
    with Cluster(python=vllm_python, model=model, transport=transport, threads=1, gpu=False, progress=say) as cluster:
        cluster.start_agents(2, cores=cores.others)
        a = cluster.start_replica(cluster.agents[0], name="replica A", cores=cores.source)
        b = cluster.start_replica(cluster.agents[1], name="replica B", cores=cores.others)
        cluster.wait_for(a, b)
        warm(a, b, progress=say)
        assert transport_used(cluster.agents[1]) == transport
        yield Pair(cluster, transport)
    assert unused_shm_files() - before == set()  # although an engine was killed


@pytest.fixture
def pair(_pair: Pair, request: pytest.FixtureRequest) -> Pair:
    """The shared pair, checked to be alive; when the test fails, its report shows the ends of all logs."""
    request.node.clusters = [*getattr(request.node, "clusters", []), _pair.cluster]
    for name, child in [("agent", agent.child) for agent in _pair.cluster.agents] + [
        ("replica", replica.child) for replica in _pair.cluster.replicas
    ]:
        assert child.alive, f"{name} {child.name} was lost in an earlier test"
    return _pair
