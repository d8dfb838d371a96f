"""Measures what `import p2pkv.client` costs an engine, and fails when it is too much.

Cost = the wall time of an interpreter that imports the module, less that of one that imports nothing; the best of
several interleaved runs, so that a busy machine does not matter. It judges the interpreter that runs it.
"""

from __future__ import annotations

import subprocess
import sys
import time

MODULE = "p2pkv.client"
LIMIT_MS = 50.0
RUNS = 9
HEAVY = (
    "torch", "numpy", "nixl", "nixl_cu12", "nixl_cu13", "vllm", "fastapi", "starlette", "pydantic", "uvicorn", "uvloop",
    "zeroconf", "typer", "prometheus_client",
)  # fmt: skip


def seconds(program: str) -> float:
    """Wall time of one fresh interpreter that runs ``program``."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return time.perf_counter() - start


def heavy_imports() -> list[str]:
    """Names of heavy packages that the import pulled in."""
    program = f"import sys, {MODULE}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return shown.stdout.split()


def main() -> int:
    """Print the cost; the exit code says whether it is within the limit."""
    heavy = heavy_imports()  # also writes the bytecode, as any installation has it
    bare, full = [], []
    for _ in range(RUNS):
        bare.append(seconds("pass"))
        full.append(seconds(f"import {MODULE}"))
    cost_ms = (min(full) - min(bare)) * 1e3
    print(f"import {MODULE}: {cost_ms:.1f} ms (limit {LIMIT_MS:.0f} ms)")
    if heavy:
        print(f"error: it pulls in {', '.join(heavy)}", file=sys.stderr)
    return 1 if heavy or cost_ms > LIMIT_MS else 0


if __name__ == "__main__":
    sys.exit(main())
