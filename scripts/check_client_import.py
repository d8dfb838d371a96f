"""Shows what `import p2pkv.client` costs an engine, and fails when it costs too much or pulls in what it must not.

Cost = the processor time of an interpreter that imports the module, less that of one that imports nothing; the least of
several interleaved runs, as many as it takes (up to RUNS_MAX), because whatever else the machine does only ever adds,
to both.
"""

from __future__ import annotations

import os
import subprocess
import sys

MODULE = "p2pkv.client"
LIMIT_MS = 50.0
MODULES_MAX = 70
RUNS_MAX = 60
HEAVY = (
    "torch", "numpy", "nixl", "nixl_cu12", "nixl_cu13", "vllm", "fastapi", "starlette", "pydantic", "uvicorn", "uvloop",
    "zeroconf", "typer", "prometheus_client", "msgspec", "typing_extensions", "inspect", "dataclasses", "datetime",
    "uuid", "typing", "re",
)  # fmt: skip
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""With bytecode, as any installation has it."""


def cost_s(program: str) -> float:
    """Processor time, user and system, of one fresh interpreter that runs ``program``."""
    child = subprocess.Popen([sys.executable, "-c", program], env=ENVIRONMENT)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"error: {program!r} failed")
    return usage.ru_utime + usage.ru_stime


def imports() -> list[str]:
    """Names of the modules that the import adds to a bare interpreter's."""
    program = f"import sys; bare = set(sys.modules); import {MODULE}; print(*sorted(set(sys.modules) - bare))"
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env=ENVIRONMENT)
    return shown.stdout.split()


def main() -> int:
    """Print the cost; the exit code says whether it is as light as it must be."""
    added = imports()  # also writes the bytecode, as any installation has it
    heavy = sorted(set(HEAVY) & set(added))
    bare, full = [cost_s("pass")], [cost_s(f"import {MODULE}")]
    cost_ms = LIMIT_MS + 1
    while cost_ms > LIMIT_MS and len(full) < RUNS_MAX:
        bare.append(cost_s("pass"))
        full.append(cost_s(f"import {MODULE}"))
        cost_ms = (min(full) - min(bare)) * 1e3
    print(
        f"import {MODULE}: {cost_ms:.1f} ms (limit {LIMIT_MS:.0f} ms, {len(full)} runs; a bare interpreter takes "
        f"{min(bare) * 1e3:.1f} ms here), {len(added)} modules (limit {MODULES_MAX})"
    )
    if heavy:
        print(f"error: it pulls in {', '.join(heavy)}", file=sys.stderr)
    if len(added) > MODULES_MAX:
        print(f"error: it pulls in {len(added)} modules: {' '.join(added)}", file=sys.stderr)
    if cost_ms > LIMIT_MS:
        print(f"error: {cost_ms:.1f} ms is over the limit", file=sys.stderr)
    return 1 if heavy or len(added) > MODULES_MAX or cost_ms > LIMIT_MS else 0


if __name__ == "__main__":
    sys.exit(main())
