"""The ways bytes can travel: NIXL in a process of its own, RDMA devices, memory of another process on this host."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from p2pkv.cli.checks.base import Check, Status, read_text
from p2pkv.config import Transport

SYS: Final = Path("/sys")
PROBE_TIMEOUT_S: Final = 20.0
"""Creating a UCX backend takes about a second; with many devices several."""

NIXL_PROBE: Final = """
import importlib, importlib.metadata, json, os, sys
answer = {"wheel": "", "error": ""}
for name in ("nixl_cu13", "nixl_cu12"):
    if importlib.util.find_spec(name) is None:
        continue
    wheel = name.replace("_", "-")
    try:
        answer["wheel"] = wheel + " " + importlib.metadata.version(wheel)
        api = importlib.import_module(name + "._api")
        agent = api.nixl_agent("doctor", api.nixl_agent_config(False, False, 0, backends=[]))
        agent.create_backend("UCX", {"ucx_error_handling_mode": "peer"})
    except Exception as error:
        answer["error"] = type(error).__name__ + ": " + str(error).splitlines()[0][:200]
    else:
        answer["error"] = ""
        break
sys.stdout.write("\\n" + json.dumps(answer) + "\\n")
sys.stdout.flush()
os._exit(0)  # tearing UCX down can hang, and nothing here needs it
"""

CMA_OWNER: Final = """
import ctypes, sys
held = ctypes.create_string_buffer(b"p2pkv")
print(ctypes.addressof(held), flush=True)
sys.stdin.read()
"""

CMA_READER: Final = """
import ctypes, os, sys
class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
libc = ctypes.CDLL(None, use_errno=True)
libc.process_vm_readv.restype = ctypes.c_ssize_t
into = ctypes.create_string_buffer(5)
here, there = Vector(ctypes.addressof(into), 5), Vector(int(sys.argv[2]), 5)
got = libc.process_vm_readv(int(sys.argv[1]), ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
print("ok" if got == 5 and into.raw == b"p2pkv" else os.strerror(ctypes.get_errno()))
"""


def probe_nixl() -> dict[str, Any] | None:
    """Load NIXL and create a UCX backend in a child process; ``None`` when the child died or did not answer in time."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", NIXL_PROBE],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    last = child.stdout.decode(errors="replace").rstrip().rpartition("\n")[2]
    try:
        answer = json.loads(last)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def check_nixl(transport: Transport, answer: dict[str, Any] | None) -> Check:
    """NIXL is there and can create a UCX backend. ``answer`` is :func:`probe_nixl`'s."""
    wanted = transport.kind == "nixl"
    bad = Status.FAIL if wanted else Status.WARN
    without = " Without it blocks travel over p2pkv's own TCP transport." if not wanted else ""
    if answer is None:
        return Check(
            "nixl", bad, "its process died or did not answer", "Run p2pkv doctor with UCX_LOG_LEVEL=info." + without
        )
    if not answer["wheel"]:
        return Check(
            "nixl", bad, "not installed", "pip install --no-deps nixl-cu12 numpy (`make nixl` in a checkout)." + without
        )
    if answer["error"]:
        return Check(
            "nixl",
            bad,
            f"{answer['wheel']}: {answer['error']}",
            "UCX_LOG_LEVEL=info tells more; UCX_TLS and UCX_NET_DEVICES choose." + without,
        )
    return Check("nixl", Status.OK, f"{answer['wheel']}, UCX backend works")


def check_rdma(sys_root: Path = SYS) -> Check:
    """RDMA devices and the state of their ports, as the kernel shows them; whether pyverbs can tell more."""
    verbs = "pyverbs there" if importlib.util.find_spec("pyverbs") else "no pyverbs"
    ports = []
    for device in sorted((sys_root / "class" / "infiniband").glob("*")):
        for port in sorted((device / "ports").glob("*")):
            state = (read_text(port / "state") or "unknown").rpartition(": ")[2]
            rate = read_text(port / "rate") or "unknown rate"
            link = read_text(port / "link_layer") or "unknown link"
            ports.append((f"{device.name}:{port.name} {link} {state} {rate}", state == "ACTIVE"))
    if not ports:
        return Check("rdma", Status.OK, f"no device ({verbs}): TCP between hosts")
    value = "; ".join(text for text, _ in ports) + f" ({verbs})"
    if not any(active for _, active in ports):
        return Check("rdma", Status.WARN, value, "No port is ACTIVE: check the cable, the subnet manager, ip link.")
    return Check("rdma", Status.OK, value)


def check_process_memory() -> Check:
    """One process may read the memory of a sibling (CMA): NIXL's fastest way between agents on one host."""
    hint = (
        "Same-host NIXL is slower without: kernel.yama.ptrace_scope=0, or CAP_SYS_PTRACE and a shared PID namespace. "
        "TCP needs none of it."
    )
    with subprocess.Popen(
        [sys.executable, "-c", CMA_OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as owner:
        assert owner.stdin is not None and owner.stdout is not None
        try:
            address = owner.stdout.readline().decode().strip()
            reader = subprocess.run(
                [sys.executable, "-c", CMA_READER, str(owner.pid), address],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PROBE_TIMEOUT_S,
                check=False,
            )
            said = reader.stdout.strip() or f"exit code {reader.returncode}"
        except subprocess.TimeoutExpired:
            said = "no answer"
        finally:
            owner.stdin.close()
    if said == "ok":
        return Check("process memory", Status.OK, "a process may read its sibling's")
    return Check("process memory", Status.WARN, said, hint)
