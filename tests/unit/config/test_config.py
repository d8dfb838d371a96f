"""Configuration: YAML, then environment, then flags; what is wrong is named, with its source and what would be
right.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.config import Config, Section, is_loopback, load, parse_address, parse_size
from p2pkv.errors import ConfigError
from p2pkv.paths import default_socket_path

NOTHING: dict[str, str] = {}


def test_without_anything_the_defaults_hold() -> None:
    assert load(environ=NOTHING) == Config()


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("store: {capacity: 1GiB, leases_max: 100}\ntransport: {kind: nixl}\n")
    environ = {"P2PKV_STORE_CAPACITY": "2GiB", "P2PKV_PEER_PORT": "5000", "P2PKV_CONFIG": str(file), "HOME": "/"}
    config = load(environ=environ, overrides=[("store.capacity", "3GiB")])
    assert (config.store.capacity, config.store.leases_max) == ("3GiB", 100)
    assert (config.peer.port, config.transport.kind) == (5000, "nixl")


def test_a_file_named_by_flag_replaces_the_one_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("state_dir: a\n")
    (tmp_path / "b").write_text("state_dir: b\n")
    assert load(tmp_path / "b", environ={"P2PKV_CONFIG": str(tmp_path / "a")}).state_dir == "b"


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("store: {capcity: 1}", ["store.capcity", "store.capacity", "c.yaml"]),
        ("stoer: {}", ["stoer"]),
        ("stall_ms: 5", ["stall_ms", "transport.stall_ms"]),
        ("store: 5", ["store", "section"]),
        ("- 1\n- 2", ["mapping"]),
        ("a: [", ["YAML"]),
        ("\x00", ["YAML"]),
        ("transport: {kind: rdma}", ["transport.kind"]),
        ("transport: {streams: lots}", ["transport.streams"]),
        ("transport: {streams: 0}", ["transport.streams"]),
        ("transport: {streams: null}", ["transport.streams"]),
        ("peer: {port: 65536}", ["peer.port"]),
        ("peer: {port: 7840}", ["peer.port", "http.port"]),
        ("peer: {seeds: ['nohost']}", ["peer.seeds"]),
        ("peer: {silence_ms: 500}", ["peer.silence_ms"]),
        ("peer: {host: 0.0.0.0}", ["peer.host", "peer.keys", "insecure"]),
        ("store: {capacity: 10 apples}", ["store.capacity"]),
        ("store: {capacity: 0%}", ["store.capacity"]),
        ("store: {lease_ttl_ms: 1}", ["store.lease_ttl_ms"]),
        ("transport: {stream_bytes: 1KiB}", ["transport.stream_bytes"]),
        ("transport: {quarantine_s: .nan}", ["transport.quarantine_s"]),
        ("transport: {quarantine_s: .inf}", ["transport.quarantine_s"]),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, yaml: str, words: list[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml)
    with pytest.raises(ConfigError) as caught:
        load(file, environ=NOTHING)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "no.yaml"))):
        load(tmp_path / "no.yaml", environ=NOTHING)


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("state_dir: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError):
        load(file, environ=NOTHING)


@pytest.mark.parametrize("name", ["P2PKV_STORE_CAPCITY", "P2PKV_STORE", "P2PKV_NONSENSE", "P2PKV_", "P2PKV_PEER_"])
def test_a_variable_that_is_no_setting_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        load(environ={name: "1"})


def test_other_programs_variables_are_not_looked_at() -> None:
    assert load(environ={"P2PKVX": "1", "PATH": "/bin", "p2pkv_store_capacity": "1GiB"}) == Config()


@pytest.mark.parametrize("key", ["store.capcity", "store", "a.b.c", "", "."])
def test_a_flag_that_is_no_setting_is_refused(key: str) -> None:
    with pytest.raises(ConfigError):
        load(environ=NOTHING, overrides=[(key, "1")])


def test_seeds_of_one_variable_are_separated_by_commas() -> None:
    config = load(environ={"P2PKV_PEER_SEEDS": "a:1, [::1]:2,,"})
    assert config.peer.seeds == ("a:1", "[::1]:2")


def as_text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_every_setting_can_be_given_as_variable_and_as_flag() -> None:
    for section in msgspec.structs.fields(Config):
        if isinstance(section.type, type) and issubclass(section.type, Section):
            for field in msgspec.structs.fields(section.type):
                text = as_text(field.default)
                key = f"{section.name}.{field.name}"
                assert load(environ={"P2PKV_" + key.replace(".", "_").upper(): text}) == Config(), key
                assert load(environ=NOTHING, overrides=[(key, text)]) == Config(), key


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1048576", 1 << 20), (4096, 4096), ("64MiB", 64 << 20), ("64M", 64 << 20), ("64 Mi", 64 << 20),
     ("64MB", 64_000_000), ("1.5 GB", 1_500_000_000), ("0.5k", 512), ("2tib", 2 << 40), (" 7 b ", 7)],
)  # fmt: skip
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "1e3", "1,5GiB", "1 GiB extra", "0x10", "ten", "1..5M", "25%", "NaN"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_size(text)


@pytest.mark.parametrize(("text", "size"), [("25%", 250), ("100%", 1000), ("0.1%", 1), ("12.5 %", 125)])
def test_percentages(text: str, size: int) -> None:
    assert parse_size(text, percent_of=1000) == size


@pytest.mark.parametrize("text", ["0%", "-1%", "101%", "x%", "%", "nan%", "inf%"])
def test_what_is_no_percentage(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_size(text, percent_of=1000)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_config_error(text: str) -> None:
    try:
        assert parse_size(text, percent_of=1 << 40) >= 0
    except ConfigError:
        pass


@pytest.mark.parametrize(
    ("text", "pair"), [("h:1", ("h", 1)), ("10.0.0.1:65535", ("10.0.0.1", 65_535)), ("[::1]:80", ("::1", 80))]
)
def test_addresses(text: str, pair: tuple[str, int]) -> None:
    assert parse_address(text) == pair


@pytest.mark.parametrize("text", ["", "host", ":1", "h:", "h:0", "h:65536", "h:-1", "h:a", "h:1 2", "h:²"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_address(text)


@given(st.text(max_size=12))
def test_any_text_is_an_address_or_a_config_error(text: str) -> None:
    try:
        host, port = parse_address(text)
    except ConfigError:
        return
    assert host and 0 < port < 65_536


def test_loopback() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.8.9.1", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "example.org", ""]))


def test_the_socket_has_a_place_for_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("P2PKV_SOCKET", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert default_socket_path().endswith("agent.sock")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    assert default_socket_path() == "/run/user/1/p2pkv/agent.sock"
    monkeypatch.setenv("P2PKV_SOCKET", "/x")
    assert default_socket_path() == "/x"
    assert Config().socket_path == "/x"
