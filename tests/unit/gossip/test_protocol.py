"""The rules of the protocol core, one by one (their numbers are those of its docstring)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pkv.config import Peer
from p2pkv.errors import InvalidArgument, RemoteProtocolError
from p2pkv.gossip.effects import Deliver, Dial, Established, HandOver, Send
from p2pkv.gossip.membership import State
from p2pkv.gossip.protocol import UNINTRODUCED_MAX, PeerProtocol
from p2pkv.index.hashing import pack_keys
from p2pkv.index.ownership import OwnershipLog
from p2pkv.types import Tier
from p2pkv.wire.frame import Frame, FrameDecoder
from p2pkv.wire.peer import (
    CODEC,
    Address,
    Advert,
    Delta,
    Digest,
    Get,
    Hello,
    Leave,
    Member,
    PeerError,
    PeerType,
    Pin,
    Pinned,
    Release,
    Resync,
    Snapshot,
    Welcome,
)

KEYS = pack_keys([11, 12, 13])


def owner_log(epoch: int = 1, keys: range = range(11, 14)) -> OwnershipLog:
    log = OwnershipLog(epoch, hold_ms=0)
    log.record(keys, Tier.DRAM, 0.0)
    log.poll(0.0)
    return log


def stream(bench: Any, conn: int, log: OwnershipLog) -> None:
    for part in log.snapshot():
        bench.say(conn, part)


def alive(bench: Any, node: int = 2) -> bool:
    row = bench.core.table.get(node)
    return row is not None and row.state is State.ALIVE


# --- 1: everybody reads everybody


def test_a_seed_is_dialed_and_greeted(bench: Any) -> None:
    conn = bench.dial()
    (hello,) = bench.sent(conn)
    assert isinstance(hello, Hello) and hello.role == "control" and hello.cell == "c" and hello.card.node == 1


def test_a_reader_gets_welcome_then_the_set_then_a_heartbeat(bench: Any) -> None:
    bench.log.record([1, 2, 3], Tier.DRAM, bench.now)
    conn = bench.hello()
    messages = bench.sent(conn)
    assert [type(m) for m in messages] == [Welcome, Snapshot, Delta]
    assert messages[1].keys_by_tier[Tier.DRAM] == pack_keys([1, 2, 3])
    assert (messages[2].seq, messages[2].keys_by_tier) == (1, [])


def test_who_dials_us_is_dialed_back(bench: Any) -> None:
    bench.hello()
    assert any(isinstance(e, Dial) and e.address == Address("10.0.0.2", 7841) for e in bench.effects)


def test_changes_reach_every_reader_in_one_frame(bench: Any, card: Any) -> None:
    first, second = bench.hello(), bench.hello(card(3, host="10.0.0.3"))
    bench.tick(0.1)
    bench.log.record([9], Tier.HBM, bench.now)
    bench.tick(0.1)
    (send,) = [e for e in bench.effects if isinstance(e, Send)]
    assert set(send.conns) == {first, second}
    assert bench.sent()[0].seq == 1


def test_an_idle_stream_beats(bench: Any) -> None:
    conn = bench.hello()
    bench.tick(5.0)
    beats = [m for m in bench.sent(conn) if isinstance(m, Delta)]
    assert 8 <= len(beats) <= 10 and not any(b.keys_by_tier for b in beats)


# --- 2: nobody is believed about a third


def test_members_that_others_name_are_dialed_and_nothing_else(bench: Any) -> None:
    conn = bench.read()
    bench.say(conn, Digest([Member(7, 3, Address("10.0.0.7", 1)), Member(1, 9, Address("10.0.0.1", 1))]))
    assert [e.address.host for e in bench.effects if isinstance(e, Dial)] == ["10.0.0.7"]
    assert set(bench.core.table.rows) == {2}


def test_a_million_fake_members_fit_in_bounded_memory(bench: Any) -> None:
    conn = bench.read()
    for batch in range(20):
        fakes = [Member(10 + i, 1, Address(f"h{batch}-{i}", 1)) for i in range(4_000)]
        bench.say(conn, Digest(fakes))
    assert len(bench.core._dials) <= 2 * 4 + 64
    assert len(bench.core.conns) <= 1 + 64


def test_digests_name_connected_members_only(bench: Any, card: Any) -> None:
    gone, there = bench.hello(card(3, host="10.0.0.3")), bench.hello()
    bench.keep(bench.core.on_closed(bench.now, gone, "reset"))
    bench.tick(3.0)
    (digest,) = [m for m in bench.sent(there) if isinstance(m, Digest)]
    assert [m.node for m in digest.members] == [2]


# --- 3: alive means current


def test_entries_are_shown_when_the_set_is_proven_and_not_before(bench: Any) -> None:
    conn = bench.read()
    log = owner_log()
    assert not alive(bench)
    bench.say(conn, log.heartbeat())  # without the set
    assert not alive(bench)
    stream(bench, conn, log)
    assert alive(bench) and bench.visible(KEYS) == b"\1\1\1"
    view = bench.core.peer(bench.now, 2)
    assert (view.seq, view.entries, view.state) == (1, 3, State.ALIVE)


def test_a_lost_connection_hides_at_once_and_the_next_one_shows_again(bench: Any) -> None:
    log = owner_log()
    conn = bench.read()
    stream(bench, conn, log)
    bench.keep(bench.core.on_closed(bench.now, conn, "reset"))
    assert not alive(bench) and bench.visible(KEYS) == b"\0\0\0"
    bench.tick(0.2)
    (dial,) = [e for e in bench.effects if isinstance(e, Dial)]
    bench.keep(bench.core.on_dialed(bench.now, dial.conn, "10.0.0.2"))
    bench.say(dial.conn, Welcome(1, bench.core.table.get(2).card, [], "c"))
    assert not alive(bench)
    stream(bench, dial.conn, log)
    bench.say(dial.conn, log.heartbeat())
    assert alive(bench) and bench.visible(KEYS) == b"\1\1\1"


def test_silence_hides_within_three_seconds_and_a_word_shows_again(bench: Any) -> None:
    log = owner_log()
    conn = bench.read()
    stream(bench, conn, log)
    bench.tick(2.4)
    assert alive(bench)
    bench.tick(0.3)
    assert not alive(bench) and bench.visible(KEYS) == b"\0\0\0"
    assert "silent" in bench.said("warning")[0]
    bench.say(conn, log.heartbeat())
    assert alive(bench) and bench.visible(KEYS) == b"\1\1\1"


def test_a_link_that_stays_dead_is_replaced(bench: Any) -> None:
    conn = bench.read()
    stream(bench, conn, owner_log())
    bench.tick(5.5)
    assert bench.closed(conn)
    assert any(isinstance(e, Dial) for e in bench.effects)


def test_a_wrong_checksum_hides_and_asks_for_the_set(bench: Any) -> None:
    log = owner_log()
    conn = bench.read()
    stream(bench, conn, log)
    bench.tick(2.0)
    bench.say(conn, msgspec.structs.replace(log.heartbeat(), checksum=log.checksum ^ 1))
    assert not alive(bench) and bench.visible(KEYS) == b"\0\0\0"
    assert any(isinstance(m, Resync) for m in bench.sent(conn))
    stream(bench, conn, log)
    assert alive(bench)


# --- 4: purge and leave


def test_what_is_unreachable_for_long_is_forgotten_with_its_slot(bench: Any) -> None:
    conn = bench.read()
    stream(bench, conn, owner_log())
    bench.keep(bench.core.on_closed(bench.now, conn, "reset"))
    slot = bench.core.table.get(2).slot
    assert bench.core.table.node_at(slot) == 2
    for _ in range(120):
        bench.tick(0.1)
        for effect in bench.effects:
            if isinstance(effect, Dial):
                bench.core.on_closed(bench.now, effect.conn, "refused")
    assert bench.core.table.get(2) is None and bench.core.table.node_at(slot) is None
    assert bench.index.count(slot) == 0


@pytest.mark.parametrize("on", ["its stream", "its reading"])
def test_who_says_goodbye_is_dropped_at_once_and_not_dialed(bench: Any, card: Any, on: str) -> None:
    reading = bench.hello()
    conn = bench.read()
    stream(bench, conn, owner_log())
    bench.core.on_seeds(bench.now, "test-10.0.0.2", [])  # a seed would go on being dialed
    slot = bench.core.table.get(2).slot
    bench.say(conn if on == "its stream" else reading, Leave(1))
    assert not bench.closed(conn) and not bench.closed(reading)  # it may hold blocks for us
    assert bench.core.table.get(2).state is State.LEFT and bench.index.count(slot) == 0
    bench.say(conn, owner_log().heartbeat())  # on its way when it left
    for gone in (conn, reading):
        bench.keep(bench.core.on_closed(bench.now, gone, "closed"))
    other = bench.hello(card(3, host="10.0.0.3"))
    bench.say(other, Advert(card(3, host="10.0.0.3")))
    bench.tick(1.0)
    assert "10.0.0.2" not in bench.dialing
    bench.hello()  # that life does not come back
    assert isinstance(bench.sent()[0], PeerError) and bench.sent()[0].code == "stale"
    back = bench.hello(card(2, epoch=2))
    assert isinstance(bench.sent(back)[0], Welcome)


def test_leaving_tells_everybody_refuses_newcomers_and_lets_readers_finish(bench: Any, card: Any) -> None:
    reader, owner = bench.hello(card(3, host="10.0.0.3")), bench.read()
    bench.keep(bench.core.leave(bench.now))
    for conn in (reader, owner):
        assert isinstance(bench.sent(conn)[-1], Leave) and not bench.closed(conn)
    assert not bench.core.leave(bench.now)
    assert any(isinstance(e, Deliver) for e in bench.say(reader, Release(1), request_id=1))
    for role in ("control", "data"):
        late = bench.hello(card(4, host="10.0.0.4"), role=role)
        assert bench.sent(late)[0].code == "draining" and bench.closed(late)
    bench.log.record([1], Tier.DRAM, bench.now)
    bench.tick(1.0)
    assert not bench.sent(reader)
    bench.keep(bench.core.close(bench.now))
    assert bench.closed(reader) and bench.closed(owner) and not bench.core.conns


def test_a_node_that_leaves_and_never_closes_is_closed(bench: Any) -> None:
    conn = bench.read()
    stream(bench, conn, owner_log())
    bench.say(conn, Leave(1))
    bench.tick(5.5)
    assert bench.closed(conn) and bench.core.table.get(2).state is State.LEFT


# --- 5: lives


def test_a_newer_epoch_voids_the_older_life(bench: Any, card: Any) -> None:
    old = bench.hello()
    conn = bench.read()
    stream(bench, conn, owner_log())
    new = bench.hello(card(2, epoch=2, instance=2))
    assert bench.closed(old) and bench.closed(conn) and not bench.closed(new)
    assert bench.visible(KEYS) == b"\0\0\0" and bench.index.stats().entries == 0
    assert bench.core.peer(bench.now, 2).epoch == 2


def test_an_older_epoch_is_refused(bench: Any, card: Any) -> None:
    conn = bench.read(card(2, epoch=5))
    stream(bench, conn, owner_log(5))
    late = bench.hello(card(2, epoch=4))
    assert bench.sent(late)[0].code == "stale" and bench.closed(late)
    assert alive(bench) and bench.core.peer(bench.now, 2).epoch == 5


def test_an_owner_of_an_older_epoch_is_not_read(bench: Any, card: Any) -> None:
    bench.hello(card(2, epoch=5))
    conn = bench.read(card(2, epoch=4, host="10.0.0.9"))
    assert bench.sent(conn)[0].code == "stale" and bench.closed(conn)


def test_a_stream_of_another_epoch_is_a_violation(bench: Any) -> None:
    conn = bench.read()
    bench.say(conn, owner_log(2).heartbeat())
    assert bench.sent(conn)[0].code == "protocol" and bench.closed(conn)


def test_an_id_that_is_taken_is_refused_loudly_while_its_holder_lives(bench: Any, card: Any) -> None:
    conn = bench.read()
    stream(bench, conn, owner_log())
    twin = bench.hello(card(2, instance=99, host="10.0.0.9"))
    assert bench.sent(twin)[0].code == "duplicate" and bench.closed(twin) and bench.said("error")
    assert alive(bench)
    bench.keep(bench.core.on_closed(bench.now, conn, "reset"))
    after = bench.hello(card(2, instance=99, host="10.0.0.9"))  # a restart that lost its epoch
    assert isinstance(bench.sent(after)[0], Welcome)


def test_another_process_with_our_id_is_refused_loudly(bench: Any, card: Any) -> None:
    conn = bench.hello(card(1, epoch=7, instance=5))
    assert bench.sent(conn)[0].code == "duplicate" and bench.said("error")
    owner = bench.read(card(1, epoch=7, instance=5))
    assert bench.closed(owner) and 1 not in bench.core.table.rows


def test_a_living_node_that_comes_back_from_elsewhere_is_loud(bench: Any, card: Any) -> None:
    stream(bench, bench.read(), owner_log())
    bench.hello(card(2, epoch=2, instance=9, host="10.0.0.9"))
    assert bench.core.counters["taken_over"] == 1 and bench.said("error")


# --- 6: self and cell


def test_a_node_that_dials_itself_forgets_the_address(bench: Any) -> None:
    conn = bench.dial("10.0.0.1")
    bench.say(conn, PeerError("self", ""))
    assert bench.closed(conn)
    assert not any(isinstance(e, Dial) for e in bench.tick(10.0))
    bench.core.on_seeds(bench.now, "dns", [Address("10.0.0.1", 7841)])
    assert not any(isinstance(e, Dial) for e in bench.tick(10.0))


def test_a_node_that_is_dialed_by_itself_says_so(bench: Any) -> None:
    conn = bench.hello(bench.core.card)
    assert bench.sent(conn)[0].code == "self" and bench.closed(conn)


def test_another_cell_is_refused_loudly_once(bench: Any) -> None:
    conn = bench.hello(cell="other")
    assert bench.sent(conn)[0].code == "cell" and bench.closed(conn)
    assert "other" in bench.said("error")[0]
    bench.hello(cell="other")
    assert not bench.said("error")
    assert bench.core.counters["refused_cell"] == 2 and not bench.core.table.rows


def test_a_welcome_from_another_cell_is_refused(bench: Any, card: Any) -> None:
    conn = bench.dial()
    bench.say(conn, Welcome(1, card(), [], "other"))
    assert bench.sent(conn)[0].code == "cell" and bench.closed(conn)


# --- 7: lawful frames only


def test_no_common_protocol_version_is_refused(bench: Any) -> None:
    conn = bench.hello(protocol_min=7, protocol_max=9)
    assert bench.sent(conn)[0].code == "protocol" and bench.closed(conn)


def test_a_newer_peer_that_still_speaks_ours_is_welcome(bench: Any) -> None:
    conn = bench.hello(protocol_max=9)
    assert bench.sent(conn)[0].protocol == 1


def test_hello_must_come_in_time(bench: Any) -> None:
    conn = bench.accept()
    bench.tick(2.5)
    assert bench.closed(conn) and conn not in bench.core.conns


def test_welcome_must_come_in_time(bench: Any) -> None:
    conn = bench.dial()
    bench.tick(2.5)
    assert bench.closed(conn)


@pytest.mark.parametrize(
    "message", [Pin(1, [], 1), Get(1, [], 1), Leave(1), Resync(0, ""), Digest([])], ids=lambda m: type(m).__name__
)
def test_nothing_comes_before_hello(bench: Any, message: Any) -> None:
    conn = bench.accept()
    bench.say(conn, message)
    assert bench.sent(conn)[0].code == "protocol" and bench.closed(conn)


def test_a_reader_may_not_send_a_stream_and_an_owner_may_not_ask(bench: Any, card: Any) -> None:
    reader, owner = bench.hello(card(3, host="10.0.0.3")), bench.read()
    bench.say(reader, owner_log().heartbeat())
    assert bench.closed(reader)
    bench.say(owner, Pin(1, [], 1), request_id=1)
    assert bench.closed(owner)


def test_a_second_hello_is_a_violation(bench: Any, card: Any) -> None:
    conn = bench.hello()
    bench.say(conn, Hello(1, 1, "c", "control", card()))
    assert bench.closed(conn)


def test_requests_and_answers_are_delivered(bench: Any, card: Any) -> None:
    reader, owner = bench.hello(card(3, host="10.0.0.3")), bench.read()
    (delivered,) = bench.say(reader, Pin(1, [], 1), request_id=5)
    assert isinstance(delivered, Deliver) and delivered.frame.request_id == 5
    (delivered,) = bench.say(owner, Pinned(0, 0, b"", [], [], b"", ""), request_id=6)
    assert isinstance(delivered, Deliver) and delivered.conn == owner


def test_a_data_connection_is_welcomed_and_handed_over(bench: Any) -> None:
    conn = bench.hello(role="data")
    assert isinstance(bench.sent(conn)[0], Welcome) and bench.sent(conn)[0].members == []
    assert isinstance(bench.effects[-1], HandOver)
    assert conn not in bench.core.conns and not bench.core.table.rows


def test_an_advert_of_somebody_else_is_a_violation(bench: Any, card: Any) -> None:
    conn = bench.hello()
    bench.say(conn, Advert(card(3)))
    assert bench.closed(conn) and 3 not in bench.core.table.rows


# --- 8: repair


def test_a_stream_that_stays_wrong_is_left_alone_for_a_while(bench: Any) -> None:
    conn = bench.read()
    log = owner_log()
    lie = msgspec.structs.replace(log.heartbeat(), checksum=1)
    resyncs = 0
    for _ in range(200):
        bench.say(conn, lie)
        resyncs += sum(isinstance(m, Resync) for m in bench.sent(conn))
        if bench.closed(conn):
            break
        bench.tick(0.1)
        resyncs += sum(isinstance(m, Resync) for m in bench.sent(conn))
        if bench.closed(conn):
            break
    assert bench.closed(conn) and resyncs == 3
    assert not any(isinstance(e, Dial) for e in bench.tick(5.0))


def test_resync_is_answered_with_the_set_but_not_as_often_as_one_likes(bench: Any) -> None:
    bench.log.record(range(100), Tier.DRAM, bench.now)
    conn = bench.hello()
    bench.say(conn, Resync(0, "gap"))
    assert [type(m) for m in bench.sent(conn)] == [Snapshot, Delta]
    for _ in range(50):
        bench.say(conn, Resync(0, "gap"))
        assert not bench.sent(conn)
    bench.tick(1.0)
    bench.say(conn, Resync(0, "gap"))
    assert bench.sent(conn)


# --- 9: own stalls


def test_after_a_stall_of_its_own_a_node_reads_before_it_judges(bench: Any) -> None:
    log = owner_log()
    conn = bench.read()
    stream(bench, conn, log)
    bench.tick(1.0)
    bench.now += 6.0
    bench.keep(bench.core.on_timer(bench.now))
    assert alive(bench) and bench.core.counters["stalls"] == 1
    bench.say(conn, log.heartbeat())
    bench.tick(1.5)
    assert alive(bench) and not bench.core.counters["hidden"]


def test_after_a_stall_the_really_dead_are_hidden_all_the_same(bench: Any) -> None:
    conn = bench.read()
    stream(bench, conn, owner_log())
    bench.now += 6.0
    bench.keep(bench.core.on_timer(bench.now))
    bench.tick(1.2)
    assert not alive(bench)


# --- 10: bounds


def test_unintroduced_connections_are_bounded(bench: Any) -> None:
    conns = [bench.accept() for _ in range(UNINTRODUCED_MAX)]
    extra = bench.accept()
    assert bench.closed(extra)
    bench.keep(bench.core.on_closed(bench.now, conns[0], "gone"))
    assert not bench.closed(bench.accept())


def test_a_full_member_table_refuses_newcomers_but_gives_dead_rows_away(bench: Any, card: Any) -> None:
    conns = [bench.hello(card(10 + i, host=f"10.0.1.{i}")) for i in range(4)]
    late = bench.hello(card(20, host="10.0.2.1"))
    assert bench.sent(late)[0].code == "busy" and len(bench.core.table.rows) == 4
    bench.keep(bench.core.on_closed(bench.now, conns[1], "gone"))
    assert isinstance(bench.sent(bench.hello(card(20, host="10.0.2.1")))[0], Welcome)
    assert 11 not in bench.core.table.rows


def test_a_reader_has_two_connections_at_most(bench: Any) -> None:
    conns = []
    for _ in range(4):
        conns.append(bench.hello())
    assert bench.core.table.get(2).reader_conns == tuple(conns[2:])
    assert set(bench.core._readers) == set(conns[2:])


def test_two_names_of_one_owner_make_one_connection(bench: Any, card: Any) -> None:
    first = bench.read()
    second = bench.dial("name.of.2")
    bench.say(second, Welcome(1, card(), [], "c"))
    assert bench.closed(second) and not bench.closed(first)
    assert not any(isinstance(e, Established) for e in bench.effects)
    assert not any(isinstance(e, Dial) for e in bench.tick(2.0))


def test_an_index_with_too_few_slots_is_refused_at_the_start(make_bench: Callable[..., Any]) -> None:
    bench = make_bench()
    with pytest.raises(InvalidArgument):
        PeerProtocol(
            settings=Peer(members_max=8), cell="c", card=bench.core.card, log=bench.log, index=bench.index,
            rng=random.Random(1), now=0.0,
        )  # fmt: skip


# --- layouts and cards


def test_a_layout_conflict_is_loud_once_and_visible(make_bench: Callable[..., Any], card: Any, layout: Any) -> None:
    bench = make_bench(card=card(1, host="10.0.0.1", layouts=[layout()]))
    conn = bench.hello(card(layouts=[layout(block_tokens=16)]))
    (line,) = bench.said("error")
    assert "block_tokens is 16 there, 256 here" in line
    assert bench.core.peer(bench.now, 2).conflicts == ("block_tokens",)
    bench.say(conn, Advert(card(layouts=[layout(block_tokens=16)])))
    assert not bench.said("error")
    bench.say(conn, Advert(card(layouts=[layout(block_tokens=16, order="x")])))
    assert bench.said("error") and bench.core.peer(bench.now, 2).conflicts == ("block_tokens", "order")
    own = msgspec.structs.replace(bench.core.card, layouts=[])
    bench.keep(bench.core.set_card(bench.now, own))
    assert bench.core.peer(bench.now, 2).conflicts == ()
    assert isinstance(bench.sent(conn)[0], Advert)


def test_a_wildcard_address_is_taken_from_the_connection(bench: Any, card: Any) -> None:
    conn = bench.accept("10.9.9.9")
    bench.say(conn, Hello(1, 1, "c", "control", card(host="0.0.0.0")))
    assert bench.core.peer(bench.now, 2).address == Address("10.9.9.9", 7841)


# --- fuzz

AWKWARD = [
    Leave(1), Leave(2), Resync(0, ""), Digest([]), PeerError("self", ""), PeerError("x", ""), Pin(1, [], 1),
    Delta(1, 1, 0, [b"12345678"]), Delta(1, (1 << 64) - 1, (1 << 64) - 1, [b"", b"1"]), Delta(2, 1, 0, []),
    Snapshot(1, 5, 0, 0, 2, []), Snapshot(1, 5, 0, 9, 2, []), Snapshot(1, 5, 0, 0, 0, [b"12345678"]),
    Snapshot(1, (1 << 64) - 1, 0, 0, 1, []),
]  # fmt: skip
FRAMES = st.one_of(
    st.builds(Frame, st.integers(0, 40), st.integers(0, 9), st.just(0), st.binary(max_size=64)),
    st.sampled_from(AWKWARD).map(lambda m: next(FrameDecoder().feed(CODEC.encode(m)))),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=st.lists(st.tuples(st.sampled_from("hrax"), FRAMES), max_size=20))
def test_no_sequence_of_frames_breaks_the_core(make_bench: Callable[..., Any], script: list[tuple[str, Frame]]) -> None:
    bench = make_bench()
    conns = {"h": bench.hello(), "r": bench.read(), "a": bench.accept()}
    for who, frame in script:
        if who == "x":
            bench.tick(0.7)
        elif conns[who] in bench.core.conns:
            bench.keep(bench.core.on_frame(bench.now, conns[who], frame))
    bench.tick(1.0)


def test_bytes_that_are_no_frame_close_the_connection(bench: Any) -> None:
    conn = bench.accept()
    bench.keep(bench.core.on_malformed(bench.now, conn, RemoteProtocolError("garbage")))
    assert bench.sent(conn)[0].code == "protocol" and bench.closed(conn)
    assert bench.core.counters["malformed"] == 1


def test_settings_fit_the_promise_of_three_seconds() -> None:
    defaults = Peer()
    assert defaults.silence_ms + 2 * defaults.flush_ms <= 3_000
    assert defaults.silence_ms >= 5 * defaults.heartbeat_ms
    assert PeerType.DIGEST == 16
