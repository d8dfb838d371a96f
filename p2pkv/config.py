"""Every setting of an agent: default, unit, trade-off. Frozen once read.

Sources, later ones win: defaults, a YAML file, ``P2PKV_<SECTION>_<FIELD>`` environment variables, command-line flags
(``--set section.field=value``). Unknown keys are errors that name the nearest known key; every error names the key and
where its value came from. Sizes take ``KiB``/``MiB``/``GiB`` (powers of two) or ``KB``/``MB``/``GB``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import msgspec

from p2pkv.errors import ConfigError
from p2pkv.paths import default_socket_path

ENV_PREFIX: Final = "P2PKV_"
ENV_RESERVED: Final = frozenset(
    {"P2PKV_SOCKET", "P2PKV_CONFIG", "P2PKV_VLLM_PYTHON", "P2PKV_TEST_SEED", "P2PKV_TEST_READS"}
)
"""Variables that are not settings of the agent: the client's, the demo's, the tests'."""
NEIGHBOUR_BYTES_MAX: Final = 64 << 20
"""Of ``transport.neighbour_max``: the thread that copies so much serves nobody else meanwhile, some 10 ms."""
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B?|B)?\s*$", re.IGNORECASE)
_UNITS: Final = {"": 1, "b": 1} | {
    unit + suffix: base**power
    for power, unit in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("ib", 1024), ("i", 1024), ("b", 1000))
}


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the sections: keyword-only, frozen, closed."""


class Engine(Section, frozen=True):
    """The Unix socket that engines on this host connect to."""

    socket: str = ""  # path; empty = default_socket_path(). Mode 0600: the agent's user and root only
    short_way: bool = True  # gets have a socket of their own, answered without the event loop where that is possible
    directory: bool = True  # engines find what is in the arena by themselves, in shared memory, and copy it out unasked
    connections_max: int = 256  # engines (and their helpers) at once; more are refused
    in_flight_max: int = 256  # unanswered requests per connection; more are answered "busy"
    regions_max: int = 64  # mapped regions per connection


class Store(Section, frozen=True):
    """The host-memory tier."""

    capacity: str = "25%"  # of memory available at start, or a size. The arena is this one memfd
    extent: str = "auto"  # unit in which memory moves between layouts; auto: for the capacity, 2 MiB to 64 MiB
    huge_pages: Literal["auto", "huge", "thp", "none"] = (
        "auto"  # fewer TLB misses and page faults; "huge" needs reserved pages
    )
    lock_memory: bool = False  # mlock the arena: RDMA pins it anyway; needs RLIMIT_MEMLOCK
    eviction: Literal["lru", "none"] = "lru"
    lease_ttl_ms: int = (
        10_000  # longest hold a peer or engine gets; longer survives slower readers, shorter frees memory sooner
    )
    leases_max: int = 65_536
    copy_threads: int = 2  # threads that move bytes between engines and the arena


class Peer(Section, frozen=True):
    """The port for other agents (TCP and UDP), and how they are found."""

    host: str = "127.0.0.1"  # bind address. Anything but loopback needs keys, or insecure
    port: int = 7841  # 0 = any free port
    advertise: str = ""  # host[:port] that peers should dial; empty = host:port as bound
    cell: str = "default"  # only agents of one cell talk to each other
    seeds: tuple[str, ...] = ()  # host:port of some members; any one alive is enough
    dns: str = ""  # host:port of a headless service, or _service._proto.name of SRV records: every address behind it
    # is a seed, looked up again every 10 s
    zeroconf: bool = False  # find seeds on the LAN by multicast DNS
    keys: str = ""  # path of the cell's key file (`p2pkv keys generate`), read again when it changes; empty = no key
    tls_certificate: str = ""  # PEM; with key and authority: mutual TLS between agents (slower; read when they change)
    tls_key: str = ""
    tls_authority: str = ""  # whose certificates are good
    rack: str = ""  # label: peers of the same rack are expected to be near, those of another one behind its uplink
    insecure: bool = False  # allow a non-loopback bind without a key: whoever reaches the port can join
    heartbeat_ms: int = 200  # of an idle ownership stream
    flush_ms: int = 100  # ownership changes are batched this long
    frames_per_s: int = 5_000  # a node sends about so many at most: heartbeat and flush stretch with the cell (200 ms
    # at 1,000 nodes), and silence with the heartbeat
    hold_ms: int = 200  # changes of one block within this time are sent as one
    silence_ms: int = 3_000  # nothing heard for this long, and for 15 heartbeats: the peer's entries are hidden
    purge_s: float = 60.0  # hidden for this long: its entries are dropped
    remember_s: float = 300.0  # what is known of peers is written to state_dir this often, and answers HTTP questions
    # after a restart until they are back; 0 = never
    members_max: int = 1_024
    protocol_max: int = 4  # speak no later protocol; less while a cell is rolled back to the version before
    handshake_ms: int = 2_000  # a connection that has not introduced itself by then is closed
    connections_max: int = 8_192  # accepted connections, control and data
    send_queue: str = "64MiB"  # a peer that reads slower than this much behind is disconnected


class Transport(Section, frozen=True):
    """How block bytes travel between nodes."""

    kind: Literal["auto", "tcp", "nixl"] = (
        "auto"  # auto: nixl where there is RDMA; on one host the faster as measured; else tcp
    )
    deadline_ms: int = 2_000  # of a whole pull when the caller names none
    in_flight: str = "50%"  # of the arena, or a size: what pulls may have on their way at once; more wait their turn
    serve_max: str = ""  # bytes a second that peers may read from here, or a share of the link ("50%"); more: "busy"
    stall_ms: int = 500  # a pull that makes no progress for this long is given up, whatever its deadline
    streams: int = 4  # TCP connections used for one large pull; more fill fat links, fewer spare sockets
    one_sided_min: str = "512KiB"  # gets of less than this from an owner on this host come over tcp, where nixl is used
    neighbour_max: str = "4MiB"  # where nixl is used: gets of up to this from an owner on this host, of the same user,
    # are read out of its memory by this process; 0 = never
    stream_bytes: str = "8MiB"  # a pull uses one more stream for each so many bytes
    idle_connections: int = 8  # kept open per peer
    nixl_devices: str = ""  # UCX_NET_DEVICES for the NIXL process, e.g. "mlx5_0:1"; empty = all (lo on loopback)
    nixl_tls: str = ""  # UCX_TLS for the NIXL process; empty = UCX chooses
    quarantine: str = "25%"  # of the arena that given-up NIXL reads may hold; beyond it the NIXL process is replaced
    quarantine_s: float = 30.0  # a given-up read older than this: likewise


class Http(Section, frozen=True):
    """The HTTP endpoint: health, metrics, lookups."""

    enabled: bool = True
    host: str = "127.0.0.1"  # 0.0.0.0 only if asked for: answers name nodes and blocks
    port: int = 7840  # 0 = any free port
    tokenizers: tuple[str, ...] = ()  # model=path of its tokenizer.json, for questions about text; needs the extra


class Log(Section, frozen=True):
    """What the agent writes to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class Config(Section, frozen=True):
    """All sections."""

    state_dir: str = (
        ""  # node id and epoch live here; empty = default_state_dir(); ":memory:" = a new identity each start
    )
    engine: Engine = Engine()
    store: Store = Store()
    peer: Peer = Peer()
    transport: Transport = Transport()
    http: Http = Http()
    log: Log = Log()

    @property
    def socket_path(self) -> str:
        """The Unix socket's path, with the default filled in."""
        return self.engine.socket or default_socket_path()


def parse_size(text: str | int, *, key: str = "size", percent_of: int | None = None) -> int:
    """Bytes from ``1048576``, ``"64MiB"``, ``"1.5 GB"`` or, where ``percent_of`` is given, ``"25%"`` of it.

    Raises:
        ConfigError: not a size, or a percentage where none makes sense.
    """
    raw = str(text).strip()
    if raw.endswith("%"):
        if percent_of is None:
            raise ConfigError(f"{key} cannot be a percentage", value=raw, hint="Give a size such as 64MiB.")
        try:
            share = float(raw[:-1])
        except ValueError:
            share = -1.0
        if not 0 < share <= 100:
            raise ConfigError(f"{key} is not a percentage within 0..100", value=raw)
        return int(percent_of * share / 100)
    match = _SIZE.match(raw)
    if not match:
        raise ConfigError(f"{key} is not a size", value=raw, hint='Examples: 1048576, "64MiB", "2GiB".')
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def parse_address(text: str, *, key: str = "address") -> tuple[str, int]:
    """``host:port`` or ``[v6]:port`` as a pair.

    Raises:
        ConfigError: not an address.
    """
    host, separator, port = text.strip().rpartition(":")
    if not separator or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
        raise ConfigError(f"{key} is not host:port", value=text, hint='Examples: "10.0.0.5:7841", "[::1]:7841".')
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether binding to this host keeps the port on this machine."""
    import ipaddress

    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    overrides: Iterable[tuple[str, Any]] = (),
) -> Config:
    """Read a configuration.

    Args:
        path: YAML file; ``None`` = ``$P2PKV_CONFIG``, else none.
        environ: environment to read ``P2PKV_*`` from; ``None`` = the process's.
        overrides: ``("section.field", value)`` pairs from flags; values may be strings.

    Raises:
        ConfigError: naming the key, its source, and what would be right.
    """
    env = os.environ if environ is None else environ
    tree: dict[str, Any] = {}
    source = path or env.get("P2PKV_CONFIG")
    if source:
        tree = _read_yaml(source)
        _check_keys(tree, str(source))
    for name in sorted(env):
        if name.startswith(ENV_PREFIX) and name not in ENV_RESERVED:
            _put(tree, _key_of_variable(name), env[name], f"environment variable {name}")
    for key, value in overrides:
        _put(tree, key.split("."), value, f"flag {key}")
    try:
        config = msgspec.convert(tree, Config, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"configuration is wrong: {error}", hint="`p2pkv agent --show-config` prints every key."
        ) from error
    _check_values(config)
    return config


def _read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            loaded = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError("cannot read the configuration file", path=path, reason=error.strerror) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("configuration file is not YAML", path=path, reason=str(error).replace("\n", " ")) from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError("configuration file is not a mapping", path=path)
    return loaded


def _fields(section: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(section)}


def _is_section(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _known_keys() -> list[str]:
    keys = []
    for name, kind in _fields(Config).items():
        keys += [f"{name}.{inner}" for inner in _fields(kind)] if _is_section(kind) else [name]
    return keys


def _unknown(key: str, source: str) -> ConfigError:
    import difflib

    near = difflib.get_close_matches(key, _known_keys(), n=1, cutoff=0.5)
    if not near:
        tail = key.rpartition(".")[2]
        near = [k for k in _known_keys() if k.rpartition(".")[2] == tail][:1]
    hint = f"Did you mean {near[0]!r}?" if near else "`p2pkv agent --show-config` prints every key."
    return ConfigError(f"unknown key {key!r} from {source}", hint=hint)


def _check_keys(tree: dict[str, Any], source: str) -> None:
    known = _fields(Config)
    for name, value in tree.items():
        if name not in known:
            raise _unknown(str(name), source)
        if _is_section(known[name]):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{name!r} from {source} is a section, not a value", hint=f"Write {name}: {{key: value}}."
                )
            for inner in value:
                if inner not in _fields(known[name]):
                    raise _unknown(f"{name}.{inner}", source)


def _key_of_variable(name: str) -> list[str]:
    words = name.removeprefix(ENV_PREFIX).lower()
    known = _fields(Config)
    section, _, rest = words.partition("_")
    if section in known and _is_section(known[section]):
        if rest not in _fields(known[section]):
            raise _unknown(f"{section}.{rest}", f"environment variable {name}")
        return [section, rest]
    if words not in known:
        raise _unknown(words, f"environment variable {name}")
    return [words]


def _put(tree: dict[str, Any], key: list[str], value: object, source: str) -> None:
    dotted = ".".join(key)
    if dotted not in _known_keys():
        raise _unknown(dotted, source)
    if dotted in ("peer.seeds", "http.tokenizers") and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    node = tree
    for part in key[:-1]:
        node = node.setdefault(part, {})
    node[key[-1]] = value


def _check_values(config: Config) -> None:
    def within(key: str, value: float, low: float, high: float) -> None:
        if not low <= value <= high:
            raise ConfigError(f"{key} is out of range", value=value, range=f"{low:g}..{high:g}")

    for key, port in (("peer.port", config.peer.port), ("http.port", config.http.port)):
        within(key, port, 0, 65_535)
    if config.peer.port and config.peer.port == config.http.port and config.http.enabled:
        raise ConfigError("peer.port and http.port are the same", port=config.peer.port)
    within("peer.heartbeat_ms", config.peer.heartbeat_ms, 10, 60_000)
    within("peer.flush_ms", config.peer.flush_ms, 1, 10_000)
    within("peer.hold_ms", config.peer.hold_ms, 0, 10_000)
    within("peer.silence_ms", config.peer.silence_ms, 3 * config.peer.heartbeat_ms, 600_000)
    within("peer.frames_per_s", config.peer.frames_per_s, 10, 1_000_000)
    within("peer.protocol_max", config.peer.protocol_max, 2, 4)
    within("peer.purge_s", config.peer.purge_s, 1, 86_400)
    if config.peer.remember_s:
        within("peer.remember_s", config.peer.remember_s, 0.1, 3_600)
    within("peer.members_max", config.peer.members_max, 1, 4_096)
    within("peer.connections_max", config.peer.connections_max, 8, 1_000_000)
    within("peer.handshake_ms", config.peer.handshake_ms, 10, 60_000)
    within("store.lease_ttl_ms", config.store.lease_ttl_ms, 100, 600_000)
    within("store.leases_max", config.store.leases_max, 16, 10_000_000)
    within("store.copy_threads", config.store.copy_threads, 1, 64)
    within("transport.deadline_ms", config.transport.deadline_ms, 1, 600_000)
    within("transport.stall_ms", config.transport.stall_ms, 1, 600_000)
    within("transport.streams", config.transport.streams, 1, 64)
    within("transport.idle_connections", config.transport.idle_connections, 1, 1_024)
    within("transport.quarantine_s", config.transport.quarantine_s, 0.1, 86_400)
    within("engine.connections_max", config.engine.connections_max, 1, 65_536)
    within("engine.in_flight_max", config.engine.in_flight_max, 1, 65_536)
    within("engine.regions_max", config.engine.regions_max, 1, 1_024)
    for key, text in (
        *([] if config.store.extent == "auto" else [("store.extent", config.store.extent)]),
        ("transport.stream_bytes", config.transport.stream_bytes),
        ("peer.send_queue", config.peer.send_queue),
    ):
        within(key, parse_size(text, key=key), 4_096, 1 << 40)
    parse_size(config.store.capacity, key="store.capacity", percent_of=1 << 30)
    parse_size(config.transport.quarantine, key="transport.quarantine", percent_of=1 << 30)
    parse_size(config.transport.in_flight, key="transport.in_flight", percent_of=1 << 30)
    parse_size(config.transport.one_sided_min, key="transport.one_sided_min")
    size = parse_size(config.transport.neighbour_max, key="transport.neighbour_max")
    within("transport.neighbour_max", size, 0, NEIGHBOUR_BYTES_MAX)
    if serve_max := config.transport.serve_max:
        size = parse_size(serve_max, key="transport.serve_max", percent_of=1 << 30)
        within("transport.serve_max", size, 1, 1 << 50)
    for seed in config.peer.seeds:
        parse_address(seed, key="peer.seeds")
    if config.peer.dns and not config.peer.dns.startswith("_"):
        parse_address(config.peer.dns, key="peer.dns")
    tls = (config.peer.tls_certificate, config.peer.tls_key, config.peer.tls_authority)
    if any(tls) and not all(tls):
        raise ConfigError("peer.tls_certificate, peer.tls_key and peer.tls_authority go together", given=tls)
    if not is_loopback(config.peer.host) and not config.peer.keys and not config.peer.insecure:
        raise ConfigError(
            "peer.host is not loopback, and the cell has no key",
            host=config.peer.host,
            hint="Set peer.keys (`p2pkv keys generate --file PATH`); on a network you trust, peer.insecure: true.",
        )
