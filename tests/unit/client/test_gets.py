"""The native end of an engine's GETs (``native/gets.hpp``): what it sends, what it makes of answers, how it waits."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pkv import _native
from p2pkv.client.cache import End
from p2pkv.errors import RemoteProtocolError
from p2pkv.types import Status
from p2pkv.wire.engine import CODEC, Ahead, EngineError, Get, Got, ReleaseLease
from p2pkv.wire.engine_types import EngineType
from p2pkv.wire.fields import Extent
from p2pkv.wire.frame import BODY_BYTES_MAX, Frame, FrameDecoder
from p2pkv.wire.frame import encode as encode_frame
from p2pkv.wire.limits import KEYS_MAX

pytestmark = pytest.mark.deep

BLOCK = 512
SLOTS = 64
SPACE = 1 << 60
KEY = b"k" * 32
U32_MAX, U64_MAX = (1 << 32) - 1, (1 << 64) - 1
IN_FLIGHT_MAX = 256
LONG_S = 30.0

Answer = tuple[int, bytes, bytes]


def content(slot: int) -> bytes:
    return bytes([slot + 1]) * BLOCK


class Agent:
    """The other end. Slot ``i`` of the arena is ``content(i)``."""

    def __init__(self, look_s: float = 0.0) -> None:
        self.arena = bytearray(b"".join(content(slot) for slot in range(SLOTS)))
        ours, self.sock = socket.socketpair()
        self.sock.settimeout(LONG_S)
        self.gets = _native.Gets(ours.detach(), self.arena, look_s=look_s)
        self._frames = FrameDecoder()
        self._heard: list[Frame] = []

    def hear(self) -> tuple[int, msgspec.Struct]:
        """The next thing that the engine says."""
        while not self._heard:
            data = self.sock.recv(1 << 16)
            assert data, "the engine has gone"
            self._heard += self._frames.feed(data)
        frame = self._heard.pop(0)
        return frame.request_id, CODEC.decode(frame)

    def asked(self) -> tuple[int, Get]:
        request_id, get = self.hear()
        while isinstance(get, ReleaseLease):
            request_id, get = self.hear()
        assert isinstance(get, Get)
        return request_id, get

    def say(self, request_id: int, *messages: msgspec.Struct) -> None:
        self.sock.sendall(b"".join(CODEC.encode(message, request_id) for message in messages))


@pytest.fixture(params=[0.0, 0.02], ids=["sleeps", "looks"])
def agent(request: pytest.FixtureRequest) -> Iterator[Agent]:
    made = Agent(request.param)
    yield made
    made.gets.close("the test is over")
    made.sock.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(IN_FLIGHT_MAX) as pool:
        yield pool


def get(agent: Agent, keys: list[bytes], out: list[bytearray], seconds: float = LONG_S) -> Answer:
    return agent.gets.get(SPACE, keys, out, BLOCK, int(seconds * 1000), time.monotonic() + seconds)


def ask(
    agent: Agent, threads: ThreadPoolExecutor, count: int = 1, seconds: float = LONG_S
) -> tuple[Future[Answer], Any]:
    out = [bytearray(BLOCK) for _ in range(count)]
    return threads.submit(get, agent, [KEY] * count, out, seconds), out


def got(*slots: int, lease: int = 1, ttl_ms: int = 60_000, first: int = 0, more: bool = False) -> Got:
    indices = list(range(first, first + len(slots)))
    return Got(lease, ttl_ms, indices, bytes(len(slots)), b"", [Extent(slot * BLOCK, BLOCK) for slot in slots], more)


# --- what is said


def test_a_get_is_what_the_agent_would_have_made_of_it(agent: Agent, threads: ThreadPoolExecutor) -> None:
    keys = [bytes([n]) * (8 + n) for n in range(20)]
    asked = threads.submit(get, agent, keys, [bytearray(BLOCK) for _ in keys])
    request_id, heard = agent.asked()
    assert request_id != 0
    assert (heard.namespace, heard.keys, heard.deadline_ms) == (SPACE, keys, int(LONG_S * 1000))
    assert heard.processor in os.sched_getaffinity(0)
    agent.say(request_id, got(*range(20)))
    assert asked.result() == (End.DONE, bytes(20), b"")


def test_blocks_come_in_parts_and_each_lease_is_given_back(agent: Agent, threads: ThreadPoolExecutor) -> None:
    asked, out = ask(agent, threads, 3)
    request_id, _ = agent.asked()
    agent.say(request_id, got(7, 8, lease=3, more=True))
    assert agent.hear() == (0, ReleaseLease(3))
    agent.say(request_id, got(9, lease=U64_MAX, first=2))
    assert agent.hear() == (0, ReleaseLease(U64_MAX))
    assert asked.result() == (End.DONE, bytes(3), b"")
    assert out == [content(7), content(8), content(9)]


def test_an_answer_may_come_byte_by_byte(agent: Agent, threads: ThreadPoolExecutor) -> None:
    asked, out = ask(agent, threads)
    request_id, _ = agent.asked()
    for byte in CODEC.encode(Ahead(0, BLOCK, 9), request_id) + CODEC.encode(got(1), request_id):
        agent.sock.sendall(bytes([byte]))
    assert asked.result() == (End.DONE, b"\0", b"")
    assert out == [content(1)]


def test_the_largest_lawful_answer_is_read(agent: Agent, threads: ThreadPoolExecutor) -> None:
    out = bytearray(BLOCK)
    asked = threads.submit(get, agent, [KEY] * KEYS_MAX, [out] * KEYS_MAX)
    request_id, _ = agent.asked()
    missed = bytes([Status.MISS]) * KEYS_MAX
    extents = [Extent(U64_MAX, U64_MAX)] * KEYS_MAX
    agent.say(request_id, Got(U64_MAX, U32_MAX, list(range(KEYS_MAX)), missed, bytes(KEYS_MAX), extents, False))
    assert asked.result() == (End.DONE, missed, b"")


def test_many_threads_get_their_own_blocks_whatever_the_order(agent: Agent, threads: ThreadPoolExecutor) -> None:
    """Who reads the socket hands over what is not its own, and passes the reading on."""
    rounds, engines = 60, 8
    buffers = [bytearray(BLOCK) for _ in range(engines)]

    def engine(number: int) -> list[Answer]:
        answers = []
        for _ in range(rounds):
            buffers[number][:] = bytes(BLOCK)
            answers.append(get(agent, [bytes([number]) * 8], [buffers[number]]))
            assert buffers[number] == content(number)
        return answers

    running = [threads.submit(engine, number) for number in range(engines)]
    rng = random.Random(1)
    for _ in range(rounds):
        waiting = []
        while len(waiting) < engines:
            request_id, heard = agent.hear()
            if isinstance(heard, Get):
                waiting.append((request_id, heard.keys[0][0]))
        rng.shuffle(waiting)
        for request_id, number in waiting:
            agent.say(request_id, Ahead(0, number * BLOCK, 100))
        rng.shuffle(waiting)
        for request_id, number in waiting:
            agent.say(request_id, got(number, lease=request_id))
    for each in running:
        assert each.result() == [(End.DONE, b"\0", b"")] * rounds


# --- what does not count


def test_a_lease_that_had_run_out_makes_its_blocks_late(agent: Agent, threads: ThreadPoolExecutor) -> None:
    asked, _ = ask(agent, threads, 2)
    request_id, _ = agent.asked()
    agent.say(request_id, got(1, lease=5, more=True), got(2, lease=6, ttl_ms=0, first=1))
    assert asked.result() == (End.DONE, bytes([Status.OK, Status.TIMEOUT]), b"")


def test_an_answer_that_comes_too_late_is_given_back(agent: Agent, threads: ThreadPoolExecutor) -> None:
    late, out = ask(agent, threads, seconds=0.02)
    request_id, _ = agent.asked()
    assert late.result() == (End.LATE, bytes([Status.TIMEOUT]), b"")
    agent.say(request_id, Ahead(0, 0, 9), got(3, lease=77))
    other, _ = ask(agent, threads)  # somebody has to read the socket
    other_id, _ = agent.asked()
    assert agent.hear() == (0, ReleaseLease(77))
    assert other_id != request_id and out == [bytes(BLOCK)]
    agent.say(other_id, got(1))
    assert other.result()[0] == End.DONE


def test_an_arena_that_was_cut_off_is_a_loss_and_not_the_end(tmp_path: Any, threads: ThreadPoolExecutor) -> None:
    fd = os.memfd_create("arena")
    os.ftruncate(fd, 4 * 4096)
    arena = memoryview(_native.Mapping(fd, 4 * 4096, True))
    ours, theirs = socket.socketpair()
    gets = _native.Gets(ours.detach(), arena)
    os.ftruncate(fd, 4096)
    out = bytearray(4096)
    asked = threads.submit(gets.get, SPACE, [KEY], [out], 4096, 1000, time.monotonic() + LONG_S)
    [frame] = FrameDecoder().feed(theirs.recv(4096))
    answer = Got(1, 9999, [0], b"\0", b"", [Extent(2 * 4096, 4096)], False)
    theirs.sendall(CODEC.encode(answer, frame.request_id))
    assert asked.result() == (End.DONE, bytes([Status.LOST]), b"")
    theirs.close()
    os.close(fd)


# --- how it waits


def test_errors_are_the_callers(agent: Agent, threads: ThreadPoolExecutor) -> None:
    asked, _ = ask(agent, threads, 2)
    request_id, _ = agent.asked()
    error = EngineError("busy", "too much", ["x"])
    agent.say(request_id, got(1, more=True), error)
    end, statuses, body = asked.result()
    assert (end, statuses) == (End.REFUSED, bytes([Status.OK, Status.TIMEOUT]))
    assert CODEC.decode(Frame(EngineType.ERROR, 1, 0, body)) == error


def test_whoever_waits_hears_that_the_agent_has_gone(agent: Agent, threads: ThreadPoolExecutor) -> None:
    asked = [ask(agent, threads, 2)[0] for _ in range(5)]
    ids = [agent.asked()[0] for _ in asked]
    agent.say(ids[0], got(1, more=True))
    agent.sock.shutdown(socket.SHUT_RDWR)
    ends = [each.result() for each in asked]
    assert sum(statuses == bytes([Status.OK, Status.LOST]) for _, statuses, _ in ends) == 1
    assert {end for end, _, _ in ends} == {End.BROKEN}
    why = agent.gets.broken
    assert why in ("the agent closed it", "send failed: Broken pipe")  # who gives a lease back may see it first
    assert get(agent, [KEY], [bytearray(BLOCK)]) == (End.BROKEN, bytes([Status.LOST]), why.encode())


def test_closing_wakes_whoever_waits(agent: Agent, threads: ThreadPoolExecutor) -> None:
    asked = [ask(agent, threads)[0] for _ in range(3)]
    for _ in asked:
        agent.asked()
    agent.gets.close("no more")
    assert [each.result()[0] for each in asked] == [End.BROKEN] * 3
    assert agent.gets.broken == "no more"


def test_so_many_may_be_unanswered_and_no_more(agent: Agent, threads: ThreadPoolExecutor) -> None:
    asked = [ask(agent, threads)[0] for _ in range(IN_FLIGHT_MAX)]
    ids = [agent.asked()[0] for _ in asked]
    assert get(agent, [KEY], [bytearray(BLOCK)]) == (End.BUSY, bytes([Status.LOST]), b"")
    for request_id in ids:
        agent.say(request_id, got(1))
    assert {each.result()[0] for each in asked} == {End.DONE}


def test_an_agent_that_does_not_read_is_busy_and_then_given_up(agent: Agent) -> None:
    keys = [bytes(64)] * KEYS_MAX
    out = [bytearray(BLOCK)] * KEYS_MAX
    end, _, _ = get(agent, keys, out, 0.01)  # a megabyte: more than the socket takes
    assert end == End.BROKEN
    assert agent.gets.broken == "the agent stopped reading in the middle of a request"


def test_a_full_socket_is_busy(agent: Agent) -> None:
    assert get(agent, [KEY], [bytearray(BLOCK)], 0.001)[0] == End.LATE
    ends = set()
    keys = [bytes(64)] * 20
    while ends <= {End.LATE}:
        ends.add(get(agent, keys, [bytearray(BLOCK)] * 20, 0.001)[0])
    assert ends - {End.LATE} <= {End.BUSY, End.BROKEN}  # broken: where a get went in by half


def blocked(agent: Agent, threads: ThreadPoolExecutor, seconds: float) -> Future[Answer]:
    """A get that is more than the socket takes, of which a part is sent."""
    sending = threads.submit(get, agent, [bytes(64)] * KEYS_MAX, [bytearray(BLOCK)] * KEYS_MAX, seconds)
    assert select.select([agent.sock], [], [], LONG_S)[0]
    return sending


def test_whoever_waits_for_another_one_to_send_keeps_its_own_deadline(
    agent: Agent, threads: ThreadPoolExecutor
) -> None:
    sending = blocked(agent, threads, LONG_S)
    began = time.monotonic()
    assert get(agent, [KEY], [bytearray(BLOCK)], 0.1)[0] == End.BUSY
    assert time.monotonic() - began < LONG_S / 3
    agent.gets.close("enough")
    assert sending.result()[0] == End.BROKEN


class Stop(Exception):
    pass


@contextmanager
def signals() -> Iterator[None]:
    """This thread gets signals all the time, whose handler raises Stop in what is done here."""
    inside, over = threading.Event(), threading.Event()
    here = threading.get_ident()

    def stop(*_: object) -> None:
        if inside.is_set():
            inside.clear()
            raise Stop

    def knock() -> None:
        while not over.wait(0.02):
            signal.pthread_kill(here, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, stop)
    knocking = threading.Thread(target=knock)
    knocking.start()
    try:
        with pytest.raises(Stop):
            inside.set()
            yield
    finally:
        inside.clear()
        over.set()
        knocking.join()
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("whose", ["its own", "another's"])
def test_a_signal_handler_that_raises_ends_the_wait_for_a_full_socket(
    agent: Agent, threads: ThreadPoolExecutor, whose: str
) -> None:
    keys = [bytes(64)] * KEYS_MAX if whose == "its own" else [KEY]
    sending = None if whose == "its own" else blocked(agent, threads, LONG_S)
    with signals():
        get(agent, keys, [bytearray(BLOCK)] * len(keys))
    agent.gets.close("enough")
    assert sending is None or sending.result()[0] == End.BROKEN


def test_a_signal_is_looked_for_while_others_are_answered_all_the_time(
    agent: Agent, threads: ThreadPoolExecutor
) -> None:
    def answer() -> None:
        with suppress(AssertionError, OSError):  # until the engine has gone
            while True:
                request_id, heard = agent.hear()
                if isinstance(heard, Get) and heard.keys[0] != KEY:
                    agent.say(request_id, got(1))

    def other() -> None:
        while get(agent, [b"other" * 4], [bytearray(BLOCK)])[0] == End.DONE:
            pass

    running = [threads.submit(each) for each in (answer, other, other)]
    with signals():
        get(agent, [KEY], [bytearray(BLOCK)])
    agent.gets.close("enough")
    for each in running:
        each.result()


def test_a_signal_handler_that_raises_ends_the_wait(agent: Agent) -> None:
    with signals():
        get(agent, [KEY], [bytearray(BLOCK)])


def test_a_signal_handler_that_raises_ends_the_wait_for_another_thread_too(
    agent: Agent, threads: ThreadPoolExecutor
) -> None:
    reader, _ = ask(agent, threads)
    reader_id, _ = agent.asked()
    with signals():
        get(agent, [KEY], [bytearray(BLOCK)])
    agent.say(reader_id, got(1))
    assert reader.result()[0] == End.DONE


def test_a_signal_that_raises_nothing_changes_nothing(agent: Agent, threads: ThreadPoolExecutor) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    here = threading.get_ident()

    def script() -> None:
        request_id, _ = agent.asked()
        for _ in range(20):
            signal.pthread_kill(here, signal.SIGUSR1)
        agent.say(request_id, got(1))

    try:
        threads.submit(script)
        assert get(agent, [KEY], [bytearray(BLOCK)])[0] == End.DONE
    finally:
        signal.signal(signal.SIGUSR1, before)


# --- bad arguments


def test_buffers_of_another_length_or_number_are_refused(agent: Agent) -> None:
    for keys, out in (
        ([KEY], [bytearray(BLOCK - 1)]),
        ([KEY], [bytearray(BLOCK + 1)]),
        ([KEY], []),
        ([], [bytearray(BLOCK)]),
    ):
        with pytest.raises(ValueError, match="get: "):
            get(agent, keys, out)
    with pytest.raises(BufferError):
        get(agent, [KEY], [bytes(BLOCK)])  # type: ignore[list-item]
    with pytest.raises((TypeError, RuntimeError)):
        get(agent, ["k" * 32], [bytearray(BLOCK)])  # type: ignore[list-item]
    assert not select.select([agent.sock], [], [], 0)[0], "nothing was asked"


# --- hostile answers


def answer_to(make: Callable[[int], bytes]) -> tuple[Answer, bytearray, str | None]:
    """One get of one key, answered with these bytes and then by the end of the socket."""
    agent = Agent()
    out = bytearray(BLOCK)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(get, agent, [KEY], [out])
        request_id, _ = agent.asked()
        with suppress(BrokenPipeError, ConnectionResetError):
            agent.sock.sendall(make(request_id))
            agent.sock.shutdown(socket.SHUT_WR)
        answer = asked.result()
    agent.sock.close()
    return answer, out, agent.gets.broken


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), U64_MAX)
    | st.sampled_from([-1, 0, U32_MAX, U32_MAX + 1, U64_MAX])
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=80),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
GOTS: list[object] = [1, 9999, [0], b"\0", b"\2", [[BLOCK, BLOCK]], False]
AHEADS: list[object] = [0, BLOCK, 100]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), later=st.lists(json_like, max_size=2))
def test_an_answer_with_a_field_replaced_left_out_or_added_is_read_or_refused_as_the_agent_would(
    data: st.DataObject, later: list[object]
) -> None:
    """What is refused breaks the socket and gives nothing; what is read gives the block, or is nonsense."""
    number, fields = data.draw(st.sampled_from([(EngineType.GOT, list(GOTS)), (EngineType.AHEAD, list(AHEADS))]))
    at = data.draw(st.integers(0, len(fields) - 1))
    inner = fields[at]
    if isinstance(inner, list) and data.draw(st.booleans()):
        fields[at] = [data.draw(json_like)]
    else:
        fields[at] = data.draw(json_like)
    if data.draw(st.booleans()):
        fields = fields[: data.draw(st.integers(0, len(fields)))]
    body = msgspec.msgpack.encode(fields + later)
    try:
        theirs = CODEC.decode(Frame(number, 1, 0, body))
    except RemoteProtocolError:
        theirs = None
    (end, statuses, _), out, broken = answer_to(lambda request_id: encode_frame(number, body, request_id))
    if theirs is None:
        assert (end, statuses) == (End.BROKEN, bytes([Status.LOST])) and out == bytes(BLOCK)
        assert broken is not None and broken.startswith("malformed")
    else:
        assert broken is None or broken == "the agent closed it"
        if statuses == b"\0":
            assert isinstance(theirs, Got) and end != End.NONSENSE
            offset = theirs.extents[0].offset
            assert out == (b"".join(content(slot) for slot in range(SLOTS)))[offset : offset + BLOCK]


@settings(max_examples=200, deadline=None)
@given(body=st.binary(max_size=200), number=st.sampled_from([EngineType.GOT, EngineType.AHEAD]))
def test_random_bodies_never_give_a_block(body: bytes, number: EngineType) -> None:
    answer, _, _ = answer_to(lambda request_id: encode_frame(number, body, request_id))
    assert answer[1] != b"\0"


@settings(max_examples=200, deadline=None)
@given(data=st.binary(min_size=1, max_size=100))
def test_random_bytes_break_the_socket_or_say_nothing(data: bytes) -> None:
    answer, _, broken = answer_to(lambda _: data)
    assert answer[1] == bytes([Status.LOST]) and broken is not None


@pytest.mark.parametrize("number", sorted(set(range(256)) - {EngineType.GOT, EngineType.AHEAD, EngineType.ERROR}))
def test_what_is_no_answer_to_a_get_breaks_the_socket(number: int) -> None:
    (end, _, _), _, broken = answer_to(lambda request_id: encode_frame(number, b"\x90", request_id))
    assert end == End.BROKEN and broken == "what the agent says is no answer to a get"


def test_a_frame_of_another_version_or_too_long_breaks_the_socket() -> None:
    good = CODEC.encode(got(1), 1)
    for bad in (good[:4] + b"\2" + good[5:], (BODY_BYTES_MAX + 1).to_bytes(4, "little") + good[4:]):
        (end, _, _), _, broken = answer_to(lambda _, bad=bad: bad)  # type: ignore[misc]
        assert end == End.BROKEN and broken == "what the agent says is no answer to a get"
