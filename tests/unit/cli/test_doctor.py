"""``p2pkv doctor``: each check on a host that is well and on one that is not, and the report."""

from __future__ import annotations

import io
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from p2pkv.cli import doctor, main
from p2pkv.cli.checks import Check, Group, Status, host, memory, network, run_checks, transport
from p2pkv.cli.checks.base import size
from p2pkv.config import Config, Store, Transport
from p2pkv.errors import ConfigError
from p2pkv.store.memory import HUGETLB_POOL, THP, AvailableMemory

GIB = 1 << 30
Fake = Callable[[dict[str, str]], Path]


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """Another host's ``/proc`` or ``/sys``: makes the named files and returns their root."""

    def make(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


class TestMemory:
    @pytest.mark.parametrize(
        ("capacity", "status"), [("25%", Status.OK), ("8GiB", Status.FAIL), ("1%", Status.WARN), ("64MiB", Status.WARN)]
    )
    def test_the_arena_is_held_against_available_memory(self, capacity: str, status: Status) -> None:
        check = memory.check_arena(Store(capacity=capacity), AvailableMemory(4 * GIB, "MemAvailable"))
        assert check.status is status
        assert bool(check.hint) == (status is not Status.OK)

    def test_a_small_lock_limit_warns_and_fails_only_where_locking_is_asked_for(self, fake: Fake) -> None:
        root = fake({"proc/self/status": "CapEff:\t0000000000000000\n"})
        assert memory.check_memory_lock(Store(), GIB, root, 8 << 20).status is Status.WARN
        assert memory.check_memory_lock(Store(lock_memory=True), GIB, root, 8 << 20).status is Status.FAIL
        assert memory.check_memory_lock(Store(lock_memory=True), GIB, root, 2 * GIB).status is Status.OK
        assert memory.check_memory_lock(Store(lock_memory=True), GIB, root, -1).status is Status.OK

    def test_the_capability_lifts_the_lock_limit(self, fake: Fake) -> None:
        root = fake({"proc/self/status": f"CapEff:\t{1 << memory.CAP_IPC_LOCK:016x}\n"})
        assert memory.check_memory_lock(Store(lock_memory=True), GIB, root, 8 << 20).status is Status.OK

    @pytest.mark.parametrize(
        ("reserved", "shmem", "mode", "status"),
        [
            (512, "never", "auto", Status.OK),
            (512, "never", "huge", Status.OK),
            (511, "never", "huge", Status.FAIL),
            (0, "never", "auto", Status.WARN),
            (512, "never", "thp", Status.WARN),
            (0, "advise", "auto", Status.OK),
            (0, "never", "none", Status.OK),
        ],
    )
    def test_huge_pages(
        self, fake: Fake, reserved: int, shmem: str, mode: Literal["auto", "huge", "thp", "none"], status: Status
    ) -> None:
        root = fake({f"{HUGETLB_POOL}/free_hugepages": str(reserved), f"{THP}/shmem_enabled": f"always [{shmem}]"})
        check = memory.check_huge_pages(Store(huge_pages=mode), GIB, root, lambda: False)
        assert check.status is status
        if status is not Status.OK:
            assert "vm.nr_hugepages=512" in check.hint

    def test_a_kernel_that_collapses_shared_memory_needs_no_setting_for_huge_pages(self, fake: Fake) -> None:
        root = fake({f"{THP}/shmem_enabled": "always [never]"})
        check = memory.check_huge_pages(Store(huge_pages="auto"), GIB, root, lambda: True)
        assert check.status is Status.OK and "MADV_COLLAPSE" in check.value

    def test_memfd_and_shared_memory_are_looked_at_for_real(self, tmp_path: Path) -> None:
        assert memory.check_memfd().status is Status.OK
        assert "free" in memory.check_dev_shm(tmp_path).value
        assert memory.check_dev_shm(tmp_path / "gone").status is Status.WARN


class TestHost:
    def test_the_extensions_of_this_checkout_are_built(self) -> None:
        assert host.check_extensions().status is Status.OK

    def test_a_missing_extension_fails_with_what_to_run(self) -> None:
        check = host.check_extensions(("p2pkv._nothing",))
        assert check.status is Status.FAIL
        assert "make setup" in check.hint

    @pytest.mark.parametrize(
        ("machine", "cpuinfo", "status"),
        [
            ("x86_64", "flags\t\t: sse2 avx2 avx512f\n", Status.OK),
            ("x86_64", "flags\t\t: sse2\n", Status.WARN),
            ("aarch64", "Features\t: fp asimd sve\n", Status.OK),
            ("riscv64", "isa : rv64\n", Status.WARN),
        ],
    )
    def test_cpu(self, fake: Fake, machine: str, cpuinfo: str, status: Status) -> None:
        assert host.check_cpu(fake({"cpuinfo": cpuinfo}), machine).status is status

    @pytest.mark.parametrize(("source", "status"), [("tsc", Status.OK), ("hpet", Status.WARN), (None, Status.WARN)])
    def test_clock(self, fake: Fake, source: str | None, status: Status) -> None:
        name = "devices/system/clocksource/clocksource0/current_clocksource"
        assert host.check_clock(fake({name: source} if source else {})).status is status

    @pytest.mark.parametrize(
        ("limits", "status"),
        [((512, 4_096), Status.FAIL), ((1_024, 1 << 20), Status.WARN), ((65_536, 65_536), Status.OK)],
    )
    def test_open_files(self, limits: tuple[int, int], status: Status) -> None:
        assert host.check_descriptors(Config(), limits).status is status

    def test_small_socket_buffers_name_the_setting_to_change(self, fake: Fake) -> None:
        proc = fake(
            {
                "sys/net/core/rmem_max": "212992",
                "sys/net/core/somaxconn": "4096",
                "sys/net/ipv4/tcp_rmem": "4096 131072 6291456",
            }
        )
        check = host.check_kernel(proc)
        assert check.status is Status.WARN
        assert "net.core.rmem_max=" in check.hint
        assert "somaxconn" not in check.hint
        assert "tcp_rmem" not in check.hint

    def test_a_namespace_that_shows_no_limits_is_no_reason_to_worry(self, fake: Fake) -> None:
        assert host.check_kernel(fake({})).status is Status.OK


class TestNetwork:
    def test_a_port_in_use_fails_unless_an_agent_runs_here(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            assert network.check_port("peer port", "127.0.0.1", port, "peer.port").status is Status.FAIL
            assert network.check_port("peer port", "127.0.0.1", port, "peer.port", running=True).status is Status.OK
        assert network.check_port("peer port", "127.0.0.1", 0, "peer.port").status is Status.OK

    def test_an_address_of_another_host_names_the_setting(self) -> None:
        check = network.check_port("http port", "192.0.2.1", 65_000, "http.port")  # TEST-NET-1, nobody's
        assert check.status is Status.FAIL
        assert "http.host" in check.hint

    def test_the_socket_may_lie_in_a_directory_that_is_still_to_be_made(self, tmp_path: Path) -> None:
        check = network.check_socket_path(str(tmp_path / "a" / "b" / "agent.sock"))
        assert check.status is Status.OK

    def test_a_path_too_long_for_the_kernel_fails(self) -> None:
        assert network.check_socket_path("/" + "x" * 200).status is Status.FAIL

    def test_a_file_that_is_no_socket_fails(self, tmp_path: Path) -> None:
        path = tmp_path / "agent.sock"
        path.write_text("")
        assert network.check_socket_path(str(path)).status is Status.FAIL

    def test_a_directory_that_anybody_may_change_warns(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o777)
        assert network.check_socket_path(str(tmp_path / "agent.sock")).status is Status.WARN

    def test_a_listening_agent_is_noticed_and_a_stale_socket_is_not_one(self, tmp_path: Path) -> None:
        path = str(tmp_path / "agent.sock")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
            assert not network.agent_answers(path)
            server.listen()
            assert network.agent_answers(path)
        assert not network.agent_answers(path)
        assert "stale" in network.check_socket_path(path).value


class TestTransport:
    @pytest.mark.parametrize(
        ("answer", "auto", "wanted"),
        [
            ({"wheel": "nixl-cu12 1.5.1", "error": ""}, Status.OK, Status.OK),
            ({"wheel": "nixl-cu12 1.5.1", "error": "nixlBackendError: no"}, Status.WARN, Status.FAIL),
            ({"wheel": "", "error": ""}, Status.WARN, Status.FAIL),
            (None, Status.WARN, Status.FAIL),
        ],
    )
    def test_nixl_fails_only_where_it_is_asked_for(
        self, answer: dict[str, str] | None, auto: Status, wanted: Status
    ) -> None:
        assert transport.check_nixl(Transport(), answer).status is auto
        assert transport.check_nixl(Transport(kind="nixl"), answer).status is wanted

    def test_the_probe_answers_whether_nixl_is_there_or_not(self) -> None:
        answer = transport.probe_nixl()
        assert answer is not None
        assert set(answer) == {"wheel", "error"}

    def test_a_probe_that_says_nothing_is_no_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(transport, "NIXL_PROBE", "import os; os.kill(os.getpid(), 9)")
        assert transport.probe_nixl() is None
        monkeypatch.setattr(transport, "NIXL_PROBE", "print(1)")
        assert transport.probe_nixl() is None

    def test_rdma_ports_are_read_from_sysfs(self, fake: Fake, tmp_path: Path) -> None:
        assert "no device" in transport.check_rdma(tmp_path).value
        port = "class/infiniband/mlx5_0/ports/1"
        files = {
            f"{port}/state": "4: ACTIVE\n",
            f"{port}/rate": "400 Gb/sec (4X NDR)\n",
            f"{port}/link_layer": "InfiniBand",
        }
        check = transport.check_rdma(fake(files))
        assert check.status is Status.OK
        assert "mlx5_0:1 InfiniBand ACTIVE 400 Gb/sec (4X NDR)" in check.value
        assert transport.check_rdma(fake({f"{port}/state": "1: DOWN\n"})).status is Status.WARN

    def test_reading_a_siblings_memory_is_tried_for_real(self) -> None:
        assert transport.check_process_memory().status in (Status.OK, Status.WARN)

    def test_a_refusal_is_a_warning_with_its_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(transport, "CMA_READER", "print('Operation not permitted')")
        check = transport.check_process_memory()
        assert (check.status, check.value) == (Status.WARN, "Operation not permitted")


class TestReport:
    CHECKS = (
        Check("arena", Status.OK, "1.0 GiB", group=Group.MEMORY),
        Check("nixl", Status.WARN, "not installed", "Install it. " * 20, group=Group.TRANSPORT),
        Check("peer port", Status.FAIL, "in use", "Stop what listens there.", group=Group.NETWORK),
    )

    def test_the_table_has_every_finding_and_every_hint_within_the_width(self) -> None:
        out = io.StringIO()
        doctor.write_table(self.CHECKS, out, colour=False, width=80)
        text = out.getvalue()
        assert max(map(len, text.splitlines())) <= 80
        for word in ("arena", "not installed", "-> Install it.", "FAIL peer port", "1 ok, 1 warnings, 1 failures"):
            assert word in text
        assert "\033" not in text

    def test_colour_is_for_terminals_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert not doctor.wants_colour(io.StringIO())
        leader, follower = os.openpty()
        os.close(leader)
        with os.fdopen(follower, "w") as terminal:
            monkeypatch.delenv("NO_COLOR", raising=False)
            monkeypatch.setenv("TERM", "xterm")
            assert doctor.wants_colour(terminal) == terminal.isatty()
            monkeypatch.setenv("NO_COLOR", "1")
            assert not doctor.wants_colour(terminal)
        out = io.StringIO()
        doctor.write_table(self.CHECKS, out, colour=True, width=80)
        assert "\033[31m" in out.getvalue()

    def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(self) -> None:
        def broken() -> Check:
            raise ZeroDivisionError("oh")

        def wrong() -> Check:
            raise ConfigError("bad size", hint="Write 1GiB.")

        found = run_checks(
            [
                (Group.HOST, "broken", broken),
                (Group.HOST, "wrong", wrong),
                (Group.MEMORY, "fine", lambda: Check("fine", Status.OK, "yes")),
            ]
        )
        assert [(c.name, c.status) for c in found] == [
            ("broken", Status.FAIL),
            ("wrong", Status.FAIL),
            ("fine", Status.OK),
        ]
        assert "ZeroDivisionError" in found[0].value
        assert found[1].hint == "Write 1GiB."
        assert found[2].group is Group.MEMORY

    def test_json_has_every_check_and_the_exit_code_agrees(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        monkeypatch.setattr(transport, "NIXL_PROBE", 'print(\'{"wheel": "", "error": ""}\')')
        settings = tmp_path / "p2pkv.yaml"
        settings.write_text(f"engine: {{socket: {tmp_path}/agent.sock}}\npeer: {{port: 0}}\nhttp: {{port: 0}}\n")
        with pytest.raises(SystemExit) as end:
            main(["doctor", "--json", "--config", str(settings)])
        report = json.loads(capsys.readouterr().out)
        failed = [check["name"] for check in report["checks"] if check["status"] == "fail"]
        assert report["ok"] == (not failed)
        assert bool(end.value.code) == bool(failed)
        assert {"arena", "memfd", "nixl", "extensions", "peer port"} <= {check["name"] for check in report["checks"]}

    def test_an_unusable_arena_makes_it_exit_1(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(transport, "NIXL_PROBE", 'print(\'{"wheel": "", "error": ""}\')')
        monkeypatch.setenv("P2PKV_STORE_CAPACITY", "900TiB")
        with pytest.raises(SystemExit) as end:
            main(["doctor"])
        assert end.value.code == 1
        assert "An agent would not start." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1_536, "1.5 KiB"), (8 << 20, "8.0 MiB"), (24 << 30, "24 GiB"), (3 << 40, "3.0 TiB")],
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert size(count) == text


def test_python_is_named() -> None:
    assert sys.implementation.name in host.check_python().value.lower()
