"""Native code may read from an owner exactly while reads from it end within their posts, as the latest one showed."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from p2pkv import _native
from p2pkv.transport.nixl import NixlTransport
from p2pkv.types import Status
from tests.contract.node import Node, meeting
from tests.contract.test_transport import MIB, NIXL_MARKS, put

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(90), *NIXL_MARKS]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair() -> AsyncIterator[tuple[Node, Node]]:
    """An owner and a reader that is connected to it, with native reads."""
    async with meeting(Node("nixl"), Node("nixl", native_reads=True)) as both:
        yield both


async def test_native_code_hears_of_an_owner_that_turns_out_to_be_inline_and_of_one_that_is_not(
    pair: tuple[Node, Node],
) -> None:
    owner, reader = pair
    transport, native = reader.transport, reader.native
    assert isinstance(transport, NixlTransport) and isinstance(native, _native.NixlReads)

    async def pull() -> bool:
        """One block; whether native code may read the next one."""
        pulled = await reader.pull(owner.id, MIB, put(owner, MIB, 1))
        reader.forget(pulled)
        assert pulled.statuses == [Status.OK]
        return native.reads_from(owner.id)

    assert await pull()
    [(name, connection)] = transport.process._peers.items()
    assert connection.inline
    transport.process._peers[name] = connection._replace(inline=False)  # as if every probe had come too early
    assert not await pull()
    assert await pull()
