"""A layout in a message: the bytes that msgspec would make of a Struct of its fields, and refused when that would."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.errors import RemoteProtocolError
from p2pkv.types import Layout
from p2pkv.wire import codec, engine, peer
from p2pkv.wire.engine_types import EngineType
from p2pkv.wire.frame import Frame, FrameDecoder

pack = msgspec.msgpack.encode


class LayoutStruct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a layout was until engines could not afford msgspec, field by field."""

    model: str
    revision: str
    kv_dtype: str
    block_tokens: int
    block_bytes: int
    rank: int = 0
    world: int = 1
    order: str = ""
    hash_algo: str = ""
    hash_seed: str = ""
    hash_block_tokens: int = 0
    engine: str = ""
    engine_format: str = ""
    group: int = 0
    tenant: str = ""
    lora: str = ""
    cache_salt: str = ""


numbers = st.integers(-(1 << 63), (1 << 64) - 1)
words = st.text(max_size=40)
kinds = {field.name: words if field.type is str else numbers for field in msgspec.structs.fields(LayoutStruct)}
required = {field.name: kinds[field.name] for field in msgspec.structs.fields(LayoutStruct) if field.required}
lawful = st.fixed_dictionaries(required, optional={n: kind for n, kind in kinds.items() if n not in required})

anything = st.one_of(
    st.none(), st.booleans(), numbers, st.floats(allow_nan=False), words, st.binary(max_size=9),
    st.lists(numbers, max_size=2), st.dictionaries(words, numbers, max_size=2),
)  # fmt: skip
"""No field of a layout but by luck."""


def body_of(data: bytes) -> bytes:
    [frame] = FrameDecoder().feed(data)
    return frame.body


@given(lawful)
def test_its_bytes_are_those_of_a_struct_of_the_same_fields(fields: dict[str, object]) -> None:
    layout, struct = Layout(**fields), LayoutStruct(**fields)  # type: ignore[arg-type]
    assert body_of(engine.CODEC.encode(engine.Open(layout))) == pack([struct])
    card = peer.Card(1, 2, peer.Address("h", 3), "", "", [layout, layout], [])
    twin = [1, 2, ["h", 3], "", "", [struct, struct], [], 0, [], "", 0, ""]
    assert codec.pack(card) == pack(twin)
    assert peer.unpack_card(codec.pack(card)) == card


def test_its_bytes_never_change() -> None:
    layout = Layout(model="m", revision="r", kv_dtype="bf16", block_tokens=16, block_bytes=1 << 20, lora="ü", group=300)
    assert body_of(engine.CODEC.encode(engine.Open(layout))) == (
        b"\x91\xde\x00\x11\xa5model\xa1m\xa8revision\xa1r\xa8kv_dtype\xa4bf16\xacblock_tokens\x10"
        b"\xabblock_bytes\xce\x00\x10\x00\x00\xa4rank\x00\xa5world\x01\xa5order\xa0\xa9hash_algo\xa0\xa9hash_seed\xa0"
        b"\xb1hash_block_tokens\x00\xa6engine\xa0\xadengine_format\xa0\xa5group\xcd\x01,\xa6tenant\xa0"
        b"\xa4lora\xa2\xc3\xbc\xaacache_salt\xa0"
    )


@given(
    lawful,
    st.dictionaries(st.sampled_from([*kinds, "colour", ""]), anything, max_size=2),
    st.sets(st.sampled_from([*kinds]), max_size=1),
)
def test_it_is_refused_exactly_when_a_struct_would_be(
    fields: dict[str, object], changes: dict[str, object], dropped: set[str]
) -> None:
    """Unknown, missing, of another type, out of range."""
    fields = {name: value for name, value in (fields | changes).items() if name not in dropped}
    frame = Frame(EngineType.OPEN, 1, 0, pack([fields]))
    try:
        twin = msgspec.msgpack.decode(pack(fields), type=LayoutStruct)
    except msgspec.ValidationError:
        with pytest.raises(RemoteProtocolError, match="malformed"):
            engine.CODEC.decode(frame)
    else:
        assert engine.CODEC.decode(frame) == engine.Open(Layout(**msgspec.structs.asdict(twin)))


@pytest.mark.parametrize(
    "instead",
    [
        None, 1, "layout", b"", [], {}, {1: 2}, {b"model": "m"}, ["m", "r", "bf16", 16, 1 << 20],
        msgspec.msgpack.Ext(5, b"1"), {(1, 2): 3},
    ],
    ids=range(11),
)  # fmt: skip
def test_what_is_no_layout_at_all_is_refused(instead: object) -> None:
    with pytest.raises(RemoteProtocolError, match="malformed"):
        engine.CODEC.decode(Frame(EngineType.OPEN, 1, 0, pack([instead])))


GOOD = {"model": "m", "revision": "r", "kv_dtype": "bf16", "block_tokens": 16, "block_bytes": 1 << 20}


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_tokens": True}, {"block_tokens": 16.0}, {"block_tokens": "16"}, {"block_tokens": None}, {"model": b"m"},
        {"model": None}, {"rank": False}, {"lora": 0}, {"colour": "red"}, {"": ""},
    ],
    ids=repr,
)  # fmt: skip
def test_no_field_is_of_another_type_and_none_is_unknown(wrong: dict[str, object]) -> None:
    assert engine.CODEC.decode(Frame(EngineType.OPEN, 1, 0, pack([GOOD]))) == engine.Open(Layout(**GOOD))  # type: ignore[arg-type]
    with pytest.raises(RemoteProtocolError, match="malformed"):
        engine.CODEC.decode(Frame(EngineType.OPEN, 1, 0, pack([GOOD | wrong])))


@pytest.mark.parametrize("name", GOOD)
def test_no_required_field_may_be_missing(name: str) -> None:
    fields = {field: value for field, value in GOOD.items() if field != name}
    with pytest.raises(RemoteProtocolError, match="malformed"):
        engine.CODEC.decode(Frame(EngineType.OPEN, 1, 0, pack([fields])))
