"""KVCR over NIXL on one host: a process whose own DRAM tier holds the ring, and one that has blocks delivered.

Its shortest path: the source's progress thread finds the block in KVCR's memory and writes it to the destination, which
is a registered buffer of the reader. The router's hint, without which KVCR gets nothing, has come before the call, and
the reader looks for the result as often as it can without keeping the interpreter's lock from KVCR's own thread. Timed
is ``deliver`` until ``poll_completed`` has its result. It runs over the NIXL that is installed, with KVCR's options.

Both processes keep most of a core busy while they wait (NIXL's progress thread), which would be measured in everything
else. So they are stopped between gets.

NIXL's metadata listener, which KVCR switches on, listens on every interface while this runs.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final

from p2pkv.bench.child import Child, answer
from p2pkv.bench.raw_nixl import QUIET
from p2pkv.bench.rival_child import Memory, Shape, block, cannot, first_line, load, seconds_of, serve
from p2pkv.errors import DeadlineExceeded

NAME: Final = "kvcr"
NEEDS: Final = "It needs NIXL and pyzmq, which `make rivals` installs too."
HOST: Final = "127.0.0.1"
OPERATION_MS: Final = 30_000
"""A source that makes no progress for so long refuses everything from then on, and ours stands still between gets."""
LOOK_S: Final = 20e-6
"""Between two looks for a result; without a pause the looks keep the interpreter's lock from KVCR's thread."""
HOLDER_LOOK_S: Final = 0.001
HINTED: Final = "bench"


class Kvcr:
    """The two processes, stopped unless they are asked."""

    def __init__(self, shape: Shape) -> None:
        self._children: list[Child] = []
        try:
            holder = self._start("holder", *shape.arguments())
            endpoint = first_line(NAME, holder, NEEDS)
            first_line(NAME, self._start("reader", *shape.arguments(), endpoint), NEEDS)
            self._signal(signal.SIGSTOP)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def _start(self, *arguments: str) -> Child:
        child = Child("rival_kvcr", *arguments, env=QUIET)
        self._children.append(child)
        return child

    def _signal(self, number: int) -> None:
        for child in self._children:
            child.signal(number)

    def read(self, blocks: int) -> float | None:
        """See :class:`p2pkv.bench.rivals.Rival`."""
        self._signal(signal.SIGCONT)
        try:
            return seconds_of(NAME, self._children[-1].ask(str(blocks)))
        finally:
            self._signal(signal.SIGSTOP)

    def __enter__(self) -> Kvcr:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for child in reversed(self._children):
            child.signal(signal.SIGCONT)
            child.__exit__(kind, error, at)


class Agent:
    """In a child: KVCR with a registered buffer of so many blocks, and with a DRAM tier of its own where asked."""

    def __init__(self, name: str, shape: Shape, blocks: int, tier_blocks: int = 0) -> None:
        api, config, self._types = load("kvcr.api"), load("kvcr.config"), load("kvcr.types")
        self._name = name
        self.memory = Memory(blocks * shape.block_bytes)
        region = self._types.RegionDescriptor(addr=self.memory.address, size=shape.block_bytes, count=blocks)
        self._tier = Memory(tier_blocks * shape.block_bytes) if tier_blocks else None
        tier = self._tier and config.LocalDramOptions(pools=[("", self._tier.address, len(self._tier.view))])
        listener = socket.create_server((HOST, 0))
        port = int(listener.getsockname()[1])
        control = load("kvcr.control_channels").ZmqPeerControlChannel(HOST, port, HOST)
        control.adopt_listener(listener.detach())
        self.endpoint = str(control.endpoint)
        self.kvcr = api.KVCR(
            config.KVCRConfig(
                nixl_agent_name=name,
                pool_layouts=[("", shape.block_bytes)],
                operation_timeout_ms=OPERATION_MS,
                abandon_timeout_ms=2 * OPERATION_MS,
                nixl_listen_port=_free_port(),
            ),
            api.KVCRBindings(
                request_pin=lambda keys: 0,
                poll_pin_results=lambda: (),
                release_pin=lambda handle: True,
                framework_control=control,
            ),
            config.KVCRBackendConfigs(framework_regions=[region], local_dram=tier),
        )

    def place(self, index: int) -> list[Any]:
        """A block's place in the registered buffer."""
        return [self._types.MemoryRef(end_point_name=self._name, element_index=index)]

    def wait(self, operation: int) -> bool:
        """Look until an operation has ended; whether all of it went well."""
        deadline = time.monotonic() + OPERATION_MS / 1000 + 5.0
        while time.monotonic() < deadline:
            for handle, entries in self.kvcr.poll_completed():
                if handle == operation:
                    return all(entry.success for entry in entries.values())
            time.sleep(LOOK_S)
        raise DeadlineExceeded("an operation of KVCR does not end")


def holder(shape: Shape) -> None:
    """Deposit the ring, and stay, looking after its KVCR as an engine does."""
    agent = Agent("bench-holder", shape, 1, shape.ring_blocks)
    for number in range(shape.ring_blocks):
        agent.memory.view[:] = block(shape.block_bytes, number)
        if not agent.wait(agent.kvcr.deposit({key_of(number): agent.place(0)})):
            cannot("a deposit failed")
    answer(agent.endpoint)
    while not select.select([sys.stdin], [], [], HOLDER_LOOK_S)[0]:
        list(agent.kvcr.poll_completed())
    os._exit(0)


def reader(shape: Shape, endpoint: str) -> None:
    """Have blocks of the ring delivered."""
    agent = Agent("bench-reader", shape, shape.batch)
    kvcr = agent.kvcr
    keys = [key_of(number) for number in range(shape.ring_blocks)]
    places = [agent.place(i) for i in range(shape.batch)]
    hint = hint_of(endpoint, shape.ring_blocks)
    kvcr.submit_hint(hint, HINTED)

    def read(numbers: Sequence[int]) -> bool:
        blocks = {keys[number]: places[i] for i, number in enumerate(numbers)}
        if agent.wait(kvcr.deliver(blocks, HINTED)):
            return True
        kvcr.discard_hint(HINTED)  # it counts as failed from now on
        kvcr.submit_hint(hint, HINTED)
        return False

    serve(shape, agent.memory, read)


def hint_of(endpoint: str, blocks: int) -> Mapping[str, object]:
    """What a router would say: these blocks are there."""
    payload = {"source_control_endpoint": endpoint, "block_hashes": list(range(blocks))}
    action = {"action_type": "kv.fetch", "action_version": "1.0", "payload": payload}
    return {"protocol_version": "0.1", "actions": [action]}


def key_of(number: int) -> bytes:
    """The name of a block."""
    return number.to_bytes(8, "big")


def _free_port() -> int:
    """A port that is free now: KVCR takes a number only."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """``probe``, or ``holder`` with a shape, or ``reader`` with a shape and the holder's endpoint."""
    role, *rest = sys.argv[1:]
    if role == "probe":
        load("kvcr")
        answer("ready")
        os._exit(0)
    shape = Shape.of(rest[:3])
    if role == "holder":
        holder(shape)
    else:
        reader(shape, rest[3])


if __name__ == "__main__":
    main()
