"""Measures what `import p2pkv.client` costs an engine, and fails when it is too much.

Cost = the processor time of an interpreter that imports the module, less that of one that imports nothing; the least of
several interleaved runs, as many as it takes (up to RUNS_MAX), because whatever else the machine does only ever adds,
to both. It judges the interpreter that runs it.
"""

from __future__ import annotations

import os
import subprocess
import sys

MODULE = "p2pkv.client"
LIMIT_MS = 50.0
RUNS_MAX = 60
HEAVY = (
    "torch", "numpy", "nixl", "nixl_cu12", "nixl_cu13", "vllm", "fastapi", "starlette", "pydantic", "uvicorn", "uvloop",
    "zeroconf", "typer", "prometheus_client",
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


def heavy_imports() -> list[str]:
    """Names of heavy packages that the import pulled in."""
    program = f"import sys, {MODULE}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env=ENVIRONMENT)
    return shown.stdout.split()


def main() -> int:
    """Print the cost; the exit code says whether it is within the limit."""
    heavy = heavy_imports()  # also writes the bytecode, as any installation has it
    bare, full = [cost_s("pass")], [cost_s(f"import {MODULE}")]
    cost_ms = LIMIT_MS + 1
    while cost_ms > LIMIT_MS and len(full) < RUNS_MAX:
        bare.append(cost_s("pass"))
        full.append(cost_s(f"import {MODULE}"))
        cost_ms = (min(full) - min(bare)) * 1e3
    print(f"import {MODULE}: {cost_ms:.1f} ms (limit {LIMIT_MS:.0f} ms, {len(full)} runs)")
    if heavy:
        print(f"error: it pulls in {', '.join(heavy)}", file=sys.stderr)
    return 1 if heavy or cost_ms > LIMIT_MS else 0


if __name__ == "__main__":
    sys.exit(main())
