"""The client's messages against the agent's: two definitions of one protocol, which must not drift apart."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pkv.client import messages
from p2pkv.errors import RemoteProtocolError
from p2pkv.types import Layout
from p2pkv.wire import engine
from p2pkv.wire.engine_types import EngineType
from p2pkv.wire.frame import BODY_BYTES_MAX, HEADER_BYTES, Frame, FrameDecoder
from p2pkv.wire.limits import ERROR_FIELDS_MAX, KEYS_MAX, NAME_CHARS_MAX, NODES_MAX, REPLICAS_MAX, TEXT_CHARS_MAX

pytestmark = pytest.mark.deep

U32_MAX, U64_MAX = (1 << 32) - 1, (1 << 64) - 1
LAYOUT = Layout(model="m", revision="r", kv_dtype="bf16", block_tokens=16, block_bytes=1 << 20)

NATIVE = {EngineType.GET, EngineType.GOT, EngineType.RELEASE, EngineType.AHEAD}
"""Written and read by native code at the client's end: ``test_gets.py``."""

REQUESTS = {number: request for request, number in messages.REQUESTS.items()}
OURS: dict[EngineType, Any] = REQUESTS | {EngineType(number): answer for number, answer in messages.ANSWERS.items()}
THEIRS: dict[EngineType, type[msgspec.Struct]] = {
    number: kind for kind, number in engine.CODEC._types.items() if number not in NATIVE
}

u32 = st.integers(0, U32_MAX) | st.sampled_from([0, U32_MAX])
u64 = st.integers(0, U64_MAX) | st.sampled_from([0, U64_MAX])
names = st.text(max_size=40) | st.just("ü" * NAME_CHARS_MAX)
keys = st.lists(st.binary(min_size=8, max_size=64), max_size=5)
slots = st.lists(u32, max_size=5)
per_key = st.binary(max_size=9) | st.just(bytes(KEYS_MAX))
fields_by_type: dict[EngineType, tuple[st.SearchStrategy[Any], ...]] = {
    EngineType.ATTACH: (u32, u32, names, u32),
    EngineType.READY: (u32, u64, u32, u64, u32),
    EngineType.OPEN: (st.builds(LAYOUT.replace, lora=names, group=u32),),
    EngineType.OPENED: (u64,),
    EngineType.MAP_REGION: (u32, u64, u64, u32),
    EngineType.UNMAP_REGION: (u32,),
    EngineType.STORE: (u64, keys, u32, slots, u32),
    EngineType.LOAD: (u64, keys, u32, slots, u32, u32, u32),
    EngineType.DONE: (per_key, per_key, u64, u64),
    EngineType.MATCH: (u64, keys, st.booleans(), u32, u32, u32),
    EngineType.MATCHED: (
        per_key, u32, u32, st.lists(st.builds(engine.NodeMatch, u64, u32, u32, u32, u32, u32), max_size=3),
    ),
    EngineType.PREFETCH: (u64, keys, u32),
    EngineType.REPLICATE: (u64, keys, st.lists(u64, min_size=1, max_size=3)),
    EngineType.REPLICATED: (slots, slots, st.lists(st.text(max_size=99), max_size=3)),
    EngineType.WARM: (u64, u32, st.booleans()),
    EngineType.WARMING: (st.booleans(), st.booleans(), u32, u64, u64, u64, u64, u64, u64, u64, st.text(max_size=99)),
    EngineType.OK: (),
    EngineType.ERROR: (names, st.text(max_size=99) | st.just("x" * TEXT_CHARS_MAX), st.lists(names, max_size=3)),
}  # fmt: skip

LARGEST: dict[EngineType, msgspec.Struct] = {
    EngineType.DONE: engine.Done(bytes(KEYS_MAX), bytes(KEYS_MAX), U64_MAX, U64_MAX),
    EngineType.MATCHED: engine.Matched(
        bytes(KEYS_MAX), U32_MAX, U32_MAX, [engine.NodeMatch(U64_MAX, *[U32_MAX] * 5)] * NODES_MAX
    ),
    EngineType.REPLICATED: engine.Replicated(
        [U32_MAX] * REPLICAS_MAX, [U32_MAX] * REPLICAS_MAX, ["é" * TEXT_CHARS_MAX] * REPLICAS_MAX
    ),
    EngineType.WARMING: engine.Warming(True, True, U32_MAX, *[U64_MAX] * 7, "é" * TEXT_CHARS_MAX),
    EngineType.ERROR: engine.EngineError(
        "é" * NAME_CHARS_MAX, "é" * TEXT_CHARS_MAX, ["é" * NAME_CHARS_MAX] * ERROR_FIELDS_MAX
    ),
}


def plain(value: Any) -> Any:
    """A message of either kind as nested lists."""
    return msgspec.msgpack.decode(engine_body(value)) if isinstance(value, msgspec.Struct) else _listed(value)


def _listed(value: Any) -> Any:
    return [_listed(each) for each in value] if isinstance(value, tuple | list) else value


def engine_body(message: msgspec.Struct) -> bytes:
    [frame] = FrameDecoder().feed(engine.CODEC.encode(message))
    return frame.body


def answered(message: msgspec.Struct, request_id: int = 1) -> messages.Answer:
    """What the client reads where the agent has said ``message``."""
    [frame] = FrameDecoder().feed(engine.CODEC.encode(message, request_id))
    return messages.decode(frame)


# --- the same protocol ---


def test_every_message_is_on_both_sides_under_the_same_number_and_name() -> None:
    assert {number: kind.__name__ for number, kind in OURS.items()} == {
        number: kind.__name__ for number, kind in THEIRS.items()
    }
    assert set(OURS) == set(THEIRS) == set(EngineType) - NATIVE
    assert len(messages.REQUESTS) + len(messages.ANSWERS) == len(OURS)


@pytest.mark.parametrize("number", OURS)
def test_every_message_has_the_same_fields_in_the_same_order_with_the_same_defaults(number: EngineType) -> None:
    ours, theirs = OURS[number], msgspec.structs.fields(THEIRS[number])
    assert ours._fields == tuple(field.name for field in theirs)
    defaults = {f.name: f.default_factory() for f in theirs if f.default_factory is not msgspec.NODEFAULT}
    defaults |= {f.name: f.default for f in theirs if f.default is not msgspec.NODEFAULT}
    assert {name: _listed(value) for name, value in ours._field_defaults.items()} == defaults


def test_what_messages_are_made_of_has_the_same_fields_too() -> None:
    assert messages.NodeMatch._fields == engine.NodeMatch.__struct_fields__


@pytest.mark.parametrize("number", OURS)
def test_every_message_is_tried_with_as_many_fields_as_it_has(number: EngineType) -> None:
    assert len(fields_by_type[number]) == len(OURS[number]._fields)


# --- there and back ---


@pytest.mark.parametrize("number", REQUESTS)
@settings(max_examples=60)
@given(data=st.data(), request_id=u32)
def test_a_request_is_byte_for_byte_what_the_agent_would_have_made_of_it(
    number: EngineType, data: st.DataObject, request_id: int
) -> None:
    fields = [data.draw(field) for field in fields_by_type[number]]
    theirs = THEIRS[number](*fields)
    ours = REQUESTS[number](*[field.asdict() if isinstance(field, Layout) else field for field in fields])
    sent = messages.encode(ours, request_id)
    assert sent == engine.CODEC.encode(theirs, request_id)
    [frame] = FrameDecoder().feed(sent)
    assert engine.CODEC.decode(frame) == theirs


@pytest.mark.parametrize("number", messages.ANSWERS)
@settings(max_examples=60)
@given(data=st.data())
def test_an_answer_is_read_as_the_agent_meant_it(number: EngineType, data: st.DataObject) -> None:
    theirs = THEIRS[number](*[data.draw(field) for field in fields_by_type[number]])
    ours = answered(theirs)
    assert type(ours) is messages.ANSWERS[number]
    assert _listed(ours) == plain(theirs)
    assert messages.pack(ours) == engine_body(theirs)


@pytest.mark.parametrize("number", LARGEST)
def test_the_largest_lawful_answers_are_read(number: EngineType) -> None:
    theirs = LARGEST[number]
    assert _listed(answered(theirs)) == plain(theirs)


@pytest.mark.parametrize("number", [EngineType.STORE, EngineType.LOAD])
def test_the_largest_lawful_request_fits_a_frame(number: EngineType) -> None:
    fields = (U64_MAX, [bytes(64)] * KEYS_MAX, U32_MAX, [U32_MAX] * KEYS_MAX, U32_MAX)
    sent = messages.encode(REQUESTS[number](*fields))
    assert len(sent) - HEADER_BYTES <= BODY_BYTES_MAX and sent == engine.CODEC.encode(THEIRS[number](*fields))


# --- as strict ---

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


def agree(number: int, body: bytes) -> None:
    """Both sides refuse it, or both read the same."""
    frame = Frame(number, 1, 0, body)
    try:
        theirs = engine.CODEC.decode(frame)
    except RemoteProtocolError:
        with pytest.raises(RemoteProtocolError, match="malformed"):
            messages.decode(frame)
    else:
        assert _listed(messages.decode(frame)) == plain(theirs)


@pytest.mark.parametrize("number", messages.ANSWERS)
@settings(max_examples=150)
@given(data=st.data(), later=st.lists(json_like, max_size=2))
def test_an_answer_with_a_field_replaced_left_out_or_added_is_read_or_refused_as_the_agent_would(
    number: EngineType, data: st.DataObject, later: list[object]
) -> None:
    fields = plain(THEIRS[number](*[data.draw(field) for field in fields_by_type[number]]))
    if fields:
        at = data.draw(st.integers(0, len(fields) - 1))
        if isinstance(fields[at], list) and fields[at] and data.draw(st.booleans()):
            fields[at][0] = data.draw(json_like)
        else:
            fields[at] = data.draw(json_like)
    if data.draw(st.booleans()):
        fields = fields[: data.draw(st.integers(0, len(fields)))]
    agree(number, msgspec.msgpack.encode(fields + later))


def answer_with(number: EngineType, at: int, value: object) -> list[object]:
    """The shortest answer of its kind with one field replaced."""
    shortest: dict[EngineType, list[object]] = {
        EngineType.READY: [1, 1, 1, 1, 1],
        EngineType.DONE: [b"", b"", 0, 0],
        EngineType.MATCHED: [b"", 0, 0, []],
        EngineType.ERROR: ["", "", []],
    }
    fields = list(shortest[number])
    fields[at] = value
    return fields


@pytest.mark.parametrize(
    ("number", "at", "wrong"),
    [
        (EngineType.READY, 0, U32_MAX + 1), (EngineType.READY, 0, True), (EngineType.READY, 1, -1),
        (EngineType.DONE, 0, bytes(KEYS_MAX + 1)), (EngineType.DONE, 0, ""),
        (EngineType.MATCHED, 3, [[1, 2, 3, 4, 5]]), (EngineType.MATCHED, 3, [[1, 2, 3, 4, 5, 6]] * (NODES_MAX + 1)),
        (EngineType.ERROR, 0, "x" * (NAME_CHARS_MAX + 1)), (EngineType.ERROR, 1, "x" * (TEXT_CHARS_MAX + 1)),
        (EngineType.ERROR, 2, [""] * (ERROR_FIELDS_MAX + 1)), (EngineType.ERROR, 2, ["x" * (NAME_CHARS_MAX + 1)]),
    ],
    ids=range(11),
)  # fmt: skip
def test_values_out_of_bounds_are_refused_by_both(number: EngineType, at: int, wrong: object) -> None:
    body = msgspec.msgpack.encode(answer_with(number, at, wrong))
    with pytest.raises(RemoteProtocolError, match="malformed"):
        messages.decode(Frame(number, 1, 0, body))
    agree(number, body)


@pytest.mark.parametrize("number", messages.ANSWERS)
@settings(max_examples=100)
@given(body=st.binary(max_size=200))
def test_random_bodies_are_answers_or_a_remote_protocol_error(number: EngineType, body: bytes) -> None:
    try:
        messages.decode(Frame(number, 1, 0, body))
    except RemoteProtocolError:
        pass


@pytest.mark.parametrize("number", [*REQUESTS, *NATIVE, 0, 1, 63, 96, 255])
def test_what_no_agent_says_is_a_remote_protocol_error(number: int) -> None:
    with pytest.raises(RemoteProtocolError, match="unknown message type"):
        messages.decode(Frame(number, 1, 0, b"\x90"))
