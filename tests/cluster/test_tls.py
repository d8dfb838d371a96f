"""Two real agents whose TCP is mutual TLS, in a cell with a key: blocks arrive as they are, on every path."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from p2pkv.gossip import keyfile
from p2pkv.gossip.keyring import KEY_BYTES, Key, Keyring
from tests.cluster.agents import Cluster, make_layout, visible
from tests.unit.gossip.certificates import Authority

pytestmark = pytest.mark.cluster
BLOCK_BYTES = 1 << 20


@pytest.mark.parametrize("short_way", [True, False])
def test_pulls_go_through_tls(cluster: Cluster, tmp_path: Path, short_way: bool) -> None:
    authority = Authority(tmp_path, "authority")
    keyfile.write(tmp_path / "keys", Keyring([Key(secrets.token_bytes(KEY_BYTES))]))
    agents = []
    for name in ("a", "b"):
        certificate, key = authority.issue(name)
        settings = {
            "peer.tls_certificate": certificate, "peer.tls_key": key, "peer.tls_authority": authority.path,
            "peer.keys": tmp_path / "keys", "engine.short_way": str(short_way).lower(),
        }  # fmt: skip
        seeds = tuple(agent.address for agent in agents)
        agents += cluster.start(1, seeds=seeds, settings=settings)
    cluster.connected()
    owner, reader = (agent.open(make_layout(BLOCK_BYTES)) for agent in agents)
    keys = [secrets.token_bytes(16) for _ in range(24)]
    blocks = [secrets.token_bytes(BLOCK_BYTES) for _ in keys]
    owner.put(keys, blocks)
    visible(reader, keys)
    for turn in range(3):  # the first opens connections, later ones may go the short way
        some = keys[turn * 8 : turn * 8 + 8]
        out = [bytearray(BLOCK_BYTES) for _ in some]
        assert reader.get_into(some, out, deadline_ms=10_000) == [True] * 8
        assert out == blocks[turn * 8 : turn * 8 + 8]
    assert agents[0].metric("p2pkv_data_protocol_errors_total") == 0
